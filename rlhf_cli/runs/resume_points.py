"""Resume points: tensors as safetensors, everything else as JSON; no pickle.

Randomness needs no state: every draw is a function of the seed, a name and the step
(data/order.py), so weights, optimizer moments and a few numbers are all there is to keep.

Of several ranks the first one writes, and all read, or are sent what they do not see. Where weights
are sharded, each writes its part (slices.py), and rank 0 describes all files and gives the folder
its name once they are there.
"""

import hashlib
import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_cli.config.errors import UserError
from rlhf_cli.folders.files import flush, library_errors, remove, whole_folder, write_json
from rlhf_cli.folders.integrity import Files, begins_as, described, fault_in
from rlhf_cli.folders.json_forms import COUNT, REAL, Form, misfit
from rlhf_cli.models.dtypes import name_of
from rlhf_cli.models.shards import is_sharded
from rlhf_cli.ranks.agreement import by_main, together
from rlhf_cli.ranks.world import alone, world
from rlhf_cli.reporting.console import say
from rlhf_cli.runs.begun import begun_with
from rlhf_cli.runs.lock import check_lock
from rlhf_cli.runs.out_files import resume_point, resume_points
from rlhf_cli.runs.slices import TENSORS, Wanted, are_all, fault_in_pieces, read_pieces, write_own

STATE, FILES = "state.json", "files.json"
SEAL = "seal"  # an entry of FILES beside those of files

# stages add entries of their own
_STATE: Form = {
    "step": COUNT,
    "logs": {"*": {"size": COUNT, "sha256": str}},
    "checks?": dict,
    "placed?": [COUNT],
    **{f"{name}?": REAL for name in ("seconds", "saving", "kl_coef", "old_kl_coef")},
    **{f"{name}?": COUNT for name in ("schedule", "skipped", "skipped_in_a_row")},
}


def save_checkpoint(
    out: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int
) -> None:
    """Keep the resume point after `step`, and of those before it the newest, `keep` in all.

    Every rank of several calls it, with its own parts of what is sharded. An error of one is raised
    on all, and leaves nothing.
    """
    sharded = any(map(is_sharded, tensors.values()))
    state = {**state, "step": step}
    if sharded:
        _write_shared(out, step, tensors, state)
    else:
        by_main(partial(_write, out, step, tensors, state))
    by_main(lambda: remove(list(resume_points(out).values())[:-keep]))


