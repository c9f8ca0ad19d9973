"""A stage in a process of its own that dies at a given moment, as by `kill -9`.

Processes are forked from a server that has imported the stages already, so that a run of a tiny
model takes a fraction of a second. The server has run no tensor operation and started no thread.
"""

import gc
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import vl_convert

from rlhf_cli.config.compose import compose
from rlhf_cli.config.schema.stages import Run
from rlhf_cli.config.stages import stage_name
from rlhf_cli.stages import dpo, evaluate, generate, grpo, ppo, reward, sft
from tests.contents import contents_of, faults_of
from tests.tiny import DATA, words_of

FORKED = multiprocessing.get_context("forkserver")
# what stages import where they need it would be imported anew by every process
LATE = ["peft", "transformers.models.llama.modeling_llama", "altair"]
LATE += ["sacrebleu", "rouge_score.rouge_scorer"]  # where they are installed
FORKED.set_forkserver_preload(["__main__", __name__, *LATE])
STAGES: dict[str, Any] = {
    "sft": sft,
    "reward": reward,
    "dpo": dpo,
    "ppo": ppo,
    "grpo": grpo,
    "generate": generate,
    "evaluate": evaluate,
}
TOUCHES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
GROUPS = ["policy=runs/demo/sft", "hardware.rollout_tokens=16", "reward=runs/demo/reward"]
SAMPLING = {
    "generate": [*GROUPS, "algo.prompts=9"],
    "evaluate": [
        *(*GROUPS, "algo.prompts=4", "algo.samples=2", "gold=length:5"),
        "baselines=[runs/demo/adapter]",
    ],
}
TIME, FILE, BYTES = "at a time", "before a file operation", "inside a write"
IN_A_ROW = 6  # kills of one run, at most, before it may end
SECONDS = 60.0  # of a run that hangs


class Failed(Exception):
    """A run that ended or died otherwise than it was told to."""


@dataclass(frozen=True)
class Death:
    """When a process dies.

    seconds: after it started.
    touch: before this file operation inside the run's place, counted from 1.
    size: with `touch`: from there on, in the write that makes any file longer than this, of bytes.
    """

    seconds: float = SECONDS
    touch: int | None = None
    size: int | None = None

    @property
    def kind(self) -> str:
        """What the summary counts it under."""
        if self.touch is None:
            return TIME
        return FILE if self.size is None else BYTES


@dataclass
class Life:
    """What an uninterrupted run was like: its length, its file operations, its largest file."""

    seconds: float
    touches: int
    largest: int


@dataclass
class Found:
    """What the kills of one config came to.

    kills: by kind.
    runs: that were killed and went on, to their end.
    wrong: how folders that were killed differ from the one that was not.
    """

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    wrong: list[str] = field(default_factory=list)


def kill_often(words: list[str], chain: Path, place: Path, count: int, seed: str) -> Found:
    """Run a stage once to its end, then kill others like it `count` times and compare them.

    Each run is killed a few times in a row and started again by the same config until it ends.

    Args:
        words: the stage and its overrides; paths are relative to `chain`.
        place: an empty folder; each run has a folder in it, with links to what is in `chain`.
    """
    cfg = config(words)
    whole, found, draw = place / "whole", Found(), random.Random(seed)
    kinds = cycle((TIME, FILE, BYTES, FILE))
    life = lived(cfg, chain, whole)
    found.wrong += [f"whole: {fault}" for fault in faults_of(whole / "out")]
    expected = contents_of(whole / "out")
    while found.kills.total() < count and not found.wrong:
        found.runs += 1
        killed, deaths, left = place / str(found.runs), list[Death](), 1.0
        row = min(draw.randint(1, IN_A_ROW), count - found.kills.total())
        try:
            while len(deaths) < row:
                share = draw.uniform(0, left)
                death = drawn(next(kinds), draw, life, share)
                if not attempt(cfg, chain, killed, death):
                    break
                deaths.append(death)
                left -= share
            else:
                attempt(cfg, chain, killed, Death())
            wrong = differences(killed, expected)
        except Failed as failed:
            wrong = [str(failed)]
        found.kills.update(death.kind for death in deaths)
        found.wrong += [f"{killed}, after {deaths}: {each}" for each in wrong]
    return found


