"""The rows that a data config names: looked at before a run, in memory, or tokenised on disk."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.data import Data
from rlhf_cli.data.checks import doubted
from rlhf_cli.data.conversions import CONVERSIONS
from rlhf_cli.data.files import about_files, held_out_of, is_local, shown_path
from rlhf_cli.data.held_out import hold_out
from rlhf_cli.data.kinds import (
    Demonstration,
    Feedback,
    Preference,
    Prompt,
    Ranking,
    Stepwise,
    Text,
)
from rlhf_cli.data.reading import Walk, conversions_to
from rlhf_cli.data.sources import Source, sources_of

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


@dataclass
class Places:
    """The sources of rows of one kind.

    train: what is learnt from, and held out of where `held_out` is None.
    own_split: whether the held-out files are those that lie beside those to train on.
    watched: whether held-out rows are needed; if not, those of files that are apart are not read.
    count: data.eval_rows, which nothing reads where held-out rows are apart.
    """

    train: list[Source]
    held_out: Source | None
    own_split: bool = False
    watched: bool = True
    count: int | None = None

    @property
    def name(self) -> str:
        """The places of training rows, for messages."""
        return ", ".join(shown_path(source.path) for source in self.train)

    @property
    def all(self) -> list[Source]:
        """Every source, held-out rows last."""
        return [*self.train, *([self.held_out] if self.held_out and self.watched else [])]

    def about(self) -> list[str]:
        """Lines on files that are there and not read, and on which are held out."""
        paths = [source.path for source in self.train if is_local(source.path)]
        lines = [line for path in paths for line in about_files(path, self.own_split)]
        if self.held_out is not None and self.count is not None:
            apart = shown_path(self.held_out.path)
            lines.append(f"data.eval_rows={self.count} is not used: {apart} has the held-out rows")
        return lines


@dataclass
class Rows:
    """The rows that a data config names; held-out rows are read once."""

    data: Data
    _held_out: dict[type, Split] = field(default_factory=dict)

    def split(self, kind: type, limit: int | None = None) -> Split:
        """Training and held-out rows of `kind` in memory; no prompt is on both sides of one source.

        Args:
            limit: of the rows that are read of each source.

        Raises:
            UserError: a file is missing or empty, or a row is malformed or of an unfit kind.
        """
        return split_of(self.places(kind), kind, self.data, limit)

    def held_out(self, kind: type) -> Split:
        """The held-out rows of `kind` alone, as `split` has them."""
        if kind not in self._held_out:
            self._held_out[kind] = held_out_rows(self.places(kind), kind, self.data)
        return self._held_out[kind]

    def texts(self, limit: int | None = None) -> Split:
        """Plain text for the pretraining mix; empty where none is named."""
        places = self.text_places()
        if places is None:
            return Split([], [], [])
        return split_of(places, Text, text_data(self.data), limit)

    def to_answer(self) -> Split:
        """The prompts to respond to: all of data.path, of the demo those that are held out."""
        if self.data.format == "demo":
            return self.held_out(Prompt)
        rows: list[Any] = []
        places = self.places(Prompt)
        notes = places.about()
        for source in places.train:
            more, _, told = walked(Walk(source, Prompt, self.data))
            rows, notes = rows + more, notes + told
        return Split([], rows, notes)

    def places(self, kind: type) -> Places:
        """Where rows of a kind are.

        The demo has rows of every kind: the kind that is needed, or that conversions start from.
        """
        data = self.data
        if data.format == "demo":
            names = conversions_to(data, kind)
            name = DEMO_FILES[CONVERSIONS[names[0]].start if names else kind]
            train, held_out = (DEMO_FOLDER / f"{name}.{side}.jsonl" for side in ("train", "eval"))
            return Places([Source(train, "demo", cap=data.max_rows)], Source(held_out, "demo"))
        sources = sources_of(data)
        path = None if data.sources else data.path
        apart = data.eval_path if path is None else held_out_of(path, data.eval_path)
        theirs = None if apart is None else Source(apart, data.format, data.columns)
        own_split = path is not None and data.eval_path is None
        return Places(sources, theirs, own_split, count=data.eval_rows)

    def text_places(self) -> Places | None:
        """Where plain text for the pretraining mix is; None where none is named."""
        if self.data.text_path is None:
            return self.places(Text) if self.data.format == "demo" else None
        return Places([Source(self.data.text_path, "rows")], None)


def text_data(data: Data) -> Data:
    """The settings under which plain text is read: shape and columns are those of other rows."""
    return data if data.text_path is None else replace(data, format="rows", columns={}, convert=[])


def read_split(data: Data, kind: type) -> Split:
    """`Rows.split` of rows that nothing else is made of."""
    return Rows(data).split(kind)


def split_of(places: Places, kind: type, data: Data, limit: int | None = None) -> Split:
    """All rows in memory.

    Held-out rows are checked as training rows are: a pair that teaches nothing judges nothing.
    """
    walks = [Walk(source, kind, data, limit=limit) for source in places.train]
    made = [(row, of) for walk in walks for chunk in walk for row, of in zip(*chunk, strict=True)]
    notes = places.about() + [note for walk in walks for note in walk.notes()]
    made = checked(made, data, places.name, notes)
    hashes = [of for _, of in made]
    if places.held_out is None:
        prompts = [prompt for walk in walks for prompt in walk.prompts]
        apart, seen = held_out_by(data, prompts, hashes, places.name)
        train = [row for (row, _), held in zip(made, apart, strict=True) if not held]
        return Split(train, [row for (row, _), held in zip(made, seen, strict=True) if held], notes)
    walk = Walk(places.held_out, kind, data, limit=limit)
    theirs = [(row, of) for chunk in walk for row, of in zip(*chunk, strict=True)]
    notes += walk.notes() + overlap(hashes, [of for _, of in theirs])
    about: list[str] = []
    theirs = checked(theirs, data, walk.name, about)
    notes += [f"held-out rows: {note}" for note in about]
    return Split([row for row, _ in made], [row for row, _ in theirs], notes)


def held_out_rows(places: Places, kind: type, data: Data) -> Split:
    """The held-out rows of `split_of`, without the others in memory."""
    if places.held_out is not None:
        walk = Walk(places.held_out, kind, data)
        made = [(row, of) for chunk in walk for row, of in zip(*chunk, strict=True)]
        notes = walk.notes()
        return Split([], [row for row, _ in checked(made, data, walk.name, notes)], notes)
    walks = [Walk(source, kind, data) for source in places.train]
    of = [prompt for walk in walks for _, prompts in walk for prompt in prompts]
    known = [prompt for walk in walks for prompt in walk.prompts]
    held = iter(held_out_by(data, known, of, places.name)[1])
    again = (Walk(source, kind, data) for source in places.train)
    made = [
        pair for walk in again for chunk in walk for pair in zip(*chunk, strict=True) if next(held)
    ]
    notes = places.about() + [note for walk in walks for note in walk.notes()]
    return Split([], [row for row, _ in checked(made, data, places.name, notes)], notes)


def walked(walk: Walk) -> tuple[list[Any], list[int], list[str]]:
    """All rows of a walk, the hashes of their prompts, and its notes."""
    rows: list[Any] = []
    prompts: list[int] = []
    for chunk, hashes in walk:
        rows += chunk
        prompts += hashes
    return rows, prompts, walk.notes()


def held_out_by(
    data: Data, prompts: Sequence[int], of: Sequence[int], place: str
) -> tuple[Any, Any]:
    """`hold_out` as a data config says it."""
    hashes = np.array(prompts, np.uint64), np.array(of, np.uint64)
    return hold_out(*hashes, data.eval_share, data.eval_rows, place)


def overlap(train: Any, held_out: Any) -> list[str]:
    """A line on held-out rows whose prompts are those of training rows, if there are any."""
    known = int(np.isin(np.asarray(held_out, np.uint64), np.asarray(train, np.uint64)).sum())
    if not known:
        return []
    return [f"{known} of {len(held_out)} held-out rows have a prompt of training rows"]


Hashed = tuple[Any, int]
"""A row, and the hash of its prompt."""


def checked(rows: list[Hashed], data: Data, place: str, notes: list[str]) -> list[Hashed]:
    """Pairs and rankings without those that data.doubtful_pairs drops; other rows as they are.

    Raises:
        UserError: nothing is left.
    """
    if not rows or not isinstance(rows[0][0], Preference | Ranking):
        return rows
    kept = doubted([row for row, _ in rows], data.doubtful_pairs, notes)
    if not kept.any():
        raise UserError(f"{place}: data.doubtful_pairs=drop leaves none of {len(rows)} rows")
    return [row for row, keep in zip(rows, kept, strict=True) if keep]
