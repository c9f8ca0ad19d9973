"""One walk over the rows of a source: parsed, checked, converted, a chunk at a time."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.data import Data
from rlhf_cli.data.columns import MissingColumn, unused_columns, unused_note
from rlhf_cli.data.conversions import CONVERSIONS, convert, note_of, route
from rlhf_cli.data.files import read_raw, shown_path
from rlhf_cli.data.held_out import hash_of, identity
from rlhf_cli.data.kinds import (
    JUDGEMENTS,
    Demonstration,
    Feedback,
    Prompt,
    Ranking,
    Row,
    derivable,
    derive,
    name_of,
)
from rlhf_cli.data.labels import note
from rlhf_cli.data.raw import RowError
from rlhf_cli.data.readers import EXPECTED
from rlhf_cli.data.shapes.formats import PARTS, reader_of
from rlhf_cli.data.shapes.likeness import missed
from rlhf_cli.data.sources import Source

CHUNK = 1024  # rows that are in memory at once
MOST_PLACES = 5  # that a line names

Chunk = tuple[list[Any], list[int]]
"""Rows of the kind asked for, and the hash of the prompt of each."""


class KindError(UserError):
    """The rows are sound, but of a kind that cannot become the one asked for."""


class Walk:
    """The rows of one source as rows of one kind; iterating gives chunks, and counts.

    kinds: rows by the kind that they are.
    prompts: hashes of the prompts of all rows, in their order.
    rows: how many of the kind asked for there are so far.
    cut: whether there are more rows than the source's cap.
    unread: whether there are more rows than the limit of the walk.
    """

    def __init__(
        self,
        source: Source,
        kind: type,
        data: Data,
        advance: Callable[[int], None] = lambda count: None,
        limit: int | None = None,
    ) -> None:
        """`advance` is told how many rows were read; after `limit` of them the walk ends."""
        self.kinds: Counter[type] = Counter()
        self.prompts: array[int] = array("Q")
        self.rows = 0
        self.cut = self.unread = False
        self._source, self._kind, self._data, self._advance = source, kind, data, advance
        self._limit = limit
        self._conversions = conversions_to(data, kind)
        self._asked: set[int] = set()  # prompts that were made of judgements already
        self._dropped: dict[str, tuple[int, list[str]]] = {}  # why -> how many, the first places
        self._converted: dict[str, Counter[str]] = {name: Counter() for name in self._conversions}
        self._columns: Counter[str] = Counter()
        self._spellings: Counter[str] = Counter()
        self._from = 0  # rows of which self.rows were made
        self._ties = 0

    def __iter__(self) -> Iterator[Chunk]:
        # what puts rows of one prompt together needs all of them
        whole = any(CONVERSIONS[name].whole for name in self._conversions)
        rows: list[Row] = []
        for row in self._read():
            rows.append(row)
            if len(rows) == CHUNK and not whole:
                yield self._chunk(rows)
                rows = []
        if rows:
            yield self._chunk(rows)
        for name in self._conversions:
            if not self._converted[name]["from"]:
                start = name_of(CONVERSIONS[name].start)
                raise UserError(f"data.convert: {name} found no {start} rows in {self.name}")
        if not self.rows:
            raise self.nothing_left()

    @property
    def name(self) -> str:
        """The source, as lines name it."""
        path = self._source.path
        return self._source.name or (path.name if isinstance(path, Path) else shown_path(path))

    # ------------------------------------------------------------------ rows as they are

    def _read(self) -> Iterator[Row]:
        """The rows of the kinds that they are, each of which can become the one asked for."""
        source = self._source
        read = reader_of(replace(self._data, format=source.shape, columns=source.columns))
        parts = PARTS.get(source.shape)
        fits: set[type] = set()
        count = 0
        for raw, place in read_raw(source.path, streaming=self._data.streaming):
            for each in [raw] if parts is None or isinstance(raw, RowError) else parts(raw):
                if count in (source.cap, self._limit):
                    self.cut, self.unread = count == source.cap, count != source.cap
                    return
                try:
                    if isinstance(each, RowError):
                        raise each
                    row = read(each, place)
                except RowError as error:
                    if self._data.bad_rows == "error":
                        raise self._refused(error) from None
                    self._drop(error, place, unreadable=isinstance(raw, RowError))
                    continue
                count += 1
                if source.name and getattr(row, "group", None) == "":
                    row.group = source.name  # type: ignore[union-attr]
                if type(row) not in fits:
                    self._check_kind(row)
                    fits.add(type(row))
                yield row

    @staticmethod
    def _refused(error: RowError) -> RowError:
        """The first bad row ends the run; a missing column is rather that of all rows."""
        if isinstance(error, MissingColumn):
            return error
        return RowError(f"{error}; data.bad_rows=drop leaves such rows out")

    def _drop(self, error: RowError, place: str, unreadable: bool) -> None:
        why = str(error).removeprefix(f"{place}: ")
        if unreadable:  # what a parser adds differs from line to line
            why = why.partition(": ")[0]
        count, places = self._dropped.get(why, (0, []))
        if count < MOST_PLACES:
            places.append(Path(place).name)
        self._dropped[why] = count + 1, places

    def _check_kind(self, row: Row) -> None:
        """Raises KindError where a row cannot become one of the kind asked for."""
        have = now = type(row)
        for name in self._conversions:
            way = CONVERSIONS[name]
            now = way.end if now is way.start else now
        if derivable(now, self._kind):
            return
        what = f"this is a {name_of(have)} row"
        if now is not have:
            what += f", and a {name_of(now)} row after data.convert=[{','.join(self._conversions)}]"
        expected = EXPECTED[self._kind]
        line = f"{row.source}: {what}; needed: {name_of(self._kind)} rows ({expected})"
        line += missed(row, self._source.shape) if self._kind in (Demonstration, Feedback) else ""
        if (way_there := route(have, self._kind)) is not None:
            verb = "makes" if way_there else "keeps"
            line += f"; data.convert=[{','.join(way_there)}] {verb} them"
        raise KindError(line)

    # ------------------------------------------------------------------ rows as they are needed

    def _chunk(self, rows: list[Row]) -> Chunk:
        self.kinds.update(map(type, rows))
        self._count(rows)
        prompts = [hash_of(identity(row)) for row in rows]
        self.prompts.extend(prompts)
        made = self._derived(self._convert(rows))
        self._advance(len(rows))
        same = len(made) == len(rows) and all(map(same_prompt, made, rows))
        return made, prompts if same else [hash_of(identity(row)) for row in made]

    def _count(self, rows: list[Row]) -> None:
        """Columns that are kept for rules and templates, and how labels are written."""
        for row in rows:
            self._columns.update(row.columns.keys())
            if isinstance(row, Feedback) and row.spelling:
                self._spellings[row.spelling] += 1

    def _convert(self, rows: list[Row]) -> list[Row]:
        for name in self._conversions:
            rows, counts = convert(rows, name, self._data)
            self._converted[name].update(counts)
        return rows

    def _derived(self, rows: list[Row]) -> list[Any]:
        self._from += len(rows)
        if self._kind is Prompt:
            rows = [row for row in rows if self._is_new(row)]
        made = derive(rows, self._kind, self._data.step_join)
        told = [row for row in made if not isinstance(row, Ranking) or len(set(row.ranks)) > 1]
        self._ties += len(made) - len(told)
        self.rows += len(told)
        return told

    def _is_new(self, row: Any) -> bool:
        """Whether it is not the prompt of another judgement once more."""
        if not isinstance(row, JUDGEMENTS):
            return True
        asked = hash_of(str(row.prompt))
        known = asked in self._asked
        self._asked.add(asked)
        return not known

    # ------------------------------------------------------------------ what happened

    def notes(self) -> list[str]:
        """What was read, dropped and made of it, a line each."""
        counts = [f"{count} {name_of(kind)} rows" for kind, count in self.kinds.items()]
        reasons = [
            f"{count} dropped: {why} ({few_of(count, at)})"
            for why, (count, at) in self._dropped.items()
        ]
        lines = [f"{self.name}: {', '.join([*(counts or ['no rows']), *reasons])}"]
        if self._spellings:
            lines.append(note(self._spellings))
        if unread := unused_columns(self._columns, self._data):
            lines.append(unused_note(unread, self.kinds.total()))
        if self.cut:
            lines.append(f"the first {self._source.cap} are used")
        lines += [note_of(name, counts) for name, counts in self._converted.items()]
        made = self.rows + self._ties
        if made < self._from:
            why = "none with a thumbs-down or a wrong step"
            why = "each prompt once" if self._kind is Prompt else why
            lines.append(f"{made} {name_of(self._kind)} rows from {self._from} rows: {why}")
        if self._ties:
            lines.append(f"{self._ties} of {made} rankings tie throughout: dropped")
        return lines

    def nothing_left(self) -> UserError:
        """The error that says where all rows went."""
        if self._ties:
            return UserError(
                f"{self.name}: all {self._ties} rankings tie throughout, which teaches nothing"
            )
        why = "".join(f"; {note}" for note in self.notes())
        kind = self._kind
        return UserError(f"{self.name}: no usable {name_of(kind)} row ({EXPECTED[kind]}){why}")


def few_of(count: int, places: list[str]) -> str:
    """A few places, and how many more there are."""
    more = count - len(places)
    return ", ".join(places) + (f" and {more} more" if more > 0 else "")


def conversions_to(data: Data, kind: type) -> list[str]:
    """The conversions that apply where rows of `kind` are needed.

    Prompts, demonstrations and texts are derived from the rows as they are.
    """
    return data.convert if kind in JUDGEMENTS else []


def same_prompt(made: Any, row: Any) -> bool:
    """Whether a row that was made of another keeps the very prompt."""
    return made is row or getattr(made, "prompt", None) is getattr(row, "prompt", row)
