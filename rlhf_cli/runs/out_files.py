"""What lies where in the `out` folder of a stage: resume points, snapshots, what is kept."""

import re
from contextlib import suppress
from pathlib import Path

from rlhf_cli.folders.files import PART, remove
from rlhf_cli.folders.manifest import read_manifest

CONFIG = "config.yaml"
HEADER = "# rlhf"  # how the first line of our own config.yaml begins
STAGING = ".staging"
CHECKPOINTS = "checkpoints"
INPUTS = f"{CHECKPOINTS}/inputs.json"
TASKS = "tasks.jsonl"  # what label asks, once it is sampled
# rows that it seals
LABELS = ("rankings.jsonl", "preferences.jsonl", "feedback.jsonl", "stepwise.jsonl")
RECORDS = (INPUTS, f"{CHECKPOINTS}/inputs.copy.json")  # a damaged one costs no run
BEGUN = (*RECORDS, TASKS)  # tasks do without a record: what was labelled of them is not lost
# responses and what judges say of them, as an unfinished stage that does not train has made them
SAMPLES = "samples.jsonl"
BUDGET = f"{CHECKPOINTS}/budget.json"  # what hardware's auto meant
TRACKED = f"{CHECKPOINTS}/tracked"  # by which trackers know an unfinished run again
ROLLOUTS = f"{CHECKPOINTS}/rollouts"  # weights on their way to a server, and its log
KEPT, KEPT_SCORES = f"{CHECKPOINTS}/{SAMPLES}", f"{CHECKPOINTS}/scores.jsonl"
PROGRESS = f"{CHECKPOINTS}/progress.json"  # for who watches it
STEP = re.compile(r"step-(\d+)")
TRASH = ".trash"


def is_claimed(out: Path) -> bool:
    """Whether a stage has written, or begun to write, this folder."""
    saved = out / CONFIG
    return saved.is_file() and saved.read_bytes().startswith(HEADER.encode())


def resume_point(out: Path, step: int) -> Path:
    """The folder of what is resumed from after a step."""
    return out / CHECKPOINTS / f"step-{step:08d}"


def resume_points(out: Path) -> dict[int, Path]:
    """The resume points of an out folder by step, oldest first."""
    points = {
        int(match[1]): folder
        for folder in (out / CHECKPOINTS).glob("step-*")
        if (match := STEP.fullmatch(folder.name))
    }
    return dict(sorted(points.items()))


def newest_step(out: Path) -> int | None:
    """The step of the newest resume point; None where there is none."""
    return max(resume_points(out), default=None)


def snapshot(out: Path, step: int, last: int) -> Path:
    """The folder of the policy as it is after a step of a run.

    Args:
        last: the step that the run is planned to end with, which has all the digits that there are:
            names stand in the order of the steps.
    """
    return out / f"step-{step:0{len(str(last))}d}"


def drop_snapshots(out: Path, after: int) -> None:
    """Remove those of later steps, which a run that goes on from a step makes anew: it may have
    been given another length, by which names have other digits.
    """
    for folder in out.glob("step-*"):
        if (match := STEP.fullmatch(folder.name)) and int(match[1]) > after:
            remove([folder])
    remove(out.glob(f".step-*{PART}"))  # of a run that was killed as it wrote one


def snapshot_step(folder: Path) -> int | None:
    """After which step of its run a policy was kept; None of any other folder."""
    if not is_claimed(folder.parent):
        return None
    step: int | None = (read_manifest(folder) or {}).get("step")
    return step


def what_is_kept(out: Path) -> str | None:
    """In words what an unfinished run goes on from; None where there is nothing."""
    if (step := newest_step(out)) is not None:
        return f"step {step}"
    for file, what in ((out / TASKS, "tasks"), (out / KEPT, "samples")):
        with suppress(OSError), file.open("rb") as stream:
            if count := sum(1 for _ in stream):
                return f"{count} {what}"
    return None
