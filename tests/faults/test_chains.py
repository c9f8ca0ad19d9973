"""A chain of stages in a script, killed and run again: the same bytes, and nothing done twice."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL

import pytest

from rlhf_cli.config.catalog import shipped
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


def kill(folder: Path, file: str, seconds: float) -> bool:
    """Run the script and kill it so long after a file is there; False if it ends first.

    Where the file is there already, the seconds count from the start of the script.
    """
    script = start(folder)
    while script.poll() is None and not (folder / file).exists():
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
            if not kill(killed, f"runs/demo/{stage}/config.yaml", draw.uniform(0, longest)):
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


# --------------------------------------------------------------------------- rounds

ROUNDS = {
    "POLICY": "runs/demo/sft",
    "DATA": "data=jsonl data.path=rows.jsonl",
    "ROUNDS": "2",
    "HELD_OUT": "0.3",
    "COMMON": "hardware.threads=1",
    "LABEL": "source=reward reward=runs/demo/reward algo.prompts=20 algo.temperature=1.2",
    "REWARD": "algo.batch_size=8 algo.epochs=12 algo.lr=1e-2 algo.warmup_steps=1 "
    "algo.eval_every=100 data.long_responses=cut",
    "PPO": "algo.steps=4 algo.batch_size=8 algo.minibatch_size=8 algo.lr=1e-3 algo.value_lr=1e-2 "
    "algo.warmup_steps=1 hardware.save_every=1",
    "EVALUATE": "gold=length:2 algo.prompts=8 algo.samples=2",
}
MOMENTS = (
    ("round1/label/tasks.jsonl", 0.0),  # sampled, and labelled next
    ("round1/evaluate/stage.json", 0.0),  # before the line that reads it
    ("round2/label/stage.json", 0.5),  # between two lines, or as the next one starts
)


def prepare_rounds(folder: Path, chain: Path) -> None:
    """A folder with a policy, prompts and a script that starts the recipe."""
    shutil.copytree(chain, folder)
    lines = [f"export {name}={shlex.quote(value)}" for name, value in ROUNDS.items()]
    recipe = shlex.quote(str(shipped("recipes") / "online.sh"))
    (folder / SCRIPT).write_text("\n".join([*lines, f"exec bash {recipe}"]) + "\n")


@pytest.mark.slow
def test_killed_rounds_end_with_the_same_bytes(chain: Path, tmp_path: Path) -> None:
    """What a round reads of the ones before, and which policy it labels, are as they were."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    prepare_rounds(whole, chain)
    prepare_rounds(killed, chain)
    assert start(whole).wait() == 0
    for file, seconds in MOMENTS:
        assert kill(killed, f"runs/online/{file}", seconds), file
    assert start(killed).wait() == 0
    ours, theirs = (
        {
            file.parent.relative_to(folder): contents_of(file.parent)
            for file in (folder / "runs/online").rglob("stage.json")
        }
        for folder in (whole, killed)
    )
    assert len(ours) == 8 and ours.keys() == theirs.keys()
    for place, content in ours.items():
        assert theirs[place] == content, place
        assert not faults_of(killed / place), place
