"""Rows become tokens on disk: one pass over the files, and none where it was made before.

A dataset is a folder of the cache, named by all that decides its tokens: the files' content, the
options of `data`, the tokenizer with its template, and the kind of rows.
"""

import gc
import hashlib
import json
import os
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rlhf_cli import __version__
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.data import Data
from rlhf_cli.data.checks import Doubts
from rlhf_cli.data.duplicates import COMPARED, near_of
from rlhf_cli.data.files import files_of, is_local
from rlhf_cli.data.items import Answers, Encoded, Tokens
from rlhf_cli.data.kinds import Demonstration, Preference, Ranking, Text, name_of
from rlhf_cli.data.mixing import quotas
from rlhf_cli.data.reading import Walk
from rlhf_cli.data.rows import Places, held_out_by, overlap
from rlhf_cli.data.sources import Source
from rlhf_cli.data.store import Items, TokenTable, TokenWriter, parts_of
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.ranks.agreement import together
from rlhf_cli.ranks.world import world

SMALL = 4 * 2**20  # bytes of rows that are tokenised again rather than kept
CACHE = "RLHF_CLI_CACHE"  # names the folder of all datasets, instead of the user's own
TABLE, NOTES = "tokens.arrow", "notes.json"
ARRAYS = ("places", "prompts", "parts")  # of the items of each side
PART = ".part"
STALE = 86_400  # seconds


@dataclass
class Dataset:
    """Items to train on, items held out, and what a reader should know of how they came about."""

    train: Any  # Items, or the Stream of data/streaming.py
    held_out: Items[Any]
    notes: list[str]


def shares(items: Items[Any]) -> list[str]:
    """A line on how many rows of each source an epoch has, where there are several sources."""
    if len(items.sources) < 2:
        return []
    of = zip(quotas(items), items.sources, strict=True)
    told = ", ".join(f"{taken} of the {count} of {source.name}" for (count, taken), source in of)
    return [f"an epoch: {told}"]


def nearly_same(train: Sequence[Any], held_out: Sequence[Any]) -> list[str]:
    """A line on held-out prompts that training prompts are nearly the same as, if there are any."""
    asked = [parts_of(item)[0] for item in held_out]
    near = len(near_of((parts_of(item)[0] for item in train), asked))
    if not near:
        return []
    among = f" of the first {COMPARED:,}" if len(train) > COMPARED else ""
    return [f"{near} of {len(asked)} held-out rows have nearly the prompt of training rows{among}"]


def dataset_of(
    places: Places,
    kind: type,
    data: Data,
    encoder: Encoder,
    advance: Callable[[int], None] = lambda count: None,
) -> Dataset:
    """The rows of some sources, tokenised.

    Args:
        advance: told how many rows more were read.

    Raises:
        UserError: a file is missing or empty, a row is malformed or of an unfit kind, or nothing
            is left.
    """
    folder = folder_of(places, kind, data, encoder)
    if folder is None:
        made = _Made(kind, encoder, data, None)
        made.read(places, advance)
        return made.dataset(places)

    def kept() -> Dataset:
        if (known := _read(folder, kind, places, encoder)) is not None:
            return known
        with _part(folder) as part:
            made = _Made(kind, encoder, data, part)
            made.read(places, advance)
            dataset = made.dataset(places)
            _write(part, dataset, encoder.seen())
        return dataset

    # rank 0 makes it, then the first rank of each machine that does not see it; the others read it
    own = world()
    turn = 0 if own.is_main else 1 if own.local_rank == 0 else 2
    done = [together(partial(own.lead, kept, leads=turn == each)) for each in range(3)]
    dataset = done[turn]
    assert dataset is not None
    return dataset


# --------------------------------------------------------------------------- the pass


