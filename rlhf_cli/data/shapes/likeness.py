"""Which published shape a row looks like that is read in another one, for its error line."""

from rlhf_cli.data.columns import PAIR, is_given
from rlhf_cli.data.kinds import Prompt, Row
from rlhf_cli.data.raw import Raw
from rlhf_cli.data.shapes.problems import solutions_in

KNOWN: list[tuple[str, str, tuple[tuple[str, ...], ...]]] = [
    ("sharegpt", "ShareGPT conversations", (("conversations",), ("conversation",))),
    ("ultrafeedback", "UltraFeedback rows", (("instruction", "completions"),)),
    (
        "helpsteer",
        "HelpSteer rows",
        (
            ("response", "helpfulness"),
            ("response1", "response2", "overall_preference"),
            ("response_1", "response_2", "preference_strength"),
        ),
    ),
    ("alpaca", "Alpaca rows", (("instruction", "output"), ("instruction", *PAIR))),
    ("tldr", "comparisons of summaries", (("info", "summaries"),)),
    ("stack_exchange", "Stack Exchange rows", (("question", "response_j"), ("qid", "answers"))),
    ("prm800k", "rows of labelled steps", (("completions", "labels"), ("input", "label", "task"))),
    ("verl", "rows for verl", (("data_source", "reward_model"),)),
    ("messages", "dialogues", (("messages",),)),
]
"""The option that reads rows with some columns, and what they are called."""

ASKS = ("question", "instruction", "query", "problem", "input")
"""Other names for a prompt."""

REPLIES = ("response", "output", "reply", "answer")
"""Other names for a completion."""


def looks_like(raw: Raw, format: str) -> str:
    """`; these look like ...: data=OPTION` for a row of a shape known by another name.

    Or, of a row in no known shape, the column that may be its prompt.
    """
    for option, what, signatures in KNOWN:
        if any(all(is_given(raw, name) for name in names) for names in signatures):
            return "" if option == format else f"; these look like {what}: data={option}"
    question, label, chosen = (raw.get(name) for name in ("question", "label", "chosen"))
    found = None
    if isinstance(question, dict) and isinstance(label, dict):
        found = "prm800k", "PRM800K solutions"
    elif isinstance(raw.get("answers"), list) and question:
        found = "stack_exchange", "Stack Exchange rows"
    elif isinstance(chosen, str) and "\n\nAssistant:" in chosen:
        found = "hh", "HH dialogues"
    elif isinstance(question, str) and "####" in str(raw.get("answer")):
        found = "gsm8k", "GSM8K problems"
    elif solutions_in(raw):
        found = "gsm8k_solutions", "model solutions of GSM8K"
    if found is None:
        asks = [name for name in ASKS if isinstance(raw.get(name), str)]
        hint = asks and format == "rows" and not is_given(raw, "prompt")
        return f"; data.columns.prompt={asks[0]} reads its column {asks[0]!r}" if hint else ""
    if found[0] == format:
        return ""
    return f"; these look like {found[1]}: data={found[0]}"


def missed(row: Row, format: str) -> str:
    """What a row of `format` that gives a prompt alone may have meant, for an error line."""
    if not isinstance(row, Prompt):
        return ""
    if like := looks_like({"prompt": row.prompt, **row.columns}, format):
        return like
    named = next((name for name in REPLIES if isinstance(row.columns.get(name), str)), None)
    return f"; data.columns.completion={named} reads its column {named!r}" if named else ""
