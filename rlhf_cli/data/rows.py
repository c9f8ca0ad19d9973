"""Rows from files: found, parsed and checked, each fault named by file, line and column."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema import Data
from rlhf_cli.data.checks import check_pairs
from rlhf_cli.data.conversions import CONVERSIONS, convert, route
from rlhf_cli.data.files import RowError, read_raw
from rlhf_cli.data.kinds import (
    JUDGEMENTS,
    Demonstration,
    Feedback,
    Preference,
    Prompt,
    Ranking,
    Row,
    Stepwise,
    Text,
    derivable,
    derive,
    name_of,
)
from rlhf_cli.data.readers import EXPECTED
from rlhf_cli.data.shapes import PARTS, missed, reader_of

MOST_PLACES = 5  # that a line names

DEMO_FOLDER = Path(__file__).parent.parent / "demo"
DEMO_FILES = {
    Demonstration: "demonstrations",
    Preference: "preferences",
    Ranking: "rankings",
    Feedback: "feedback",
    Stepwise: "steps",
    Prompt: "prompts",
    Text: "text",
}


@dataclass
class Split:
    """Rows to train on, rows held out, and what a reader should know of how they came about."""

    train: list[Any]
    held_out: list[Any]
    notes: list[str]


class KindError(UserError):
    """The rows are sound, but of a kind that cannot become the one asked for."""


class Rows:
    """The rows that a data config names: each file is parsed once, and split once for a kind."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self._parsed: dict[tuple[str | Path, int | None], tuple[list[Row], list[str]]] = {}
        self._splits: dict[type, Split] = {}

    def split(self, kind: type) -> Split:
        """Training and held-out rows of `kind`; no prompt is on both sides of one source.

        Raises:
            UserError: a file is missing or empty, or a row is malformed or of an unfit kind.
        """
        if kind not in self._splits:
            self._splits[kind] = self._split(kind)
        return self._splits[kind]

    def texts(self) -> Split:
        """Plain text for the pretraining mix; empty where none is named."""
        data = self._data
        if data.text_path is None:
            return self.split(Text) if data.format == "demo" else Split([], [], [])
        if Text not in self._splits:
            plain = Rows(replace(data, format="rows", columns={}, max_rows=None))
            notes: list[str] = []
            rows = plain.all_of(data.text_path, Text, notes)
            self._splits[Text] = Split(*hold_out(rows, data.eval_rows, data.text_path), notes)
        return self._splits[Text]

    def to_answer(self) -> Split:
        """The prompts to respond to: all of data.path, of the demo those that are held out."""
        if self._data.path is None:
            return self.split(Prompt)
        notes: list[str] = []
        return Split([], self.all_of(self._data.path, Prompt, notes), notes)

    def all_of(self, path: str | Path, kind: type, notes: list[str]) -> list[Any]:
        """`kind` rows of the first data.max_rows rows of one source; `notes` gets the counts."""
        rows = self._source(path, kind, notes, self._data.max_rows)
        return as_kind(rows, kind, self._data, path, notes)

    def _split(self, kind: type) -> Split:
        data = self._data
        notes: list[str] = []
        path, eval_path = paths_of(data, kind)
        train = self._source(path, kind, notes, data.max_rows)
        place: object = path
        if eval_path is None:
            # Split before rows become another kind: every stage then holds out the same prompts.
            train, held_out = hold_out(train, data.eval_rows, path)
            place = f"{path}, held-out rows"
        else:
            held_out = self._source(eval_path, kind, notes)
            place = eval_path
            seen = {identity(row) for row in train}
            if known := sum(identity(row) in seen for row in held_out):
                notes.append(
                    f"{known} of {len(held_out)} held-out rows have a prompt of training rows"
                )
        about: list[str] = []
        split = Split(
            checked(as_kind(train, kind, data, path, notes), data, path, notes),
            checked(as_kind(held_out, kind, data, place, about), data, place, about),
            notes,
        )
        notes += [f"held-out rows: {note}" for note in about]
        return split

    def _source(
        self, path: str | Path, kind: type, notes: list[str], limit: int | None = None
    ) -> list[Row]:
        """The first rows of one source, of the kinds that they are; all can become `kind`."""
        if (path, limit) not in self._parsed:
            rows, counted = parse_rows(self._data, path)
            cut = limit is not None and limit < len(rows)
            told = [counted, *([f"the first {limit} are used"] if cut else [])]
            self._parsed[path, limit] = rows[:limit], told
        rows, told = self._parsed[path, limit]
        notes += told
        if not rows:
            raise nothing_left(path, kind, notes[-1:])
        check_kinds(rows, kind, self._data, path)
        return rows


def read_split(data: Data, kind: type) -> Split:
    """`Rows.split` of rows that nothing else is made of."""
    return Rows(data).split(kind)


def paths_of(data: Data, kind: type) -> tuple[str | Path, str | Path | None]:
    """Where the rows are, and the held-out rows if those are apart.

    The demo has rows of every kind: the kind that is needed, or that conversions start from.
    """
    if data.format == "demo":
        names = conversions_to(data, kind)
        name = DEMO_FILES[CONVERSIONS[names[0]].start if names else kind]
        return DEMO_FOLDER / f"{name}.train.jsonl", DEMO_FOLDER / f"{name}.eval.jsonl"
    assert data.path is not None  # validate() refuses a missing path
    return data.path, data.eval_path


