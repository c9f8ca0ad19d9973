"""What a run checks and reads before it starts, it checks and reads once."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.commands.execute import execute
from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.data import rows
from rlhf_cli.data.kinds import Preference
from rlhf_cli.data.reading import Chunk, Walk
from rlhf_cli.reporting import console
from rlhf_cli.runs import out_folder, preflight
from rlhf_cli.runs.session import Session
from rlhf_cli.stages import dpo
from tests.tiny import words_of

pytestmark = pytest.mark.usefixtures("inside")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a run is checked, its folder looked at, and each file of rows read as a whole."""
    counted: Counter[str] = Counter()

    def count(module: Any, name: str, label: str = "") -> None:
        function = getattr(module, name)

        def counting(*args: Any, **more: Any) -> Any:
            counted[label or f"{name} {Path(args[-1]).name}"] += 1
            return function(*args, **more)

        monkeypatch.setattr(module, name, counting)

    walk = Walk.__iter__

    def walking(self: Walk) -> Iterator[Chunk]:
        if self._limit is None:
            counted[self.name] += 1
        return walk(self)

    monkeypatch.setattr(Walk, "__iter__", walking)
    count(preflight, "check_models", "checks")
    count(preflight, "state_of", "looks")
    count(out_folder, "state_of", "looks")  # once more, under the lock
    return counted


def run(stage: str, *words: str) -> None:
    execute(stage, compose(stage, [*words]), check=False, words=[*words])


@pytest.mark.parametrize(
    ("stage", "more", "files"),
    [
        ("sft", ["algo.max_steps=1"], {"rows.jsonl": 1, "text.jsonl": 1}),
        ("reward", ["algo.epochs=1"], {"rows.jsonl": 2}),  # pairs, and what is to be imitated
        ("dpo", ["algo.epochs=1"], {"rows.jsonl": 1}),
        ("ppo", ["algo.steps=1"], {"rows.jsonl": 1, "text.jsonl": 1}),
        ("grpo", ["algo.steps=1"], {"rows.jsonl": 1, "text.jsonl": 1}),
    ],
)
def test_a_fresh_run_checks_and_reads_once(
    stage: str, more: list[str], files: dict[str, int], tmp_path: Path, calls: Counter[str]
) -> None:
    run(stage, *words_of(stage), *more, f"out={tmp_path / 'out'}")
    assert calls == {"checks": 1, "looks": 2, **files}


def test_evaluate_reads_rows_once_for_all_policies(tmp_path: Path, calls: Counter[str]) -> None:
    """Of prompts and of pairs: which are held out, and those; plain text as each tokenises it."""
    data = [word for word in words_of("dpo") if word.startswith("data.") or word == "data=jsonl"]
    words = ["algo.prompts=4", "algo.samples=1", "baselines=[runs/demo/adapter]", "gold=regex:a"]
    run("evaluate", *data, *words, "policy=runs/demo/sft", f"out={tmp_path / 'out'}")
    assert calls == {
        "checks": 1,
        "looks": 2,
        "rows.jsonl": 4,
        "text.jsonl": 2,
    }


def test_generate_reads_its_prompts_once(tmp_path: Path, calls: Counter[str]) -> None:
    data = [word for word in words_of("dpo") if word.startswith("data.") or word == "data=jsonl"]
    run("generate", *data, "algo.prompts=2", "policy=runs/demo/sft", f"out={tmp_path / 'out'}")
    assert calls == {"checks": 1, "looks": 2, "rows.jsonl": 1}


def test_what_is_wrong_at_a_glance_is_told_before_weights_are_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hashing(*args: Any) -> None:
        raise AssertionError("weights are hashed")

    monkeypatch.setattr(preflight, "provenance_of", hashing)
    for wrong in ("data.path=gone.jsonl", "policy=gone"):
        with pytest.raises(UserError, match="gone"):
            run("dpo", *words_of("dpo"), wrong, f"out={tmp_path / 'out'}")


def test_a_plan_of_a_check_is_made_anew(tmp_path: Path) -> None:
    cfg = compose("dpo", [*words_of("dpo"), "algo.epochs=1", f"out={tmp_path / 'out'}"])
    plan = preflight.preflight(cfg, check_only=True)
    assert plan.provenance is None and plan.lines()
    assert dpo.run(cfg, plan) == tmp_path / "out"


def test_rows_over_the_limit_are_not_kept() -> None:
    cfg = compose("dpo", [*words_of("dpo"), "data.max_rows=20", "data.eval_rows=4"])
    split = rows.Rows(cfg.data).split(Preference)
    assert (len(split.train), len(split.held_out)) == (16, 4)


def test_a_step_is_counted_as_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a terminal a line is said of each step, beside what the stage says at its end."""
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)
    cfg = compose("dpo", [*words_of("dpo"), f"out={tmp_path / 'out'}"])
    session = Session(cfg, tmp_path, torch.device("cpu"), 0.0, preflight.preflight(cfg), start=1)
    with console.Bar("dpo", 3) as bar:
        for step in session.steps(bar):
            bar.advance(0, f"loss of step {step}")
    said = [line.split(",")[0] + line[line.index("left") + 4 :] for line in said_in(capsys)]
    assert said[1::2] == ["dpo: 2/3  loss of step 2", "dpo: 3/3  loss of step 3"]


def said_in(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The progress lines of the steps on stderr."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if line.startswith("dpo: ") and " left" in line]


def test_a_finished_run_is_looked_at_once(tmp_path: Path, calls: Counter[str]) -> None:
    words = [*words_of("dpo"), "algo.epochs=1", f"out={tmp_path / 'out'}"]
    run("dpo", *words)
    calls.clear()
    run("dpo", *words)
    assert calls == {"looks": 1}


def test_what_is_loaded_is_said_first_and_once() -> None:
    words = [*words_of("ppo"), "out=new", "reward=runs/demo/reward", "policy=runs/demo/sft"]
    plan = preflight.preflight(compose("ppo", words))
    assert plan.at_once() == [
        "ppo: PPO and its family: policy, reward and prompts -> policy.",
        "out: new (free)",
        "loading PyTorch, runs/demo/sft, runs/demo/reward",
    ]
    assert plan.at_once() == [] and not any("ppo: " in line for line in plan.at_start())


def test_of_many_models_the_first_are_named() -> None:
    names = [f"m{i}" for i in range(9)]
    cfg = compose("evaluate", ["policy=m0", f"baselines=[{','.join(names)}]", "reference=m1"])
    cfg.reward = cfg.gold = None
    line = preflight.loading_line(cfg)
    assert line.startswith("loading PyTorch, m0, m1, ") and line.endswith(" more")


def test_hashing_large_weights_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight, "HEAVY", 1)
    preflight.preflight(compose("ppo", [*words_of("ppo"), "out=new"]))
    assert capsys.readouterr().err.startswith("reading ")
