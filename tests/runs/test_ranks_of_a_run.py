"""Runs that several ranks share: one folder, one end, and the same bytes after a stop."""

import contextlib
import signal
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import Interrupted, UserError
from rlhf_cli.ranks.world import world
from rlhf_cli.reporting.metrics import JsonLines
from rlhf_cli.runs import interrupts
from rlhf_cli.stages import sft
from tests.contents import contents_of, faults_of
from tests.ranks import on_ranks
from tests.tiny import words_of


def run_sft(folder: Path, out: Path, *more: str, stop: tuple[int, int] | None = None) -> str:
    """Run sft; returns the line in which it ends early.

    Args:
        stop: a step in which a rank gets a signal.
    """
    write = JsonLines.write

    def writing(log: JsonLines, step: int, metrics: dict[str, Any]) -> None:
        if stop == (step, world().rank):
            interrupts._Stop.asked = signal.SIGTERM.name
        write(log, step, metrics)

    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(JsonLines, "write", writing)
        patch.setattr(interrupts._Stop, "asked", None)
        try:
            sft.run(compose("sft", [*words_of("sft"), f"out={out}", *more]))
        except (Interrupted, UserError) as error:
            return str(error)
    return ""


def stopped_and_resumed(folder: Path, out: Path) -> list[str]:
    return [
        run_sft(folder, out, stop=(3, 1)),
        run_sft(folder, out),
        run_sft(folder, out),
    ]


def test_a_signal_to_one_rank_ends_all_and_they_go_on_together(
    chain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    on_ranks(2, run_sft, chain, whole)
    for lines in on_ranks(2, stopped_and_resumed, chain, out):
        assert lines == ["SIGTERM: saved after step 3; the same command goes on", "", ""]
    ours, theirs = contents_of(out), contents_of(whole)
    assert ours.keys() == theirs.keys() and not faults_of(out)
    config = "config.yaml"
    assert all(ours[name] == theirs[name] for name in ours if name != config)
    assert "resuming after step 3\n" in capfd.readouterr().err
