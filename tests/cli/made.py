"""The words that made what the tests of this folder start from, and what a folder holds."""

import resource
from pathlib import Path

LIMITS = "data.max_prompt_tokens=32 data.max_response_tokens=8"
ROWS = f"data=jsonl data.path=rows.jsonl data.eval_rows=10 {LIMITS}"
MODEL = "model.vocab_size=270 model.hidden_size=16 model.layers=1 model.heads=2 model.context=64"
SFT = f"sft {ROWS} {MODEL} algo.max_steps=2"
REWARD = f"reward {ROWS}"
POLICY = "runs/demo/sft"
ADAPTER = f"dpo {ROWS} model=lora model.lora_rank=2 out=runs/demo/adapter"


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def cpu_seconds() -> float:
    """Processor time of all children that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime
