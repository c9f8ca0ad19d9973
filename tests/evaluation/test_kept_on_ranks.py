"""Stages that sample on several ranks: the same texts, kept in rounds, whoever goes on."""

import contextlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.evaluation.kept import SamplesOfPolicy
from tests.faults.killing import SAMPLING
from tests.ranks import on_ranks
from tests.tiny import DATA
from tests.training.test_stages_on_ranks import near

ROUNDS = "hardware.rollout_tokens=8"  # so small that there are several
MORE = {"generate": ["algo.samples=2", "reward=length:5 + lucky.py:luck"], "evaluate": []}
OWN = """
def luck(responses):
    return [0.1 if len(each) % 2 else None for each in responses]
"""


class Killed(Exception):
    pass


def live(folder: Path, stage: str, out: Path, rounds: int | None = None) -> list[int]:
    """Run a stage, which dies after so many rounds; returns how many prompts each had."""
    keep = SamplesOfPolicy.keep
    counts: list[int] = []

    def counted(self: SamplesOfPolicy, made: Mapping[int, list[Any]]) -> None:
        keep(self, made)
        counts.append(len(made))
        if len(counts) == rounds:
            raise Killed

    words = [*DATA, *SAMPLING[stage], ROUNDS, *MORE[stage], f"out={out}"]
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        (folder / "lucky.py").write_text(OWN)
        patch.setattr(SamplesOfPolicy, "keep", counted)
        with contextlib.suppress(Killed):
            importlib.import_module(f"rlhf_cli.stages.{stage}").run(compose(stage, words))
    return counts


def lives(folder: Path, out: Path) -> dict[str, list[int]]:
    """On these ranks: whole runs, one killed and gone on with, one begun and one ended."""
    return {
        "generate": live(folder, "generate", out / "generate"),
        "evaluate": live(folder, "evaluate", out / "evaluate"),
        "killed": live(folder, "generate", out / "again", 1),
        "again": live(folder, "generate", out / "again"),
        "begun": live(folder, "generate", out.parent / "begun on 2", 1),
        "ended": live(folder, "generate", out.parent / "begun on 1"),
    }


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_samples_are_kept_in_rounds_and_gone_on_from_on_any_number_of_ranks(
    chain: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    total = sum(live(chain, "generate", one / "generate"))
    live(chain, "evaluate", one / "evaluate")
    (begun,) = on_ranks(1, live, chain, "generate", tmp_path / "begun on 1", 2)  # whose lock goes
    first, second = on_ranks(2, lives, chain, two)
    assert first == second
    ended = live(chain, "generate", tmp_path / "begun on 2")
    assert 1 < len(first["generate"]) < total == sum(first["generate"])
    assert sum(first["killed"] + first["again"]) == total and first["killed"]
    assert sum(begun + first["ended"]) == sum(first["begun"] + ended) == total
    assert (two / "again" / "samples.jsonl").read_bytes() == (
        two / "generate" / "samples.jsonl"
    ).read_bytes()
    for out in (two / "generate", tmp_path / "begun on 1", tmp_path / "begun on 2"):
        near(lines(one / "generate"), lines(out), 1e-5)
    near(lines(one / "evaluate"), lines(two / "evaluate"), 1e-5)
    reports = [json.loads((each / "evaluate/report.json").read_text()) for each in (one, two)]
    for report in reports:
        for policy in report["policies"].values():
            del policy["seconds"]
    near(reports[0], reports[1], 1e-5)
