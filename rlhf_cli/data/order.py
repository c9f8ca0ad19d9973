"""The order of data as a function of the seed, so that a resumed run needs no state of it."""

import random
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar, overload

Item = TypeVar("Item")


def derived_seed(seed: int, *names: object) -> int:
    """A seed for one named use, so that uses do not shift each other: (7, "rollout", 3)."""
    return zlib.crc32(repr((seed, *names)).encode())


def order_of(count: int, seed: int, name: str, epoch: int) -> list[int]:
    """The order of `count` items in one epoch: a permutation fixed by seed, name and epoch."""
    order = list(range(count))
    random.Random(derived_seed(seed, name, epoch)).shuffle(order)
    return order


def evenly(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Consecutive parts of at most `size` items, whose numbers differ by 1 at most."""
    parts = -(-len(items) // size)
    edges = [len(items) * i // parts for i in range(parts + 1)] if parts else []
    return [list(items[start:end]) for start, end in pairwise(edges)]


class EpochBatches(Sequence[list[Item]]):
    """Shuffled batches of each epoch in turn, one per step; the last of an epoch may be smaller.

    Any batch can be had at once, without those before it.
    """

    def __init__(
        self, items: Sequence[Item], batch_size: int, epochs: int, seed: int, name: str
    ) -> None:
        """Seed and name fix the orders, as in `order_of`."""
        self._items, self._size, self._epochs = items, batch_size, epochs
        self._seed, self._name = seed, name
        self._per_epoch = -(-len(items) // batch_size)
        self._epoch = -1  # the one whose order is known
        self._order: list[int] = []

    def __len__(self) -> int:
        """Steps of all epochs."""
        return self._per_epoch * self._epochs

    @overload
    def __getitem__(self, step: int) -> list[Item]: ...
    @overload
    def __getitem__(self, step: slice) -> list[list[Item]]: ...
    def __getitem__(self, step: int | slice) -> list[Item] | list[list[Item]]:
        """The batch of a step, counted from 0."""
        picked = range(len(self))[step]
        return self._batch(picked) if isinstance(picked, int) else [*map(self._batch, picked)]

    def _batch(self, step: int) -> list[Item]:
        epoch, place = divmod(step, self._per_epoch)
        if epoch != self._epoch:
            self._order = order_of(len(self._items), self._seed, self._name, epoch)
            self._epoch = epoch
        start = place * self._size
        return [self._items[i] for i in self._order[start : start + self._size]]


def draw(items: Sequence[Item], count: int, seed: int, name: str, step: int) -> list[Item]:
    """The `step`-th run of `count` items of an endless, epoch-wise shuffled stream."""
    places = [divmod(place, len(items)) for place in range(step * count, (step + 1) * count)]
    orders = {epoch: order_of(len(items), seed, name, epoch) for epoch, _ in places}
    return [items[orders[epoch][offset]] for epoch, offset in places]