class _Made:
    """A dataset in the making."""

    def __init__(self, kind: type, encoder: Encoder, data: Data, folder: Path | None) -> None:
        self._kind, self._encoder, self._data = kind, encoder, data
        self._file = None if folder is None else folder / TABLE
        self._writer = TokenWriter(self._file, item_kind(kind))
        self._doubts = {side: Doubts() for side in (False, True)}
        self._prompts: array[int] = array("Q")  # of the rows that may be held out
        self._of: array[int] = array("Q")  # hash of the prompt of each item
        self._part: array[int] = array("H")  # its source
        self._apart = 0  # items that come before those of held-out files
        self._notes: list[str] = []
        self._place = ""
        self._held_out_notes: list[str] | None = None

    def read(self, places: Places, advance: Callable[[int], None]) -> None:
        """Walk over all sources."""
        self._place, self._notes = places.name, places.about()
        with self._writer, collector_off():
            for number, source in enumerate(places.train):
                self._notes += self._walk(source, number, advance, held_out=False)
            self._apart = len(self._of)
            if places.held_out is not None and not places.watched:
                self._held_out_notes = []
            elif places.held_out is not None:
                self._held_out_notes = self._walk(places.held_out, 0, advance, held_out=True)

    def _walk(
        self, source: Source, number: int, advance: Callable[[int], None], held_out: bool
    ) -> list[str]:
        walk = Walk(source, self._kind, self._data, advance)
        before = len(self._of)
        for rows, prompts in walk:
            items = self._encoder.items(rows, self._kind)
            self._writer.extend(items)
            hash_at = {row.source: prompt for row, prompt in zip(rows, prompts, strict=True)}
            self._of.extend(hash_at[source_of(item)] for item in items)
            if self._kind in (Preference, Ranking):
                for item in items:
                    assert isinstance(item, Answers)
                    self._doubts[held_out].add(item.row)
        self._part.extend([number] * (len(self._of) - before))
        if not held_out:
            self._prompts.extend(walk.prompts)
        if len(self._of) == before:
            self._encoder.check_lengths()  # says it better
            raise UserError(
                f"{walk.name}: nothing is left of {walk.rows} {name_of(self._kind)} rows: "
                + "; ".join(self._encoder.notes())
            )
        return walk.notes()

    # ------------------------------------------------------------------ its split

    def dataset(self, places: Places) -> Dataset:
        """Split, without what is doubted, and told."""
        told = self._encoder.report()
        table = self._writer.table()
        of, number = np.frombuffer(self._of, np.uint64), np.frombuffer(self._part, np.uint16)
        notes = self._notes
        every = np.arange(len(of))
        if self._held_out_notes is None:
            kept = self._kept(False, table, 0, notes)
            held, seen = held_out_by(self._data, self._prompts, self._of, self._place)
            train, held_out = every[kept & ~held], every[kept & seen]
            if aside := int((held & ~seen).sum()):
                notes = [*notes, f"{aside} more rows are held out, and not looked at"]
        else:
            apart = self._apart
            about = list(self._held_out_notes) + overlap(of[:apart], of[apart:])
            train = every[:apart][self._kept(False, table, 0, notes)]
            doubts: list[str] = []
            held_out = every[apart:][self._kept(True, table, apart, doubts)]
            notes = notes + about + [f"held-out rows: {note}" for note in doubts]
        notes = notes + told
        if not len(train) or (places.watched and not len(held_out)):
            side = "to train on" if not len(train) else "held out"
            raise UserError(f"{self._place}: no row is left {side}: {'; '.join(notes)}")
        ours, theirs = (
            Items[Any](table, side, of[side], number[side], places.train)
            for side in (train, held_out)
        )
        return Dataset(ours, theirs, notes + shares(ours) + nearly_same(ours, theirs))

    def _kept(self, held_out: bool, table: Sequence[Any], first: int, notes: list[str]) -> Any:
        """(N,) bool, the items of one side that are not dropped as doubtful."""
        if self._kind not in (Preference, Ranking):
            count = len(self._of) - self._apart if held_out else self._apart
            return np.ones(count, bool)
        return self._doubts[held_out].kept(
            self._data.doubtful_pairs, lambda i: table[first + i].source, notes
        )


@contextmanager
def collector_off() -> Iterator[None]:
    """Rows are millions of lists, none of them in a cycle: to look through them takes a third."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def item_kind(kind: type) -> type:
    """What rows of a kind become: sequences, prompts, or the answers that the row judges."""
    return Tokens if kind in (Demonstration, Text) else kind


def source_of(item: Encoded) -> str:
    """Where the row of an item stands."""
    return item[0].source if isinstance(item, tuple) else item.source


# --------------------------------------------------------------------------- the cache


def folder_of(places: Places, kind: type, data: Data, encoder: Encoder) -> Path | None:
    """Where the tokens of these rows are kept; None where they are few, or are not local files."""
    sources = places.all
    if not all(is_local(source.path) for source in sources):
        return None
    files = [file for source in sources for file in files_of(source.path)]
    if sum(file.stat().st_size for file in files) < SMALL:
        return None
    key = {
        "version": __version__,
        "sources": [[str(file), identity_of(file)] for file in files],
        "shapes": [asdict(replace(source, path="")) for source in sources],
        "kind": kind.__name__,
        "watched": places.watched,
        "data": asdict(replace(data, cache=None, path=None, eval_path=None, text_path=None)),
        "tokenizer": encoder.identity(),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    return cache_folder(data) / digest[:24]


def identity_of(file: Path) -> str:
    """The content of a file, by its hash."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cache_folder(data: Data) -> Path:
    """The folder of all datasets: data.cache, or that of the environment, or the user's own."""
    named = data.cache or os.environ.get(CACHE)
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rlhf-cli" / "datasets"


@contextmanager
def _part(folder: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `folder` if all goes well."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f".*{PART}"):  # by a run that was killed
            if time.time() - left.stat().st_mtime > STALE:
                shutil.rmtree(left, ignore_errors=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}", suffix=PART, dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"data.cache: cannot write {folder.parent}: {error.strerror}; name another folder"
        ) from None
    try:
        yield part
        if not folder.exists():  # another run may have been faster
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(folder: Path, dataset: Dataset, seen: dict[str, Any]) -> None:
    for side, items in (("train", dataset.train), ("held_out", dataset.held_out)):
        for name in ARRAYS:
            np.save(folder / f"{side}.{name}.npy", getattr(items, name))
    told = {"notes": dataset.notes, "seen": seen}
    (folder / NOTES).write_text(json.dumps(told), encoding="utf-8")


def _read(folder: Path, kind: type, places: Places, encoder: Encoder) -> Dataset | None:
    """A dataset that was made before; None where there is none, or it is damaged."""
    if not (folder / NOTES).is_file():
        return None
    try:
        table = TokenTable.of(folder / TABLE, item_kind(kind))
        train, held_out = (
            Items[Any](
                table,
                sources=places.train,
                **{name: np.load(folder / f"{side}.{name}.npy", mmap_mode="r") for name in ARRAYS},
            )
            for side in ("train", "held_out")
        )
        told = json.loads((folder / NOTES).read_text(encoding="utf-8"))
        encoder.remember(told["seen"])
        notes = [*told["notes"], f"tokens: read from {folder}"]
    except (OSError, ValueError, KeyError, pa.ArrowException):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return Dataset(train, held_out, notes)