def hold_out(rows: list[Any], count: int, path: object) -> tuple[list[Any], list[Any]]:
    """Split off the rows of `count` prompts: those whose hash is lowest.

    A prompt is on one side, and on the same side at every seed and in every stage that reads this
    source with this count.
    """
    groups: dict[str, list[Any]] = {}
    for row in rows:
        groups.setdefault(identity(row), []).append(row)
    order = sorted(groups, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    held = set(order[:count])
    if len(held) == len(groups):
        raise UserError(
            f"{path}: holding out {count} of {len(groups)} prompts leaves none to train on; "
            "set data.eval_rows lower or give data.eval_path"
        )
    train = [row for row in rows if identity(row) not in held]
    return train, [row for row in rows if identity(row) in held]


def identity(row: Row) -> str:
    """What makes two rows share a side of the split: their prompt, or the text itself.

    White space makes no other prompt of it: a copy with a line break more must not be held out.
    """
    if isinstance(row, Text):
        return " ".join(row.text.split())
    if isinstance(row.prompt, str):
        return " ".join(row.prompt.split())
    turns = [
        {
            key: " ".join(part.split()) if isinstance(part, str) else part
            for key, part in each.items()
        }
        for each in row.prompt
    ]
    return json.dumps(turns, sort_keys=True, default=str)


def parse_rows(data: Data, path: str | Path) -> tuple[list[Row], str]:
    """All rows of one source, of the kinds that they are, and a line that counts them."""
    read = reader_of(data)
    parts = PARTS.get(data.format, lambda raw: [raw])
    rows: list[Row] = []
    dropped: dict[str, list[str]] = {}  # why -> where
    for raw, source in read_raw(path):
        for part in [raw] if isinstance(raw, RowError) else parts(raw):
            try:
                if isinstance(part, RowError):
                    raise part
                rows.append(read(part, source))
            except RowError as error:
                if data.bad_rows == "error":
                    raise
                why = str(error).removeprefix(f"{source}: ")
                if isinstance(raw, RowError):  # what a parser adds differs from line to line
                    why = why.partition(": ")[0]
                dropped.setdefault(why, []).append(Path(source).name)
    kinds = Counter(name_of(type(row)) for row in rows)
    counts = ", ".join(f"{count} {kind} rows" for kind, count in kinds.items()) or "no rows"
    reasons = "".join(f", {len(at)} dropped: {why} ({few_of(at)})" for why, at in dropped.items())
    return rows, f"{path.name if isinstance(path, Path) else path}: {counts}{reasons}"


def few_of(places: list[str]) -> str:
    """A few places, and how many more there are."""
    more = len(places) - MOST_PLACES
    return ", ".join(places[:MOST_PLACES]) + (f" and {more} more" if more > 0 else "")


def conversions_to(data: Data, kind: type) -> list[str]:
    """The conversions that apply where rows of `kind` are needed.

    Prompts, demonstrations and texts are derived from the rows as they are.
    """
    return data.convert if kind in JUDGEMENTS else []


def check_kinds(rows: list[Row], kind: type, data: Data, path: object) -> None:
    """Every conversion finds rows, and every row becomes one of `kind`.

    Raises:
        UserError: with the first row of an unfit kind, and the conversions that would help it.
    """
    names = conversions_to(data, kind)
    becomes: dict[type, type] = {type(row): type(row) for row in rows}
    for name in names:
        way = CONVERSIONS[name]
        if way.start not in becomes.values():
            raise UserError(f"data.convert: {name} found no {name_of(way.start)} rows in {path}")
        becomes = {have: way.end if now is way.start else now for have, now in becomes.items()}
    for row in rows:
        have, now = type(row), becomes[type(row)]
        if derivable(now, kind):
            continue
        what = f"this is a {name_of(have)} row"
        if now is not have:
            what += f", and a {name_of(now)} row after data.convert=[{','.join(names)}]"
        line = f"{row.source}: {what}; needed: {name_of(kind)} rows ({EXPECTED[kind]})"
        line += missed(row)
        if (way_there := route(have, kind)) is not None:
            verb = "makes" if way_there else "keeps"
            line += f"; data.convert=[{','.join(way_there)}] {verb} them"
        raise KindError(line)


def as_kind(rows: list[Row], kind: type, data: Data, place: object, notes: list[str]) -> list[Any]:
    """Rows as `kind`, converted as data says and then derived; at least one.

    Raises:
        UserError: nothing is left; the line says where it went.
    """
    told: list[str] = []
    for name in conversions_to(data, kind):
        rows = convert(rows, name, data, told)
    made = derive(rows, kind, data.step_join)
    if len(made) < len(rows):
        why = "each prompt once" if kind is Prompt else "none with a thumbs-down or a wrong step"
        told.append(f"{len(made)} {name_of(kind)} rows from {len(rows)} rows: {why}")
    if not made:
        raise nothing_left(place, kind, told)
    notes += told
    return made


def nothing_left(place: object, kind: type, notes: list[str]) -> UserError:
    """The error that says where all rows went."""
    why = "".join(f"; {note}" for note in notes)
    return UserError(f"{place}: no usable {name_of(kind)} row ({EXPECTED[kind]}){why}")


def checked(rows: list[Any], data: Data, place: object, notes: list[str]) -> list[Any]:
    """Pairs and rankings without what data.doubtful_pairs drops; rows of other kinds as they are.

    Held-out rows are checked as training rows are: a pair that teaches nothing judges nothing.
    """
    if not isinstance(rows[0], Preference | Ranking):
        return rows
    told = [row for row in rows if isinstance(row, Preference) or len(set(row.ranks)) > 1]
    if len(told) < len(rows):
        notes.append(f"{len(rows) - len(told)} of {len(rows)} rankings tie throughout: dropped")
    if not told:
        raise UserError(f"{place}: all {len(rows)} rankings tie throughout, which teaches nothing")
    kept = check_pairs(told, data.doubtful_pairs, notes)
    if not kept:
        raise UserError(f"{place}: data.doubtful_pairs=drop leaves none of {len(rows)} rows")
    return kept
