"""Keys of the group data: rows, and how they become tokens."""

from dataclasses import dataclass
from typing import Any

from rlhf_cli.config.schema.keys import key


@dataclass
class Data:
    """Where rows come from, how they become tokens, and what is held out."""

    format: str = key(
        "How rows are stored: the shipped demo, rows in our columns, or a published shape.",
        choices=(
            *("demo", "rows", "alpaca", "gsm8k", "gsm8k_solutions", "helpsteer", "hh", "kto"),
            *("messages", "prm800k", "sharegpt", "stack_exchange", "text", "tldr"),
            *("ultrafeedback", "verl"),
        ),
    )
    path: Any = key(
        "File, folder, pattern as 'data/*.jsonl', a list of those, or a hub dataset as "
        "owner/name@revision:config:split; generate also takes - (stdin).",
        texts=True,
    )
    sources: list[Any] = key(
        "Several sources in place of path: {path, and any of shape, columns, cap (rows), repeat "
        "(times in an epoch), weight (share of an epoch), name}."
    )
    eval_path: Any = key(
        "Held-out rows, as path; null takes the validation or test split in the folder that path "
        "is, or else holds out prompts of path.",
        texts=True,
    )
    eval_share: float = key(
        "Share of prompts that are held out, with all their rows, by the hash of the prompt: rows "
        "that come later move none of them.",
        gt=0,
        lt=1,
    )
    eval_rows: int | None = key(
        "Number of prompts to hold out in place of a share: those whose hash is lowest.", ge=1
    )
    max_rows: int | None = key("Use the first rows only; null uses all.", ge=1)
    text_path: Any = key(
        "Plain text rows for the pretraining mix (ptx_coef, text_mix), as path.", texts=True
    )
    columns: dict[str, str] = key("Your columns for ours, as {ours: yours}, or paths into them.")
    template: str | None = key(
        "How a prompt is written: text with {prompt} and other {columns} in it (\\n breaks a "
        "line), or chat (the chat template); null does as the policy's stage.json says, or else "
        "writes text as it is and messages by the chat template."
    )
    prefix: str | None = key(
        "File of text that stands before every prompt, in dialogues as the system message: what "
        "generate samples under, and what sft algo=distill learns to do without."
    )
    chat_template: str | None = key(
        "A Jinja file, or chatml, gemma, llama3, mistral, qwen or zephyr; null is the tokenizer's."
    )
    chat_args: dict[str, Any] = key(
        "What the chat template is told beside the messages, as {enable_thinking: false}; {} is "
        "what the policy's stage.json says."
    )
    loss_on: str = key(
        "Which replies of a dialogue sft learns from: all of the assistant's, or the last.",
        choices=("all", "last"),
    )
    special_tokens: str = key(
        "Special tokens that rows spell: read as the text that they are, or kept as tokens.",
        choices=("text", "keep"),
    )
    max_prompt_tokens: int | None = key(
        "Longest prompt in tokens; null is the policy's, else what the model's positions leave.",
        ge=1,
    )
    max_response_tokens: int | None = key(
        "Longest response in tokens, trained on or sampled; null is the policy's, else what the "
        "model's positions leave.",
        ge=1,
    )
    long_responses: str | None = key(
        "Responses over the limit: cut them (their end is lost), drop the row, or stop; null cuts, "
        "but stops where more than 5 % are cut.",
        choices=("cut", "drop", "error"),
    )
    long_prompts: str = key(
        "Prompts over the limit: stop, drop the row, or cut their start.",
        choices=("error", "drop", "cut"),
    )
    bad_rows: str = key(
        "Rows that are unreadable, empty or misshapen: stop at the first, or drop and count them.",
        choices=("error", "drop"),
    )
    convert: list[str] = key(
        "Feedback may be turned into other kinds, in this order; nothing is turned unasked.",
        choices=(
            "feedback_to_ranking",
            "feedback_to_stepwise",
            "preference_to_feedback",
            "preference_to_ranking",
            "ranking_to_preference",
        ),
    )
    doubtful_pairs: str = key(
        "Pairs of identical sides, pairs labelled both ways, one side always the longer: count and "
        "keep, drop the first two, or stop.",
        choices=("keep", "drop", "error"),
    )
    step_join: str = key("Text between the steps of a row when they become one response.")
    step_end: str = key("Regular expression whose matches end a step of a response.", regex=True)
    streaming: bool = key(
        "Read rows while the run goes on and keep no tokens on disk; needs algo.max_steps (sft, "
        "reward, dpo)."
    )
    cache: str | None = key(
        "Folder of tokenised rows, read again by runs with the same files, tokenizer and template; "
        "null is that of RLHF_CLI_CACHE, or the user's own."
    )
    gold: str | None = key("Scorer that training never sees; evaluate reports it.", regex=True)
