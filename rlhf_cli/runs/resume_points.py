"""Resume points: tensors as safetensors, everything else as JSON; no pickle.

Randomness needs no state: every draw is a function of the seed, a name and the step
(data/order.py), so weights, optimizer moments and a few numbers are all there is to keep.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_cli.config.errors import UserError
from rlhf_cli.folders.files import whole_folder, write_json
from rlhf_cli.folders.integrity import begins_as, described, fault_in
from rlhf_cli.reporting.console import say
from rlhf_cli.runs.lock import check_lock
from rlhf_cli.runs.out_folder import resume_point, resume_points

TENSORS, STATE, FILES = "tensors.safetensors", "state.json", "files.json"


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
        write_json(part / FILES, described(part, (TENSORS, STATE)))
        check_lock(out)  # large tensors take their time
    for old in list(resume_points(out).values())[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(out: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of the newest resume point that is whole; None where there is none.

    One that is damaged is named and put aside: the run goes on from the one before.

    Raises:
        UserError: a log has lost lines that the run goes on from.
        OSError: the disk does not answer; nothing is given up for that.
    """
    for step, folder in reversed(resume_points(out).items()):
        fault = fault_of(folder)
        if fault is None:
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            for name, entry in state["logs"].items():
                if not begins_as(out / name, entry):
                    raise UserError(
                        f"{out / name} has lost or changed lines of the first {step} steps, which "
                        f"the run goes on from; put it back, or remove {out} to start afresh"
                    )
            return load_file(folder / TENSORS), state
        say(f"{fault}; this resume point is given up for the one before")
        damaged = folder.with_name(f".damaged-{folder.name}")
        shutil.rmtree(damaged, ignore_errors=True)
        folder.rename(damaged)
        if not resume_points(out):
            say("there is none before: the run starts from its first step")
    return None


def fault_of(folder: Path) -> str | None:
    """What is wrong with a resume point; None if it is whole."""
    try:
        files = json.loads((folder / FILES).read_text(encoding="utf-8"))
        named = {TENSORS, STATE} == set(files)
        return fault_in(folder, files) if named else f"{folder / FILES} is damaged"
    except FileNotFoundError:
        return f"{folder / FILES} is missing"
    except (ValueError, TypeError, KeyError):
        return f"{folder / FILES} is damaged"
