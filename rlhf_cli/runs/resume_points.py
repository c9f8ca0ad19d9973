"""Resume points: tensors as safetensors, everything else as JSON; no pickle.

Randomness needs no state: every draw is a function of the seed, a name and the step
(data/order.py), so weights, optimizer moments and a few numbers are all there is to keep.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_cli.config.errors import UserError
from rlhf_cli.folders.files import remove, whole_folder, write_json
from rlhf_cli.folders.integrity import Files, begins_as, described, fault_in
from rlhf_cli.folders.json_forms import COUNT, REAL, Form, misfit
from rlhf_cli.reporting.console import say
from rlhf_cli.runs.lock import check_lock
from rlhf_cli.runs.out_folder import begun_with, resume_point, resume_points

TENSORS, STATE, FILES = "tensors.safetensors", "state.json", "files.json"
SEAL = "seal"  # an entry of FILES beside those of files

# stages add entries of their own
_STATE: Form = {
    "step": COUNT,
    "logs": {"*": {"size": COUNT, "sha256": str}},
    "checks?": dict,
    **{f"{name}?": REAL for name in ("seconds", "saving", "kl_coef", "old_kl_coef")},
    **{f"{name}?": COUNT for name in ("schedule", "skipped", "skipped_in_a_row")},
}


def save_checkpoint(
    out: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int
) -> None:
    """Keep the resume point after `step`, and of those before it the newest, `keep` in all."""
    folder = resume_point(out, step)
    check_lock(out)
    with whole_folder(folder) as part:
        here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(here, part / TENSORS)  # written from where they lie, without a copy
        write_json(part / STATE, {**state, "step": step})
        files = described(part, (TENSORS, STATE))
        write_json(part / FILES, {**files, SEAL: seal_of(out, folder.name, files)})
        check_lock(out)  # large tensors take their time
    remove(list(resume_points(out).values())[:-keep])


def load_checkpoint(out: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of the newest resume point that is whole; None where there is none.

    One that is damaged, or whose logs have lost lines, is named and put aside: the run goes on from
    the one before.

    Raises:
        UserError: every point that is whole goes on from log lines that are lost.
        OSError: the disk does not answer; nothing is given up for that.
    """
    given_up: list[tuple[Path, str]] = []
    lost: str | None = None
    for step, folder in reversed(resume_points(out).items()):
        fault = fault_of(folder)
        if fault is None:
            state = read_state(folder)
            fault = fault_in_logs(out, state)
            if fault is None:
                put_aside(given_up)
                return load_file(folder / TENSORS), state
            lost = lost or f"{fault} of the first {step} steps, which the run goes on from"
            fault = f"{fault} of the first {step} steps"
        given_up.append((folder, fault))
    if lost is not None:
        raise UserError(f"{lost}; put it back, or remove {out} to start afresh")
    put_aside(given_up)
    if given_up:
        say("there is none before: the run starts from its first step")
    return None


def put_aside(points: list[tuple[Path, str]]) -> None:
    """Name resume points that are given up, newest first, and keep them out of the way."""
    for folder, fault in points:
        say(f"{fault}; this resume point is given up for the one before")
        damaged = folder.with_name(f".damaged-{folder.name}")
        remove([damaged])
        folder.rename(damaged)


def fault_in_logs(out: Path, state: dict[str, Any]) -> str | None:
    """Which log does not begin as a resume point has it; None if all do."""
    for name, entry in state["logs"].items():
        if not begins_as(out / name, entry):
            return f"{out / name} has lost or changed lines"
    return None


def fault_of(folder: Path) -> str | None:
    """What is wrong with a resume point; None if it is whole, and what this run has written."""
    if not (folder / FILES).is_file():  # of a pipe, reading would not end
        return f"{folder / FILES} is missing"
    out = folder.parent.parent
    try:
        files = json.loads((folder / FILES).read_text(encoding="utf-8"))
        seal = files.pop(SEAL, None)
        if {TENSORS, STATE} != set(files) or seal != seal_of(out, folder.name, files):
            return f"{folder / FILES} is damaged"
        fault = fault_in(folder, files)
        if fault is None and (wrong := misfit(read_state(folder), _STATE)):
            fault = f"{folder / STATE} is damaged: {wrong}"
        return fault
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{folder / FILES} is damaged"


def read_state(folder: Path) -> Any:
    """What state.json holds."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def seal_of(out: Path, name: str, files: Files) -> str:
    """A hash of what a resume point holds, which step it is of, and what its run is made from.

    So a point of another step or run is none of this one, nor one whose files were described anew.
    """
    text = json.dumps([name, files, begun_with(out)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