def config(words: list[str]) -> Run:
    """Of a stage that saves after every step, or keeps what it samples group by group."""
    stage, *more = words
    if stage in SAMPLING:
        return compose(stage, [*DATA, *SAMPLING[stage], *more, "out=out"])
    return compose(stage, [*words_of(stage), *more, "out=out", "hardware.save_every=1"])


def drawn(kind: str, draw: random.Random, life: Life, share: float) -> Death:
    """A moment after a share of an uninterrupted run; a resumed one may end before it."""
    if kind == TIME:
        return Death(seconds=life.seconds * share)
    touch = 1 + int(life.touches * share)
    return Death(touch=touch, size=None if kind == FILE else draw.randrange(life.largest))


def differences(place: Path, expected: dict[str, Any]) -> list[str]:
    """Names of what is not as it was in the uninterrupted run, or should not be there at all."""
    found = contents_of(place / "out")
    ours = ("out", "life.json")
    beside = [each.name for each in place.iterdir() if not each.is_symlink() | (each.name in ours)]
    names = sorted(expected.keys() | found.keys())
    wrong = [name for name in names if expected.get(name) != found.get(name)]
    return [
        *(f"other {name}" for name in wrong),
        *(f"leaves {name} beside out" for name in beside),
        *faults_of(place / "out"),
    ]


def lived(cfg: Run, chain: Path, place: Path) -> Life:
    """Run to the end, undisturbed."""
    assert not attempt(cfg, chain, place, Death())
    return Life(**json.loads((place / "life.json").read_text()))


def link(chain: Path, place: Path) -> None:
    """Make a folder where the paths of `chain` hold, unless it is there."""
    if not place.exists():
        place.mkdir(parents=True)
        for each in chain.iterdir():
            (place / each.name).symlink_to(each)


def attempt(cfg: Run, chain: Path, place: Path, death: Death) -> bool:
    """Run the stage in `place`, where it writes `out`, until it ends or dies; True where it died.

    Raises:
        Failed: it failed, hung, or died otherwise; with its traceback.
    """
    link(chain, place)
    process = FORKED.Process(target=live, args=(cfg, place, death))
    process.start()
    process.join(death.seconds)
    overdue = process.exitcode is None
    if overdue:
        process.kill()
        process.join()
    if process.exitcode == 0:
        return False
    dies = -signal.SIGXFSZ if death.size is not None else -signal.SIGKILL
    if death == Death() or process.exitcode != dies or overdue != (death.kind == TIME):
        told = place / "failed"
        raise Failed(told.read_text() if told.exists() else f"status {process.exitcode}")
    return True


def live(cfg: Run, place: Path, death: Death) -> None:
    """In the forked process: run the stage, and die where it is told to."""
    began = time.monotonic()
    gc.freeze()  # what the server made never dies
    os.chdir(place)
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(quiet, stream)
    # the engine that draws takes a second to start, in each process anew
    vl_convert.vegalite_to_png = lambda spec, **_: json.dumps(spec).encode()
    touches = watch_files(place, death)
    try:
        STAGES[stage_name(cfg)].run(cfg)
    except BaseException:
        (place / "failed").write_text(traceback.format_exc())
        raise
    largest = max(file.stat().st_size for file in Path("out").rglob("*") if file.is_file())
    life = Life(time.monotonic() - began, len(touches), largest)
    (place / "life.json").write_text(json.dumps(asdict(life)))


def watch_files(place: Path, death: Death) -> list[str]:
    """Note file operations inside `place`, and die at the one that was drawn; returns them."""
    touches: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in TOUCHES or isinstance(args[0], int):
            return
        if event == "open" and not args[2] & WRITING:
            return
        file = os.fsdecode(args[0])
        if os.path.isabs(file) and not file.startswith(str(place)):
            return  # a library's own; relative names are in the folder that the stage runs in
        touches.append(f"{event} {file}")
        if len(touches) == death.touch:
            die(death.size)

    sys.addaudithook(hook)
    return touches


def die(size: int | None) -> None:
    """Now, or in the write that makes a file longer than `size` bytes: what fits is written."""
    if size is None:
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python would make an OSError of it
