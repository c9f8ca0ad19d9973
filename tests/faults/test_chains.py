"""A chain of stages in a script, killed and run again: the same bytes, and nothing done twice."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL

import pytest

from tests.contents import contents_of, faults_of
from tests.tiny import DATA, rows_of, words_of

STAGES = ("sft", "reward", "ppo", "dpo", "grpo", "generate", "evaluate")
WORDS = {
    "generate": [*DATA, "algo.prompts=8", "reward=runs/demo/reward"],
    "evaluate": [*DATA, "algo.prompts=8", "algo.samples=2", "gold=length:5"],
}
SCRIPT = "script.sh"


def prepare(folder: Path) -> None:
    """A folder with rows and the script of the chain, as a user would have it."""
    folder.mkdir()
    for file, content in rows_of().items():
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{file}.jsonl").write_text(lines)
    commands = [
        shlex.join(["rlhf-cli", stage, *(WORDS[stage] if stage in WORDS else words_of(stage))])
        for stage in STAGES
    ]
    (folder / SCRIPT).write_text("\n".join(["set -euo pipefail", *commands]) + "\n")


def start(folder: Path) -> "subprocess.Popen[bytes]":
    """The script, with its stages in a process group of its own."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    command = ["bash", SCRIPT]
    return subprocess.Popen(
        command, cwd=folder, env=env, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True
    )


def kill(folder: Path, stage: str, seconds: float) -> bool:
    """Run the script and kill it so long after a stage claims its folder; False if it ends first.

    Where the folder is claimed already, the seconds count from the start of the script.
    """
    script = start(folder)
    claimed = folder / "runs/demo" / stage / "config.yaml"
    while script.poll() is None and not claimed.exists():
        time.sleep(0.002)
    with suppress(subprocess.TimeoutExpired):
        script.wait(seconds)
        return False
    os.killpg(script.pid, signal.SIGKILL)
    script.wait()
    return True


def finished(folder: Path) -> dict[str, int]:
    """stage -> when its stage.json was written, of those that have one."""
    files = {stage: folder / "runs/demo" / stage / "stage.json" for stage in STAGES}
    return {stage: file.stat().st_mtime_ns for stage, file in files.items() if file.exists()}


@pytest.mark.slow
def test_a_killed_chain_ends_with_the_same_bytes_and_does_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    prepare(whole)
    prepare(killed)
    assert start(whole).wait() == 0
    draw, done, during = random.Random(0), dict[str, int](), list[str]()
    for stage in STAGES:
        for longest in (1.0, 12.0):  # as it trains or writes, and at any time of its next run
            if not kill(killed, stage, draw.uniform(0, longest)):
                continue
            now = finished(killed)
            assert {name: now.get(name) for name in done} == done
            done = now
            during.append(next((name for name in STAGES if name not in done), "the end"))
    with capsys.disabled():
        print(f"\na chain, killed {len(during)} times during {', '.join(during)}")
    assert len(during) >= len(STAGES)
    for _ in range(2):  # to its end, and once more when all is done
        assert start(killed).wait() == 0
        now = finished(killed)
        assert set(now) == set(STAGES) and {stage: now[stage] for stage in done} == done
        done = now
    for stage in STAGES:
        out = killed / "runs/demo" / stage
        assert contents_of(out) == contents_of(whole / "runs/demo" / stage), stage
        assert not faults_of(out), stage
