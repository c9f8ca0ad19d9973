"""Ranks that die, and the command that started them: the run ends with the bytes of a quiet one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.contents import contents_of, faults_of
from tests.faults.killing import differences, link
from tests.tiny import words_of

LENGTH = ("algo.max_steps=30", "algo.epochs=20", "algo.eval_every=10")


def ranks_of(agent: int) -> dict[int, int]:
    """The process of each rank that a command has started."""
    found: dict[int, int] = {}
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {int(each[5:]): int(child) for each in environment if each.startswith(b"RANK=")}
    return found


class Command:
    """`rlhf-cli sft` of two ranks, which may be started again twice."""

    def __init__(self, place: Path, chain: Path) -> None:
        link(chain, place)
        self.log = place / "out/metrics.jsonl"
        words = [*words_of("sft"), *LENGTH, "hardware=cpu", "hardware.processes=2"]
        words += ["hardware.max_restarts=2", "hardware.threads=1", "out=out"]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rlhf_cli", "sft", *words],
            cwd=place,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def at(self, steps: int, act: Callable[[], object]) -> None:
        """Do something once so many steps are logged."""
        until = time.monotonic() + 120
        while time.monotonic() < until and self.process.poll() is None:
            if self.log.exists() and len(self.log.read_bytes().splitlines()) >= steps:
                act()
                return
            time.sleep(0.005)
        raise AssertionError(f"no step {steps}: {self.end()}")

    def kill_rank(self, rank: int) -> None:
        os.kill(ranks_of(self.process.pid)[rank], signal.SIGKILL)

    def end(self) -> tuple[int, str]:
        """Exit status and what was said."""
        _, said = self.process.communicate(timeout=150)
        return self.process.returncode, said


@pytest.fixture
def quiet(chain: Path, tmp_path: Path) -> dict[str, object]:
    """What a run leaves that nothing happened to."""
    code, said = Command(tmp_path / "quiet", chain).end()
    assert code == 0, said
    assert faults_of(tmp_path / "quiet/out") == []
    return contents_of(tmp_path / "quiet/out")


@pytest.mark.slow
def test_whatever_is_killed_the_run_ends_with_the_same_bytes(
    chain: Path, tmp_path: Path, quiet: dict[str, object]
) -> None:
    restarted = tmp_path / "restarted"
    command = Command(restarted, chain)
    command.at(7, lambda: command.kill_rank(1))
    command.at(17, lambda: command.kill_rank(0))
    code, said = command.end()
    assert code == 0, said
    assert said.count("was ended by SIGKILL") == said.count("all ranks are started again") == 2
    assert said.count("resuming after step") == 2
    assert not differences(restarted, quiet)

    killed = tmp_path / "killed"
    command = Command(killed, chain)
    command.at(5, command.process.kill)
    assert command.end()[0] == -signal.SIGKILL
    for lines, number in ((12, signal.SIGTERM), (20, signal.SIGINT)):
        command = Command(killed, chain)
        command.at(lines, partial(command.process.send_signal, number))
        code, said = command.end()
        assert code == 75 and f"{number.name}: saved after step" in said.splitlines()[-1], said
    code, said = Command(killed, chain).end()
    assert code == 0, said
    assert not differences(killed, quiet)
    code, said = Command(killed, chain).end()
    assert (code, said) == (0, "out: already finished; nothing to do\n")
