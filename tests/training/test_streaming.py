"""Rows that are read while a stage goes on: the same steps, whatever ends the run."""

import json
from pathlib import Path

import pytest

from rlhf_cli.data import streaming
from tests.pace import fast
from tests.tiny import run_stage, words_of

pytestmark = pytest.mark.usefixtures("inside")

STREAMED = [
    *("data.streaming=true", "data.eval_rows=null", "data.eval_share=0.2", "data.text_path=null"),
    *("algo.epochs=1", "algo.max_steps=5", "hardware.save_every=1"),
]
STAGES = {
    "sft": ("sft", ["algo.text_mix=null"]),
    "dpo": ("dpo", []),
    "reward": ("reward", []),
    "thumbs": ("reward", ["algo=pointwise", "algo.target=label", "data.path=feedback.jsonl"]),
}


@pytest.mark.parametrize("name", fast(["sft", "dpo"], STAGES))
def test_a_stream_that_is_killed_goes_on_to_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With windows of 16 rows and batches of 8, also where a step takes from two windows."""
    monkeypatch.setattr(streaming, "WINDOW", 12)
    stage, more = STAGES[name]
    words = [*STREAMED, *more]
    run_stage(stage, tmp_path / "whole", *words)

    class Killed(Exception):
        """Stands for what ends a process."""

    from rlhf_cli.runs.session import Session

    save = Session.save

    def killed(self: Session, step: int, *state: object) -> None:
        save(self, step, *state)  # type: ignore[arg-type]
        if step == 3:
            raise Killed

    with monkeypatch.context() as once:
        once.setattr(Session, "save", killed)
        with pytest.raises(Killed):
            run_stage(stage, tmp_path / "out", *words)
    lines = run_stage(stage, tmp_path / "out", *words)
    assert len(lines) == 5
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("stage", "more", "said"),
    [
        ("dpo", ["algo.max_steps=null"], "set algo.max_steps"),
        ("dpo", ["algo=kto"], "algo.loss=kto pairs rows with others"),
        ("dpo", ["reference=bootstrap"], "reference=bootstrap learns from all rows first"),
        ("ppo", [], "data.streaming is for sft, reward and dpo"),
        ("reward", ["data.eval_rows=8"], "set eval_rows=null"),
        ("reward", ["data.convert=[feedback_to_ranking]"], "needs all rows at once"),
    ],
)
def test_what_does_not_go_with_a_stream(stage: str, more: list[str], said: str) -> None:
    from rlhf_cli.config.compose import compose
    from rlhf_cli.config.errors import UserError

    words = [word for word in words_of(stage) if not word.startswith("algo.")]
    streamed = [word for word in STREAMED if stage != "ppo" or not word.startswith("algo.")]
    with pytest.raises(UserError, match=said):
        compose(stage, [*words, *streamed, *more])


def test_metrics_tell_of_each_source(tmp_path: Path) -> None:
    """Of two sources, each with held-out rows of its own."""
    rows = Path("rows.jsonl").read_text().splitlines()
    for name, part in (("one", rows[::2]), ("two", rows[1::2])):
        Path(f"{name}.jsonl").write_text("\n".join(part) + "\n")
    words = [
        *("data.path=null", "data.sources=[{path: one.jsonl}, {path: two.jsonl, name: b}]"),
        "data.eval_rows=12",
    ]
    for stage in ("sft", "dpo", "reward"):
        lines = run_stage(stage, tmp_path / stage, *words)
        last = json.loads(json.dumps(lines[-1]))
        parts = [last[f"eval/source/{name}/loss"] for name in ("one.jsonl", "b")]
        assert min(parts) - 1e-6 <= last.get("eval/loss", parts[0]) <= max(parts) + 1e-6
