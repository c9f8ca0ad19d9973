"""What a run checks and reads before it starts, it checks and reads once."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.commands import stage as command
from rlhf_cli.config.compose import compose
from rlhf_cli.data import rows
from rlhf_cli.runs import out_folder, preflight
from tests.tiny import words_of

pytestmark = pytest.mark.usefixtures("inside")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a run is checked, its folder looked at, and each file of rows parsed."""
    counted: Counter[str] = Counter()

    def count(module: Any, name: str, label: str = "") -> None:
        function = getattr(module, name)

        def counting(*args: Any, **more: Any) -> Any:
            counted[label or f"{name} {Path(args[-1]).name}"] += 1
            return function(*args, **more)

        monkeypatch.setattr(module, name, counting)

    count(rows, "parse_rows")
    count(preflight, "check_models", "checks")
    count(preflight, "state_of", "looks")
    count(out_folder, "state_of", "looks")  # once more, under the lock
    return counted


def run(stage: str, *words: str) -> None:
    command._execute(stage, compose(stage, [*words]), check=False)


@pytest.mark.parametrize(
    ("stage", "more", "files"),
    [
        ("sft", ["algo.max_steps=1"], ["rows.jsonl", "text.jsonl"]),
        ("reward", ["algo.epochs=1"], ["rows.jsonl", "text.jsonl"]),
        ("dpo", ["algo.epochs=1"], ["rows.jsonl", "text.jsonl"]),
        ("ppo", ["algo.steps=1"], ["rows.jsonl", "text.jsonl"]),
        ("grpo", ["algo.steps=1"], ["rows.jsonl", "text.jsonl"]),
    ],
)
def test_a_fresh_run_checks_and_reads_once(
    stage: str, more: list[str], files: list[str], tmp_path: Path, calls: Counter[str]
) -> None:
    run(stage, *words_of(stage), *more, f"out={tmp_path / 'out'}")
    expected = {f"parse_rows {file}": 1 for file in files}
    assert calls == {"checks": 1, "looks": 2, **expected}


def test_evaluate_reads_rows_once_for_all_policies(tmp_path: Path, calls: Counter[str]) -> None:
    data = [word for word in words_of("dpo") if word.startswith("data.") or word == "data=jsonl"]
    words = ["algo.prompts=4", "algo.samples=1", "baselines=[runs/demo/adapter]", "gold=regex:a"]
    run("evaluate", *data, *words, "policy=runs/demo/sft", f"out={tmp_path / 'out'}")
    assert calls == {
        "checks": 1,
        "looks": 2,
        "parse_rows rows.jsonl": 1,
        "parse_rows text.jsonl": 1,
    }


def test_a_finished_run_is_looked_at_once(tmp_path: Path, calls: Counter[str]) -> None:
    words = [*words_of("dpo"), "algo.epochs=1", f"out={tmp_path / 'out'}"]
    run("dpo", *words)
    calls.clear()
    run("dpo", *words)
    assert calls == {"looks": 1}
