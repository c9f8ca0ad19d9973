"""Which files a path stands for, and their rows as plain objects, one at a time.

A path is a file, a folder, a pattern as `data/*.jsonl`, a list of those, a dataset of the hub, or
standard input. A folder is read with the folders in it; one that has a train split and a validation
or test split has held-out rows of its own.
"""

import glob
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.hub import HubName, hub_held_out, hub_name, read_hub
from rlhf_cli.data.parse import PACKED, SUFFIXES, rows_of_file, suffix_of
from rlhf_cli.data.raw import Raw, RowError
from rlhf_cli.data.stdin import STDIN, read_stdin

Paths = str | Path | list[str]

TRAIN, HELD_OUT = "train", "held out"
# What names a split in the name of a file or folder; held-out rows are those of the first there is.
SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
# Beside data, and never rows.
ABOUT = re.compile(
    r"(readme|license|licence|notice|citation|changelog)\b.*|_success|.*\.(crc|md5|sha256)"
    r"|(dataset_infos?|dataset_dict|state)\.json",
    re.IGNORECASE,
)
SAVED = ("state.json", "dataset_info.json")  # what `datasets` writes beside a dataset on disk
MAPPED = "cache-"  # how it calls what it computed from that dataset
RUN = ("config.yaml", b"# rlhf")  # what a run begins with writing, and how that begins
MOST_NAMES = 5  # in a line


@dataclass
class Found:
    """The files that a path stands for: those to train on, to hold out, and what is not read."""

    train: list[Path] = field(default_factory=list)
    held_out: list[Path] = field(default_factory=list)
    unused: list[Path] = field(default_factory=list)

    def add(self, other: "Found") -> None:
        """Those of another path too, after these."""
        self.train += other.train
        self.held_out += other.held_out
        self.unused += other.unused


def read_raw(
    path: Paths, limit: int | None = None, streaming: bool = False
) -> Iterator[tuple[Raw | RowError, str]]:
    """Each row as a dict, with `file:line`, up to a number of them; of a split folder those to
    train on.

    A row that cannot be read comes as its error, and those after it are read.

    Raises:
        UserError: there is no such file or dataset, or it is not one of rows.
    """
    return islice(_read(path, streaming), limit)


def _read(path: Paths, streaming: bool) -> Iterator[tuple[Raw | RowError, str]]:
    if str(path) == STDIN:
        yield from read_stdin()
    elif (name := hub_of(path)) is not None:
        yield from read_hub(name, streaming)
    else:
        for file in files_of(path):
            yield from rows_of_file(file)


def hub_of(path: Paths) -> HubName | None:
    """The dataset of the hub that a path names, if nothing says that a local one is meant."""
    if not isinstance(path, str) or (name := hub_name(path)) is None:
        return None
    meant = path.startswith("runs/") or suffix_of(Path(name.repo)) in SUFFIXES
    return None if meant or Path(name.repo).parent.exists() or is_there(path) else name


def is_local(path: Paths) -> bool:
    """Whether a path stands for files of this machine: neither the hub nor standard input."""
    return str(path) != STDIN and hub_of(path) is None


def is_there(place: str) -> bool:
    """Whether there is a file or folder of this name, or one that fits the pattern."""
    whole = os.path.expanduser(place)
    return os.path.exists(whole) or (glob.has_magic(whole) and bool(_matches(whole)))


def shown_path(path: Paths) -> str:
    """A path as messages name it."""
    return ", ".join(path) if isinstance(path, list) else str(path)


def files_of(path: Paths, split: str = TRAIN) -> list[Path]:
    """The local files that a path stands for, in the order in which they are read.

    Args:
        split: TRAIN, or HELD_OUT for the held-out ones of folders that have both.

    Raises:
        UserError: there is no such file, no data in a folder, or one file twice.
    """
    found = find(path)
    return found.train if split == TRAIN else found.held_out


def held_out_files_of(path: Paths) -> list[Path]:
    """The files of the validation or else the test split; none but of folders that have splits."""
    return files_of(path, HELD_OUT)


def held_out_of(path: Paths, eval_path: Paths | None) -> Paths | None:
    """Where the held-out rows of a source are: as it is said, or in a split of its own.

    None where rows are to be held out of the path itself.
    """
    asked = path if eval_path is None else eval_path
    if (name := hub_of(asked)) is not None and eval_path is None:
        held_out = hub_held_out(name)
        return None if held_out is None else str(held_out)
    if not is_local(asked):
        return eval_path
    return [str(file) for file in held_out_files_of(asked)] or eval_path


def about_files(path: Paths, held_out: bool) -> list[str]:
    """Lines on what is read of a path and what is not, where that is not plain from the path.

    Args:
        held_out: whether its held-out files are read too.
    """
    found, name, lines = find(path), shown_path(path), []
    folder = os.path.expanduser(name)
    unused = found.unused
    if found.held_out and held_out:
        train, others = _few(found.train, folder), _few(found.held_out, folder)
        lines.append(f"{name}: {train} to train on, {others} held out")
    else:
        unused = found.held_out + unused
    if unused:
        lines.append(f"{name}: not read: {_few(unused, folder)}")
    return lines


