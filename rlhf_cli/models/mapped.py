"""A folder's weights in float32 as files that all ranks of a machine map.

Models are loaded in float32. Of files in that type the weights of a loaded model are the pages of
the file, which take no memory of a process and are there once for all of them. Of another type each
process would have a copy of its own, of the whole model, though it is to keep but a part. So the
first rank of a machine writes such files, the others wait for them, and all map them.
"""

import json
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf_cli.folders.cached import folder_of
from rlhf_cli.folders.manifest import numbers_by_type, read_header, weight_files
from rlhf_cli.models.dtypes import WRITTEN
from rlhf_cli.ranks.world import world
from rlhf_cli.reporting.console import say

INDEX = "model.safetensors.index.json"
AT_ONCE = 2**26  # numbers of a file, so that few are in memory; more of one large tensor

_written: set[Path] = set()


@contextmanager
def mapped(path: str) -> Iterator[str]:
    """A folder to load a model from within this block; what is loaded stays after it.

    It is `path` itself but for sharded runs, whose ranks of a machine share float32 files in the
    folder for temporary files, if there is room.

    Args:
        path: a folder, or a hub id.
    """
    folder = folder_of(path)
    types = numbers_by_type(folder) if world().mesh is not None else {}
    others = types.keys() - {"F32"}
    if not others & WRITTEN.keys() or others - WRITTEN.keys():
        yield path
        return
    token = world().from_main(secrets.token_hex(8))
    place = Path(tempfile.gettempdir()) / f"rlhf-cli-float32-{token}"
    leads = world().local_rank == 0
    if leads:
        _written.add(place)
    try:
        fault = ""
        if leads:
            try:
                _write(folder, place)
            except (OSError, SafetensorError) as error:
                fault = str(error)
        if world().any(bool(fault)):
            if leads:
                shutil.rmtree(place, ignore_errors=True)  # there may be little room
            if fault:
                say(f"note: each process loads all of {path} into memory, as {place}: {fault}")
            yield path
        else:
            yield str(place)
            world().barrier("all to have loaded a model")
    finally:
        if leads:
            shutil.rmtree(place, ignore_errors=True)
            _written.discard(place)


def remove_written() -> None:
    """Remove what this process has written and has not removed yet, where a signal ends it."""
    for place in list(_written):
        shutil.rmtree(place, ignore_errors=True)


def _write(folder: Path, place: Path) -> None:
    """The files of a model folder in another one, its weights in float32.

    Raises:
        OSError, SafetensorError: there is no room, or they cannot be read.
    """
    place.mkdir(mode=0o700)
    files = weight_files(folder)
    for file in folder.iterdir():
        if file not in files and file.name != INDEX:
            (place / file.name).symlink_to(file.resolve())
    where: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(where.values())) + 1:05}.safetensors"
        save_file(tensors, place / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, name))
        tensors.clear()

    for file in files:
        with safe_open(file, framework="pt") as opened:
            held: Any = opened
            for name in read_header(file)[1]:
                value = held.get_tensor(name).to(torch.float32, copy=True)
                if tensors and sum(map(torch.numel, [*tensors.values(), value])) > AT_ONCE:
                    flush()
                tensors[name] = value
    flush()
    index = {"metadata": {}, "weight_map": where}
    (place / INDEX).write_text(json.dumps(index), encoding="utf-8")
