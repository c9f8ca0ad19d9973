"""Rewards on several ranks: users' code runs once, rules are shared, what fails fails for all."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.rewards.reward import Reward, RuleReward, load_reward
from rlhf_cli.rewards.rules import Rule
from rlhf_cli.rollout.rollouts import Rollout
from tests.ranks import on_ranks
from tests.toys import bpe, run_of

OWN = """
import os, random
from pathlib import Path

def note(what):
    with Path(__file__).with_suffix(".calls").open("a") as calls:
        calls.write(f"{what} {os.getpid()}\\n")

note("read")

def luck(responses):
    note("asked")
    if len(responses) < 3:
        return [0.1] * len(responses)
    return [None, random.random(), *[1 / 3] * (len(responses) - 2)]

def by_step(steps):
    return [[random.random() for _ in own] for own in steps]
"""
BROKEN = "raise ValueError('no licence')\ndef luck(responses):\n    return [0.0] * len(responses)\n"


def rollouts_of(texts: list[str]) -> list[Rollout]:
    tokenizer = bpe()
    return [
        Rollout(
            Prompt("p", {"answer": "4"}, f"f:{i}"),
            Tokens([1], tokenizer(text).input_ids),
            [],
            "eos",
            text,
        )
        for i, text in enumerate(texts)
    ]


TEXTS = ["4", "#### 5", "2+2", "a b", "4.0"]


def load(spec: str) -> Reward:
    return load_reward(spec, run_of(step_end=" "), bpe(), torch.device("cpu"))


def judged(folder: Path) -> dict[str, Any]:
    """What terms say of responses; a NaN is None here."""
    own = load(f"{folder}/own.py:luck")
    steps = load(f"{folder}/own.py:by_step")
    rules = load("exact_answer + 0.5*numeric_answer:0.3")
    few = [own.score(rollouts_of(TEXTS[:count])).total.tolist() for count in (0, 1)]
    scores = rules.score(rollouts_of(TEXTS))
    by_step = steps.score(rollouts_of(TEXTS), by_step=True).steps
    assert by_step is not None
    return {
        "pid": os.getpid(),
        "luck": own.score(rollouts_of(TEXTS)).total.nan_to_num(-1).tolist(),
        "few": few,
        "steps": [each.tolist() for each in by_step],
        "rules": [part.tolist() for part in scores.parts.values()],
    }


def failing(folder: Path) -> list[str]:
    """A file that cannot be run; a rule that fails at the last response, on one rank."""

    def rule(row: Prompt, text: str) -> float:
        if text == "4.0":
            raise RunError("took too long")
        return 1.0

    said = []
    source = RuleReward(Rule("slow", rule, ""))
    for work in (
        lambda: load(f"{folder}/broken.py:luck"),
        lambda: source.score(rollouts_of(TEXTS)),
    ):
        try:
            work()
        except (RunError, UserError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def both(folder: Path) -> tuple[dict[str, Any], list[str]]:
    return judged(folder), failing(folder)


def test_users_code_runs_once_and_rules_are_shared(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "broken.py").write_text(BROKEN)
    alone, failures = both(tmp_path)
    (tmp_path / "own.calls").unlink()
    (first, said), (second, heard) = on_ranks(2, both, tmp_path)
    calls = [line.split() for line in (tmp_path / "own.calls").read_text().splitlines()]
    assert {int(process) for _, process in calls} == {first.pop("pid")}
    assert [what for what, _ in calls] == ["read", "asked", "asked"]
    assert second.pop("pid") and first == second
    assert first["rules"] == alone["rules"] == [[1, 0, 0, 0, 1], [1, 1, 0, 0, 1]]
    assert first["few"] == alone["few"] == [[], [pytest.approx(0.1)]]
    assert said == heard == failures
    assert said[0].startswith("UserError: ") and "no licence" in said[0]
    assert said[1] == "RunError: took too long"
