"""The tensors of a resume point that several ranks write: each what it holds, in a file of its own.

tensors-00002-of-00008.safetensors is that of rank 2 of 8. Its header says in JSON which rows of
which tensors it has; what no rank shares with others is whole in that of rank 0. So any number of
ranks finds the rows that it needs in them, and no file but these tells how to put them together.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf_cli.models.shards import is_sharded, like, own_part, rows_of
from rlhf_cli.ranks.world import world

TENSORS = "tensors.safetensors"  # of a point that rank 0 writes alone
OF_RANK = re.compile(r"tensors-(\d{5})-of-(\d{5})\.safetensors")
ROWS = "rows"  # of the header: tensor -> the first row that is here, and how many there are in all

Wanted = Callable[[str, list[int]], Tensor | None]


def file_of(rank: int, size: int) -> str:
    """The file of one of several ranks."""
    return f"tensors-{rank:05d}-of-{size:05d}.safetensors"


def are_all(names: Collection[str]) -> bool:
    """Whether these files together hold all tensors of a point."""
    if set(names) == {TENSORS}:
        return True
    sizes = {int(match[2]) for match in map(OF_RANK.fullmatch, names) if match}
    return any(set(names) == {file_of(rank, size) for rank in range(size)} for size in sizes)


def write_own(folder: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write what this rank holds of sharded tensors, rank 0 also all others; returns the file."""
    here, rows = {}, {}
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            first, count = rows_of(tensor)
            if not count or not _holds_first(tensor):
                continue
            rows[name] = [first, len(tensor)]
        elif not world().is_main:
            continue
        here[name] = own_part(tensor.detach()).cpu().contiguous()
    name = file_of(world().rank, world().size)
    save_file(here, folder / name, {ROWS: json.dumps(rows)})
    return name


def _holds_first(tensor: Tensor) -> bool:
    """Whether no lower rank holds the same rows, as where machines hold copies."""
    own: Any = tensor
    places = zip(own.placements, own.device_mesh.get_coordinate(), strict=True)
    return not any(place.is_replicate() and coordinate for place, coordinate in places)


# --------------------------------------------------------------------------- reading


class Pieces:
    """The tensors of some files, and where which rows of them are."""

    def __init__(self, opened: Mapping[Path, Any]) -> None:
        """`opened`: what `opened_files` gives."""
        self._opened = opened
        self._at: dict[str, list[tuple[int, int, Path]]] = {}  # first row, end, file
        self._forms: dict[str, tuple[list[int], str]] = {}  # shape and type
        for file, stored in opened.items():
            rows = json.loads((stored.metadata() or {}).get(ROWS, "{}"))
            for name in stored.keys():  # noqa: SIM118 - a safetensors file is no dict
                part = stored.get_slice(name)
                here = list(part.get_shape())
                first, height = rows.get(name, (0, here[0] if here else 1))
                end = first + (here[0] if here else 1)
                self._at.setdefault(name, []).append((first, end, file))
                form = ([height, *here[1:]] if here else [], part.get_dtype())
                if self._forms.setdefault(name, form) != form:
                    raise ValueError(f"{name} has another shape or type in {file.name}")
        for places in self._at.values():
            places.sort(key=lambda place: place[:2])

    def fault(self) -> str | None:
        """A tensor that is not there once, with all its rows; None if there is none."""
        for name, places in self._at.items():
            shape, _ = self._forms[name]
            reached = 0
            for first, end, file in places:
                if first != reached:
                    return f"{file}: row {min(first, reached)} of {name} is not there once"
                reached = end
            if reached != (shape[0] if shape else 1):
                return f"{places[-1][2]}: row {reached} of {name} is not there"
        return None

    def read(self, wanted: Wanted) -> dict[str, Tensor]:
        """Each tensor: whole, or of one that is to be sharded as another the rows of this rank."""
        tensors = {}
        for name, (shape, _) in self._forms.items():
            target = wanted(name, shape)
            if target is None or not is_sharded(target):
                tensors[name] = self._rows(name, 0, shape[0] if shape else 1)
            else:
                first, count = rows_of(target)
                part = self._rows(name, first, first + count)
                tensors[name] = like(target, part.to(own_part(target).device))
        return tensors

    def _rows(self, name: str, first: int, end: int) -> Tensor:
        """(end - first, ...) some rows of a tensor, on the CPU."""
        parts = []
        for start, stop, file in self._at[name]:
            low, high = max(first, start), min(end, stop)
            if (low, high) == (start, stop):
                parts.append(self._opened[file].get_tensor(name))
            elif low < high:
                parts.append(self._opened[file].get_slice(name)[low - start : high - start])
        if not parts:  # a rank that holds none
            return self._opened[self._at[name][0][2]].get_slice(name)[:0]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@contextmanager
def opened_files(files: Iterable[Path]) -> Iterator[dict[Path, Any]]:
    """Files of tensors, open."""
    with ExitStack() as stack:
        yield {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}


def fault_in_pieces(files: Collection[Path]) -> str | None:
    """What keeps tensors from being put together of these files; None if nothing does."""
    try:
        with opened_files(files) as opened:
            return Pieces(opened).fault()
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        return f"{min(files).parent}: no tensors: {error}"


def read_pieces(files: Iterable[Path], wanted: Wanted) -> dict[str, Tensor]:
    """The tensors of files that have no fault."""
    with opened_files(files) as opened:
        return Pieces(opened).read(wanted)
