"""Killed at any moment and run again, every stage ends with the bytes of an undisturbed run."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import DEVNULL

import pytest

from tests.contents import contents_of
from tests.faults.killing import (
    BYTES,
    FILE,
    SAMPLING,
    TIME,
    Death,
    attempt,
    config,
    differences,
    kill_often,
    link,
    lived,
)
from tests.online.test_refresh import REFRESH
from tests.tiny import words_of
from tests.training.test_stages import RUNS

NAMES = [
    *("sft", "sft by reward", "reward", "reward kwise", "dpo", "dpo bootstrap", "dpo lora", "kto"),
    *("ppo", "ppo watched", "ppo_klpen", "ppo four roles", "grpo", "grpo watched", "dapo"),
]
CONFIGS = {
    **{name: RUNS[name] for name in NAMES},
    "dpo lora": [*RUNS["dpo lora"], "algo.snapshot_every=2"],
    **{name: [name] for name in SAMPLING},
    "grpo_iterative": ["grpo", "algo=grpo_iterative", *REFRESH, "algo.refresh_reference=2"],
}
KILLS = 12  # of each config: more than 200 in all


def kill_before_each(words: list[str], chain: Path, place: Path, last: int | None = None) -> None:
    """Kill a run before each of its file operations, or the last few, and let it end."""
    cfg = config(words)
    touches = lived(cfg, chain, place / "whole").touches
    expected = contents_of(place / "whole" / "out")
    for touch in range(touches + 1 - (last or touches), touches + 1):
        killed = place / str(touch)
        assert attempt(cfg, chain, killed, Death(touch=touch))
        assert not attempt(cfg, chain, killed, Death())
        assert not differences(killed, expected), f"killed before file operation {touch}"


@pytest.mark.slow
def test_a_stage_killed_at_its_last_file_operation_leaves_nothing_behind(
    chain: Path, tmp_path: Path
) -> None:
    kill_before_each(CONFIGS["sft"], chain, tmp_path, last=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [[*CONFIGS["sft"], "algo.max_steps=2"], *map(CONFIGS.get, SAMPLING)]
)
def test_no_file_operation_is_a_bad_moment(words: list[str], chain: Path, tmp_path: Path) -> None:
    """Every one of a short run, from the first folder to the end."""
    kill_before_each(words, chain, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_kills_at_any_moment_change_no_byte(name: str, chain: Path, tmp_path: Path) -> None:
    found = kill_often(CONFIGS[name], chain, tmp_path, KILLS, name)
    assert not found.wrong, "\n".join(found.wrong)
    assert found.kills.keys() == {TIME, FILE, BYTES}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_the_command_itself_is_killed(name: str, chain: Path, tmp_path: Path) -> None:
    """Each time as soon as it has trained a few steps more."""
    stage, *more = CONFIGS[name]
    words = [*words_of(stage), *more, "out=out", "hardware.save_every=1"]
    command = [str(Path(sys.executable).with_name("rlhf-cli")), stage, *words]

    def run(place: Path, steps: int | None = None) -> int:
        link(chain, place)
        log = place / "out/metrics.jsonl"
        with subprocess.Popen(command, cwd=place, stdout=DEVNULL, stderr=DEVNULL) as process:
            while process.poll() is None:
                if steps and log.exists() and len(log.read_bytes().splitlines()) >= steps:
                    process.kill()
                time.sleep(0.002)
        return process.returncode

    assert run(tmp_path / "whole") == 0
    killed = tmp_path / "killed"
    assert [run(killed, steps) for steps in (1, 2, 4)] == [-signal.SIGKILL] * 3
    assert run(killed) == 0
    assert not differences(killed, contents_of(tmp_path / "whole" / "out"))
