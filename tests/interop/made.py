"""Tiny models for other tools, made by our stages or by TRL, from the same bases and rows."""

import contextlib
import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from rlhf_cli.config.compose import compose
from tests.families import family
from tests.toys import bpe, llama

NAMES = [f"{a}{b}" for a in ("An", "Bo", "Cy", "Di") for b in ("na", "da", "le", "ro", "x", "y")]
ROWS = [{"prompt": f"Greet {n}: ", "chosen": f"Hi {n}!", "rejected": "No."} for n in NAMES]
DATA = [
    *("data=jsonl", "data.path=rows.jsonl", "data.eval_rows=4", "data.max_prompt_tokens=48"),
    *("data.max_response_tokens=24", "hardware.save_every=null"),
]
STEP = ["algo.batch_size=4", "algo.max_steps=2", "algo.lr=1e-3", "algo.warmup_steps=0"]
ROLLOUT = ["algo.steps=1", "algo.batch_size=4", "algo.minibatch_size=4", "algo.max_tokens=4"]
LORA = ["model.lora_rank=4", "model.lora_alpha=8", "model.merge_lora=false"]
THEIRS: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "max_length": 64,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def tokenizer_of(base: str) -> PreTrainedTokenizerFast:
    """chat: with a pad token and a chat template; bare: with neither, as Llama 3 has it."""
    if base == "chat":
        return bpe(chat=True)
    tokenizer = family("llama3")
    tokenizer.pad_token = None
    return tokenizer


def make_base(base: str, place: Path) -> None:
    """A random model with its tokenizer."""
    tokenizer = tokenizer_of(base)
    model = llama(len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    model.config.bos_token_id = model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = None
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)


def ours(stage: str, out: str, *words: str) -> None:
    """Run a stage of ours in the folder that holds rows.jsonl."""
    run = importlib.import_module(f"rlhf_cli.stages.{stage}").run
    given = ROLLOUT if stage in ("ppo", "grpo") else STEP
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        run(compose(stage, [*DATA, *given, *words, f"out={out}"]))


def rows_for(stage: str) -> Any:
    """The rows as TRL's trainers take them."""
    from datasets import Dataset

    if stage == "sft":
        return Dataset.from_list(
            [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
        )
    return Dataset.from_list(ROWS)


def theirs(
    stage: str,
    model: Any,
    out: Path,
    lora: Any = None,
    tokenizer: Any = None,
    rows: Any = None,
) -> float:
    """Train with TRL, write the folder, and return the mean loss.

    Args:
        model: a folder, or a model with its `tokenizer`.
        rows: a data set; None takes ROWS.
    """
    import trl

    name = {"sft": "SFT", "reward": "Reward", "dpo": "DPO", "kto": "KTO"}[stage]
    config = getattr(trl, f"{name}Config")(output_dir=str(out), **THEIRS)
    torch.manual_seed(0)
    trainer = getattr(trl, f"{name}Trainer")(
        model=model,
        args=config,
        train_dataset=rows_for(stage) if rows is None else rows,
        peft_config=lora,
        processing_class=tokenizer,
    )
    loss: float = trainer.train().training_loss
    trainer.save_model()
    return loss


def write_rows(place: Path) -> None:
    """rows.jsonl in a folder."""
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