def _write(out: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    folder = resume_point(out, step)
    check_lock(out)
    with whole_folder(folder) as part:
        here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(here, part / TENSORS)  # written from where they lie, without a copy
        write_json(part / STATE, state)
        _seal(out, part, folder.name, described(part, (TENSORS, STATE)))


def _write_shared(out: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    folder = resume_point(out, step)
    with ExitStack() as stack:

        def begin() -> str:
            check_lock(out)
            return str(stack.enter_context(whole_folder(folder)))

        part = Path(by_main(begin))
        files = world().from_all(together(partial(_own_file, part, tensors)))

        def end() -> None:
            entries = {name: entry for own in files for name, entry in own.items()}
            if (fault := fault_in(part, entries, hashes=False)) is not None:
                raise UserError(
                    f"{fault} for rank 0, but a rank has written it: with hardware.shard, out must "
                    "be on a disk that all machines share"
                )
            write_json(part / STATE, state)
            _seal(out, part, folder.name, {**entries, **described(part, [STATE])})
            stack.close()

        by_main(end)


def _own_file(part: Path, tensors: dict[str, Tensor]) -> Files:
    """Write this rank's part; returns the description of its file."""
    with library_errors(part):
        if not part.is_dir():
            raise UserError(
                f"rank {world().rank} does not see {part}: with hardware.shard, out must be on a "
                "disk that all machines share"
            )
        name = write_own(part, tensors)
        flush(part / name)
    return described(part, [name])


def _seal(out: Path, part: Path, name: str, files: Files) -> None:
    """Describe the files of a point, once all are written."""
    write_json(part / FILES, {**files, SEAL: seal_of(out, name, files)})
    check_lock(out)  # large tensors take their time


def load_checkpoint(
    out: Path, wanted: Wanted | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of the newest resume point that is whole; None where there is none.

    One that is damaged, or whose logs have lost lines, is named and put aside: the run goes on from
    the one before.

    Args:
        wanted: name and shape of a tensor -> one that is sharded as it is to be; None: it is whole,
            as all are by default.

    Raises:
        UserError: every point that is whole goes on from log lines that are lost, or sharded
            weights cannot be read on all ranks.
        OSError: the disk does not answer; nothing is given up for that.
    """
    given_up: list[tuple[Path, str]] = []
    lost: str | None = None
    for step in by_main(lambda: [*reversed(resume_points(out))]):
        folder = resume_point(out, step)
        shared = _is_shared(folder)
        if not shared and wanted is not None:
            raise UserError(
                f"not all ranks see {folder}: with hardware.shard, out must be on a disk that all "
                "machines share"
            )
        fault = _fault(folder, shared)
        if fault is None:
            state = by_main(partial(read_state, folder))
            fault = by_main(partial(fault_in_logs, out, state))
            if fault is None:
                by_main(partial(put_aside, given_up))
                if shared:
                    return together(partial(read_tensors, folder, wanted)), state
                return _sent_by_main(folder), state
            lost = lost or f"{fault} of the first {step} steps, which the run goes on from"
            fault = f"{fault} of the first {step} steps"
        given_up.append((folder, fault))
    if lost is not None:
        raise UserError(f"{lost}; put it back, or remove {out} to start afresh")
    by_main(partial(put_aside, given_up))
    if given_up:
        say("there is none before: the run starts from its first step")
    return None


def _is_shared(folder: Path) -> bool:
    """Whether all ranks see the resume point that rank 0 sees, by the hashes of its files."""

    def listed() -> str | None:
        file = folder / FILES
        return file.read_text("utf-8", "replace") if file.is_file() else None

    seen = world().from_all(together(listed))
    return all(each == seen[0] for each in seen)


def _fault(folder: Path, shared: bool) -> str | None:
    """What is wrong with a resume point: all ranks look, or rank 0, which alone sees it."""
    if shared:
        return next(filter(None, world().from_all(together(partial(fault_of, folder)))), None)

    def of_main() -> str | None:
        with alone():
            return fault_of(folder)

    return by_main(of_main)


def _sent_by_main(folder: Path) -> dict[str, Tensor]:
    """The tensors of a resume point on a disk of rank 0's machine, on all ranks."""
    read = together(partial(world().lead, partial(read_tensors, folder, None))) or {}

    def told() -> list[tuple[str, str, list[int]]]:
        return [(name, name_of(each.dtype), [*each.shape]) for name, each in read.items()]

    forms = by_main(told)
    for name, kind, shape in forms:
        if name not in read:
            read[name] = torch.empty(shape, dtype=getattr(torch, kind))
        world().send(read[name])
    return read


def read_tensors(folder: Path, wanted: Wanted | None) -> dict[str, Tensor]:
    """The tensors of a resume point that is whole: all of each, or this rank's part."""
    if wanted is None and (folder / TENSORS).is_file():
        return load_file(folder / TENSORS)
    said = json.loads((folder / FILES).read_text(encoding="utf-8"))
    files = [folder / name for name in sorted(said.keys() - {STATE, SEAL})]
    return read_pieces(files, wanted or (lambda name, shape: None))


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
    """What is wrong with a resume point; None if it is whole, and what this run has written.

    Of several ranks each reads some of the files to the last byte, and all of them together all.
    """
    if not (folder / FILES).is_file():  # of a pipe, reading would not end
        return f"{folder / FILES} is missing"
    out = folder.parent.parent
    try:
        files = json.loads((folder / FILES).read_text(encoding="utf-8"))
        seal = files.pop(SEAL, None)
        names = files.keys() - {STATE}
        if STATE not in files or not are_all(names) or seal != seal_of(out, folder.name, files):
            return f"{folder / FILES} is damaged"
        own = sorted(files)[world().rank :: world().size]
        fault = fault_in(folder, {name: files[name] for name in own})
        if fault is None and (wrong := misfit(read_state(folder), _STATE)):
            fault = f"{folder / STATE} is damaged: {wrong}"
        if fault is None and TENSORS not in files:
            fault = fault_in_pieces([folder / name for name in names])
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
