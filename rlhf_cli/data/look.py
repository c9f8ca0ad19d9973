"""The first rows of a source, looked at before a run, whatever the size of the file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.config.schema.data import Data
from rlhf_cli.data.files import files_of, is_local
from rlhf_cli.data.reading import Walk
from rlhf_cli.data.rows import Places, checked, held_out_by, walked
from rlhf_cli.data.sources import Source

ROWS = 2_000  # that are looked at
SAMPLE = 2**20  # bytes of a text file by which its rows are estimated


@dataclass
class Look:
    """What was seen of a source.

    rows: of the kind asked for.
    of, prompts: hashes of the prompts of these rows, and of all that they were made of.
    whole: whether there are no more.
    """

    rows: list[Any]
    of: list[int]
    prompts: list[int]
    whole: bool
    notes: list[str]


def looked_at(source: Source, kind: type, data: Data) -> Look:
    """The first rows of a source, and lines on them and on what was not read.

    Raises:
        UserError: one of them is malformed or of an unfit kind, or there is none.
    """
    walk = Walk(source, kind, data, limit=ROWS)
    rows, of, notes = walked(walk)
    if walk.unread:
        notes.append(f"{unread_of(source)}; these are its first {ROWS}, the others are read later")
    checked(list(zip(rows, of, strict=True)), data, walk.name, notes)
    return Look(rows, of, list(walk.prompts), not walk.unread, notes)


def check_split(places: Places, looks: list[Look], data: Data) -> None:
    """Something is left to learn from where some of these rows are held out.

    Raises:
        UserError: nothing is.
    """
    prompts = [prompt for look in looks for prompt in look.prompts]
    of = [prompt for look in looks for prompt in look.of]
    held_out_by(data, prompts, of, places.name)


def unread_of(source: Source) -> str:
    """A source with the rows that it may have."""
    rows, size = estimated_rows(source), sum(file.stat().st_size for file in files_of(source.path))
    return f"{source.path} has about {rows:,} rows ({size / 1e6:.0f} MB)"


def expected_rows(places: Places) -> int:
    """How many rows there may be in all sources; 0 where that cannot be told."""
    return sum(map(estimated_rows, places.all))


def estimated_rows(source: Source) -> int:
    """How many rows local files have: by their own word, or by the lines of their beginning."""
    if not is_local(source.path):
        return 0
    rows = sum(_rows_of(file) for file in files_of(source.path))
    return rows if source.cap is None else min(rows, source.cap)


def _rows_of(file: Path) -> int:
    if file.suffix == ".parquet":
        import pyarrow.parquet

        return int(pyarrow.parquet.read_metadata(file).num_rows)
    with file.open("rb") as stream:
        start = stream.read(SAMPLE)
    lines = max(start.count(b"\n"), 1)
    return round(lines * file.stat().st_size / max(len(start), 1))
