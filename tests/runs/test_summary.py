"""What a stage says at its end: the figure that matters in words, five numbers, what comes next."""

import dataclasses
import math
import shlex
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.reporting.metrics import defined
from rlhf_cli.runs import summary
from rlhf_cli.runs.summary import last_lines, moved

ONLINE = {
    "reward": 0.5,
    "reward_stderr": 0.03,
    "kl": 1.0,
    "entropy": 0.3,
    "length": 9.0,
    "ended": 1.0,
}
PAIRS = {
    "eval/pairs": 400.0,
    "eval/accuracy": 0.745,
    "eval/accuracy_stderr": 0.0226,
    "eval/accuracy_low": 0.698,
    "eval/longer_accuracy": 0.44,
    "eval/loss": 0.505,
}


Row = dict[str, Any]


def lines(
    stage: str, metrics: dict[str, Any], rows: list[dict[str, Any]], *words: str
) -> list[str]:
    return last_lines(compose(stage, list(words)), metrics, rows)


def test_that_the_reward_rose_while_gold_fell_is_said() -> None:
    rows = [
        {"step": 1, "reward": 0.2},
        {"step": 2, "reward": 0.3, "eval/reward": 0.34, "eval/gold": 0.17},
        {"step": 4, "reward": 0.6, "eval/reward": 0.50, "eval/gold": -0.35},
    ]
    final = {
        **ONLINE,
        "eval/reward": 0.5,
        "eval/reward_stderr": 0.031,
        "eval/gold": -0.35,
        "eval/gold_stderr": 0.11,
    }
    assert lines("ppo", final, rows)[0] == (
        "ppo: on held-out prompts the reward rose from 0.34 (step 2) to 0.500 ± 0.031 while gold "
        "fell from 0.17 (step 2) to -0.35 ± 0.11: the reward is fooled; algo.keep=eval/gold, or "
        "more algo.kl_coef"
    )
    within = lines("ppo", {**final, "eval/gold_stderr": 0.6}, rows)[0]  # it may be chance
    assert "and gold went from 0.17" in within and "fooled" not in within


@pytest.mark.parametrize(
    ("stage", "metrics", "said"),
    [
        (
            "sft",
            {"eval/loss": 0.3263},
            "the held-out loss fell from 0.43 (step 2) to 0.3263 nats per token",
        ),
        (
            "reward",
            PAIRS,
            "its scores are right on 0.745 ± 0.023 of 400 held-out pairs, a coin on 0.5",
        ),
        (
            "reward",
            {**PAIRS, "eval/accuracy_low": 0.6, "eval/longer_accuracy": 0.7},
            "the longer one on 0.7: too few rows to tell them apart, or nothing was learnt",
        ),
        ("dpo", {**PAIRS, "eval/kl": 1.85}, "; the KL to the reference is 1.85 nats per response"),
        ("grpo", ONLINE, "the reward rose from 0.1 (step 1) to 0.500 ± 0.030"),
        ("ppo", {**ONLINE, "reward": math.nan}, "no response of what was written has a reward"),
        ("generate", {"samples": 20}, "20 responses"),
    ],
)
def test_sentences(stage: str, metrics: dict[str, Any], said: str) -> None:
    rows: list[Row] = [{"step": 1, "reward": 0.1}, {"step": 2, "eval/loss": 0.43}, {"step": 4}]
    first = lines(stage, metrics, rows)[0]
    assert first.startswith(f"{stage}: ") and said in first


def test_a_figure_that_was_measured_once_has_not_moved() -> None:
    assert moved("x", {"x": 1.0}, [{"step": 1, "x": 2.0}]) is None
    assert moved("x", {"x": 1.0}, [{"step": 1}, {"step": 2}]) is None
    rows: list[Row] = [{"step": 1, "x": None}, {"step": 2, "x": 1.0}]
    assert str(moved("x", {"x": 1.0}, rows)) == "stayed at 1"


def test_five_numbers_and_where_the_rest_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / "o").mkdir(exist_ok=True)
        (tmp_path / "o" / file).touch()
    _, numbers, files, following = lines("ppo", {**ONLINE, "text/loss": 2.0}, [], "out=o")
    assert numbers == "reward 0.500 ± 0.030, kl 1, entropy 0.3, length 9, ended 1"
    assert (
        files == "all figures in o: stage.json, metrics.jsonl (each step), samples.jsonl (samples)"
    )
    assert following == "next: rlhf-cli evaluate policy=o"


@pytest.mark.parametrize(
    ("stage", "typed", "words", "said"),
    [
        ("sft", "", [], "next: rlhf-cli reward, or rlhf-cli dpo"),
        ("sft", "", ["name=a"], "next: rlhf-cli reward name=a, or rlhf-cli dpo name=a"),
        ("reward", "", ["out=r x"], "next: rlhf-cli ppo 'reward=r x'"),
        ("reward", "", ["policy=p"], "next: rlhf-cli ppo policy=p"),
        ("dpo", "", [], "next: rlhf-cli evaluate policy=runs/demo/dpo"),
        (
            "dpo",
            "rlhf-cli dpo data=rows 'data.path=my rows.jsonl' algo.beta=1",
            ["data=rows", "data.path=my rows.jsonl"],
            "next: rlhf-cli evaluate policy=runs/demo/dpo data=rows 'data.path=my rows.jsonl'",
        ),
        ("generate", "", [], "next: head -3 runs/demo/generate/samples.jsonl"),
        ("evaluate", "", ["policy=p"], "next: rlhf-cli export p my-model"),
    ],
)
def test_what_to_run_next(
    stage: str, typed: str, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summary, "command_line", lambda: typed or None)
    metrics = {"eval/loss": 1.0, "samples": 1}
    assert lines(stage, metrics, [], *words)[-1] == said
    for command in said.removeprefix("next: ").split(", or "):
        tool, following, *more = shlex.split(command)
        if tool == "rlhf-cli" and following != "export":
            assert dataclasses.is_dataclass(compose(following, more))  # it is a command


def test_what_is_no_number_is_left_out_and_why_is_said() -> None:
    known, why = defined(
        {
            "eval/loss": 1.0,
            "eval/reward": math.nan,
            "eval/auc": math.nan,
            "kl": math.inf,
            "odd": math.nan,
            "policies": {"runs/a": {"text_loss": None, "gold": {"mean": 1.0, "stderr": math.nan}}},
            "samples": 3,
        }
    )
    assert known == {
        "eval/loss": 1.0,
        "policies": {"runs/a": {"gold": {"mean": 1.0}}},
        "samples": 3,
    }
    assert why == {
        "eval/reward": "no response got a score",
        "eval/auc": "all labels are alike",
        "kl": "infinite",
        "odd": "not a number: there was nothing to take it from",
        "policies/runs/a/text_loss": "no plain text is held out",
        "policies/runs/a/gold/stderr": "all rows have one prompt, so nothing tells how it varies",
    }
