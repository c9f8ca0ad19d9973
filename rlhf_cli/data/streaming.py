"""Rows that are read while the run goes on, for what fits no disk: a window at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.data import Data
from rlhf_cli.data.dataset import Dataset, item_kind
from rlhf_cli.data.held_out import MOST, SPACE
from rlhf_cli.data.order import order_of
from rlhf_cli.data.reading import Walk
from rlhf_cli.data.rows import Places
from rlhf_cli.data.store import Items, TokenWriter
from rlhf_cli.data.tokens import Encoder

Item = TypeVar("Item")
Made = TypeVar("Made")

WINDOW = 8192  # rows that are shuffled together
SEARCHED = 20 * WINDOW  # rows among which held-out ones are looked for


@dataclass
class Stream(Generic[Item]):
    """Training items in windows, epoch after epoch; those of held-out prompts are left out.

    make: what is made of each item.
    walks: the latest over each source.
    """

    places: Places
    kind: type
    data: Data
    encoder: Encoder
    check: Callable[[Any], None]
    make: Callable[[Any], Item]
    walks: dict[int, Walk] = field(default_factory=dict)

    def mapped(self, make: Callable[[Item], Made]) -> "Stream[Made]":
        """The same rows, made into something else."""
        before = self.make
        return Stream(
            self.places,
            self.kind,
            self.data,
            self.encoder,
            self.check,
            lambda item: make(before(item)),
            self.walks,
        )

    def notes(self) -> list[str]:
        """What was read, cut and dropped since the last call, a line each."""
        return [*walk_notes(self), *self.encoder.notes()]

    def windows(self, first: int) -> Iterator[list[Item]]:
        """The windows from one on, endlessly; rows before are read and not tokenised.

        Raises:
            UserError: a pass over all rows leaves nothing to learn from.
        """
        number = 0
        while True:
            began, found, rows = number, 0, self._rows()
            while window := list(islice(rows, WINDOW)):
                number += 1
                if number > first:
                    items = [self.make(item) for item in self.encoder.items(window, self.kind)]
                    self.encoder.check_lengths()
                    found += len(items)
                    yield items
            if not found and began >= first:  # else part of the pass was not tokenised
                why = "; ".join(self.encoder.notes())
                raise UserError(f"{self.places.name}: no row is left to learn from: {why}")

    def _rows(self) -> Iterator[Any]:
        """Training rows of all sources, one source after the other."""
        apart = self.places.held_out is not None
        limit = int(self.data.eval_share * SPACE)
        for number, source in enumerate(self.places.train):
            self.walks[number] = walk = Walk(source, self.kind, self.data)
            for rows, prompts in walk:
                for row, prompt in zip(rows, prompts, strict=True):
                    if apart or prompt >= limit:
                        self.check(row)
                        yield row

    def held_out(self) -> Items[Any]:
        """Rows held out: all of those that are apart, or the first whose prompts say so.

        Raises:
            UserError: there are none among the first rows.
        """
        rows = list(self._held_out())
        writer = TokenWriter(None, item_kind(self.kind))
        with writer:
            items = self.encoder.items(rows, self.kind)
            writer.extend(items)
        if not items and self.places.held_out:
            self.encoder.check_lengths()
        if not items:
            raise UserError(
                f"{self.places.name}: data.eval_share={self.data.eval_share:g} holds out none of "
                f"the first {SEARCHED} rows; raise it, or give data.eval_path"
            )
        places = np.arange(len(items))
        return Items(writer.table(), places, np.zeros(len(items)), np.zeros(len(items)), [])

    def _held_out(self) -> Iterator[Any]:
        limit = int(self.data.eval_share * SPACE)
        apart, known = self.places.held_out, set[int]()
        for source in [apart] if apart else self.places.train:
            for rows, prompts in Walk(
                source, self.kind, self.data, limit=None if apart else SEARCHED
            ):
                for row, prompt in zip(rows, prompts, strict=True):
                    if apart or prompt < limit:
                        self.check(row)
                        known.add(prompt)
                        yield row
                if not apart and len(known) >= MOST:
                    return


def first(items: Sequence[Item] | Stream[Item], count: int) -> list[Item]:
    """The first items, at most those of one window of a stream."""
    if isinstance(items, Stream):
        return next(items.windows(0))[:count]
    return list(items[:count])


def streamed(
    places: Places, kind: type, data: Data, encoder: Encoder, check: Callable[[Any], None]
) -> Dataset:
    """A dataset whose training rows are read while the run goes on."""
    stream: Stream[Any] = Stream(places, kind, data, encoder, check, lambda item: item)
    held_out = stream.held_out()
    looked_at = len(next(stream.windows(0)))
    seen = [*(walk_notes(stream)), *encoder.report()]
    notes = [
        f"{places.name}: read while the run goes on, shuffled {WINDOW} rows at a time; doubtful "
        "pairs among them are not looked for",
        f"{len(held_out)} rows held out",
        *(f"of these and the first {looked_at} to learn from: {line}" for line in seen),
    ]
    stream.walks.clear()
    return Dataset(stream, held_out, notes)


def walk_notes(stream: Stream[Any]) -> list[str]:
    """What the walks have read so far, a line each."""
    return [line for walk in stream.walks.values() for line in walk.notes()]


class StreamBatches(Generic[Item]):
    """Batches of a stream, one per step, in turn; `state` is where it stands."""

    def __init__(
        self, stream: Stream[Item], batch_size: int, steps: int, seed: int, name: str
    ) -> None:
        self._stream, self._size, self._steps = stream, batch_size, steps
        self._seed, self._name = seed, name
        self._number, self._taken = 0, 0  # the window, and the items that were taken of it
        self._windows: Iterator[list[Item]] | None = None
        self._window: list[Item] = []

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> list[Item]:
        """The batch of a step, counted from 0: the next one."""
        batch: list[Item] = []
        while len(batch) < self._size:
            if self._windows is None:
                self._windows = self._stream.windows(self._number)
                self._window = self._shuffled(next(self._windows))
            elif self._taken >= len(self._window):
                self._number, self._taken = self._number + 1, 0
                self._window = self._shuffled(next(self._windows))
            more = self._window[self._taken : self._taken + self._size - len(batch)]
            self._taken += len(more)
            batch += more
        return batch

    def _shuffled(self, items: list[Item]) -> list[Item]:
        return [items[i] for i in order_of(len(items), self._seed, self._name, self._number)]

    def notes(self) -> list[str]:
        """As `Stream.notes`."""
        return self._stream.notes()

    def state(self) -> dict[str, Any]:
        """Where the next batch begins."""
        return {"window": self._number, "taken": self._taken}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._number, self._taken = state.get("window", 0), state.get("taken", 0)