def _few(files: list[Path], folder: str | Path) -> str:
    """The first of some files, as they are called in a folder, and how many more there are."""
    more = len(files) - MOST_NAMES
    names = ", ".join(
        str(file.relative_to(folder) if file.is_relative_to(folder) else file)
        for file in files[:MOST_NAMES]
    )
    return names + (f" and {more} more" if more > 0 else "")


def find(path: Paths) -> Found:
    """The files that a path stands for, of both splits, and what is beside them.

    Raises:
        UserError: there is no such file, no data in a folder, or one file twice.
    """
    if not path:
        raise UserError("a path to rows is empty")
    found = Found()
    for place in path if isinstance(path, list) else [path]:
        try:
            found.add(_found(str(place)))
        except OSError as error:
            raise UserError(f"{place}: cannot be read: {error.strerror}") from None
    refuse_twins(found.train + found.held_out)
    return found


def _found(place: str) -> Found:
    whole = os.path.expanduser(place)
    if os.path.isdir(whole):
        return _found_in(Path(whole))
    if os.path.exists(whole):
        return Found([Path(whole)])
    if not glob.has_magic(whole):
        raise UserError(f"no such file: {place}")
    found = Found()
    for each in _matches(whole):
        if each.is_dir():
            found.add(_found_in(each))
        elif each.is_file() and not ABOUT.fullmatch(each.name):
            found.train.append(each)
    if not found.train:
        raise UserError(f"no file fits {place}")
    return found


def _matches(pattern: str) -> list[Path]:
    return sorted(map(Path, glob.glob(pattern, recursive=True)))


def _found_in(folder: Path) -> Found:
    """The data of a folder, split as the names say."""
    data, others = _walk(folder, set())
    if not data:
        ends = ", ".join(SUFFIXES)
        there = f"; it has {_few(others, folder)}" if others else ""
        raise UserError(f"{folder}: no {ends} file in this folder{there}")
    splits: dict[str | None, list[Path]] = {}
    for file in data:
        splits.setdefault(split_of(file.relative_to(folder)), []).append(file)
    train = splits.get("train") or splits.get(None)
    held_out = splits.get("validation") or splits.get("test")
    if not train or not held_out:
        return Found(data, [], others)
    used = {*train, *held_out}
    return Found(train, held_out, [*(file for file in data if file not in used), *others])


def split_of(file: Path) -> str | None:
    """The split that a file belongs to by its name, or that of the innermost folder around it."""
    for part in reversed(file.parts):
        words = set(re.findall("[a-z]+", part.lower()))
        named = [split for split, names in SPLITS.items() if names & words]
        if named:
            return named[0] if len(named) == 1 else None
    return None


def _walk(folder: Path, seen: set[str]) -> tuple[list[Path], list[Path]]:
    """The data files in a folder and the folders in it, and the others that are there.

    Args:
        seen: folders that were looked through, since links may lead back to them.
    """
    seen.add(os.path.realpath(folder))
    data: list[Path] = []
    others: list[Path] = []
    saved = _saved_in(folder)
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if os.path.realpath(entry) in seen:
                continue
            if _is_run(entry):
                others.append(entry)
                continue
            inside = _walk(entry, seen)
            data += inside[0]
            others += inside[1]
        elif entry.is_file() and not ABOUT.fullmatch(entry.name):  # a pipe never ends
            is_data = suffix_of(entry) in SUFFIXES and not entry.name.startswith(MAPPED)
            if entry in saved if saved is not None else is_data:
                data.append(entry)
            else:
                others.append(entry)
    return data, others


def _is_run(folder: Path) -> bool:
    """Whether a stage has written a folder: its logs and samples are nobody's rows unasked."""
    name, start = RUN
    try:
        with (folder / name).open("rb") as stream:
            return stream.read(len(start)) == start
    except OSError:
        return False


def _saved_in(folder: Path) -> list[Path] | None:
    """The files of a dataset that `datasets` saved to a folder; None where that is none.

    Raises:
        UserError: one is missing, or the rows are not those of the files.
    """
    if not all((folder / name).is_file() for name in SAVED):
        return None
    try:
        state: Any = json.loads((folder / SAVED[0]).read_text(encoding="utf-8"))
        files = [folder / each["filename"] for each in state["_data_files"]]
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{folder / SAVED[0]}: names no files of a dataset") from None
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(
            f"{folder}: a choice of the rows of its files; save it again with "
            "dataset.flatten_indices().save_to_disk"
        )
    if gone := next((file for file in files if not file.is_file()), None):
        raise UserError(f"{gone} is missing, which {folder / SAVED[0]} names")
    return files


def refuse_twins(files: list[Path]) -> None:
    """No file is reached twice, or there both packed and unpacked.

    Raises:
        UserError: naming both.
    """
    known: dict[str, Path] = {}
    for file in files:
        real = os.path.realpath(file)
        for packing in PACKED:
            real = real.removesuffix(packing)
        if (other := known.setdefault(real, file)) is file:
            continue
        if other == file:
            raise UserError(f"{file} is named twice, and its rows would be read twice")
        raise UserError(f"{other} and {file} hold the same rows; keep one of them")
