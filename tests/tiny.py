"""The words of the smallest runs: every stage in seconds, every key that matters given."""

import importlib
import json
from pathlib import Path
from typing import Any

from rlhf_cli.config.compose import compose

DATA = [
    *("data=jsonl", "data.path=rows.jsonl", "data.eval_rows=8", "data.text_path=text.jsonl"),
    *("data.max_prompt_tokens=24", "data.max_response_tokens=8", "data.long_responses=cut"),
    "hardware.threads=1",
]
ADAM = ["algo.lr=5e-3", "algo.warmup_steps=1", "algo.max_grad_norm=1.0", "algo.adam_eps=1e-5"]
ROLLOUTS = [
    *("algo.steps=6", "algo.batch_size=8", "algo.minibatch_size=4", "algo.epochs=2"),
    *("algo.show_every=3", "algo.kl_coef=0.05", "algo.clip=0.2", "algo.temperature=0.9"),
]
WORDS = {
    "sft": [
        *("model.vocab_size=280", "model.hidden_size=16", "model.layers=1", "model.heads=2"),
        *("model.context=64", "model.dropout=0.1", "algo.text_mix=0.5", "algo.batch_size=8"),
        *("algo.epochs=2", "algo.max_steps=6", "algo.eval_every=2", "algo.keep=best"),
    ],
    "reward": ["algo.batch_size=8", "algo.epochs=2", "algo.eval_every=2"],
    "dpo": ["algo.batch_size=8", "algo.epochs=2", "algo.eval_every=2", "algo.beta=0.3"],
    "ppo": [
        *ROLLOUTS,
        *("algo.ptx_coef=0.5", "algo.ptx_batch_size=4", "algo.value_lr=1e-2"),
        *("algo.kl_controller=ziegler", "algo.kl_target=0.5", "algo.kl_horizon=100"),
        *("algo.entropy_coef=0.01", "algo.missing_eos_reward=-1.0"),
    ],
    "grpo": [*ROLLOUTS, "algo.group_size=3", "reward=regex:a"],
    "lora": ["model=lora", "model.lora_rank=2", "model.merge_lora=false"],
}


def words_of(stage: str) -> list[str]:
    """A stage's words, its resume points every two steps."""
    return [*DATA, *ADAM, *WORDS[stage], "hardware.save_every=2"]


def run_stage(stage: str, out: Path, *more: str) -> list[dict[str, Any]]:
    """Run a stage in the folder of the chain; returns the lines of its metrics.jsonl."""
    cfg = compose(stage, [*words_of(stage), *more, f"out={out}"])
    importlib.import_module(f"rlhf_cli.stages.{stage}").run(cfg)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def manifest(out: Path) -> dict[str, Any]:
    """stage.json without what a clock says, and the hashes of files that say it, or name `out`."""
    found: dict[str, Any] = json.loads((out / "stage.json").read_text())
    del found["seconds"]
    logs = [name for name in found["files"] if name.endswith((".yaml", ".jsonl", ".png"))]
    for name in logs:
        del found["files"][name]
    return found


def rows_of() -> dict[str, list[dict[str, Any]]]:
    """Rows of every kind by the name of their file; all judge the same greetings.

    Rankings have two to four responses in no order, the longest with a tie; feedback has more good
    than bad; steps have labels between right and wrong, and are cut by the limit here and there.
    """
    files: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("rows", "text", "rankings", "feedback", "steps")
    }
    names = [f"{a}{b}{c}" for a in "ABCDEFGH" for b in ("n", "d", "l") for c in ("a", "o")]
    for i, name in enumerate(names):
        prompt, good, bad = {"prompt": f"Greet {name}: "}, f"Hi {name}!", "No no."
        how_far = {"margin": i % 3 / 2, "p": 0.5 + i % 5 / 10}
        files["rows"].append({**prompt, "chosen": good, "rejected": bad, **how_far})
        files["text"].append({"text": f"{name} is here and {name} says hi to all."})
        ranked = list(zip([good, f"{name}?", bad, "No."], [1, 2, 3, 3], strict=True))[: 2 + i % 3]
        ranked = ranked[i % 2 :] + ranked[: i % 2]
        responses, ranks = (list(column) for column in zip(*ranked, strict=True))
        files["rankings"].append({**prompt, "responses": responses, "ranks": ranks})
        files["feedback"].append({**prompt, "completion": good, "label": True, "score": 2 + i % 3})
        if i % 3:
            files["feedback"].append({**prompt, "completion": bad, "label": False, "score": -1.5})
        steps, labels = ["Hi", name, bad][: 2 + i % 2], [1, [1, 0.75, 1][i % 3], 0]
        files["steps"].append({**prompt, "steps": steps, "labels": labels[: len(steps)]})
    return files
