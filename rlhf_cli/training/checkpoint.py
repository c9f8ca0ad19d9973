"""Resume points: tensors as safetensors, everything else as JSON; no pickle.

Randomness needs no state: every draw is a function of the seed, a name and the step
(data/batches.py), so weights, optimizer moments and a few numbers are all there is to keep.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

STEP = "step-{:08d}"


def save_checkpoint(
    out: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Keep the resume point after `step`; the one before goes once this one is whole."""
    folder = out / "checkpoints"
    aside = folder / ".part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(here, aside / "tensors.safetensors")  # written from where they lie, without a copy
    (aside / "state.json").write_text(json.dumps({**state, "step": step}), encoding="utf-8")
    target = folder / STEP.format(step)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    for old in folder.glob("step-*"):
        if old != target:
            shutil.rmtree(old)


def load_checkpoint(out: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of the newest resume point; None where there is none."""
    found = sorted((out / "checkpoints").glob("step-*"))
    if not found:
        return None
    state = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
    return load_file(found[-1] / "tensors.safetensors"), state
