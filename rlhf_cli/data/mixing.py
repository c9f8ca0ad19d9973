"""The order of items in an epoch, of one source or of several in shares."""

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_cli.data.order import order_of
from rlhf_cli.data.store import Items, Joined

Quotas = tuple[tuple[int, int], ...]
"""Of each source: how many items it has, and how many of them an epoch takes."""


def quotas(items: Sequence[Any]) -> Quotas:
    """All items of each source, `repeat` times; or, in the shares that their weights say, as many
    as there are in all.
    """
    if isinstance(items, Joined):
        return quotas(items.first) + quotas(items.second)
    if not isinstance(items, Items) or len(items.sources) < 2:
        return ((len(items), len(items)),)
    counts = np.bincount(items.parts, minlength=len(items.sources)).tolist()
    weights = [source.weight for source in items.sources if source.weight is not None]
    if not weights:
        taken = [count * each.repeat for count, each in zip(counts, items.sources, strict=True)]
    else:
        taken = [max(1, round(len(items) * weight / sum(weights))) for weight in weights]
    return tuple(
        (count, wanted if count else 0) for count, wanted in zip(counts, taken, strict=True)
    )


def epoch_size(items: Sequence[Any]) -> int:
    """Items of an epoch."""
    return sum(taken for _, taken in quotas(items))


def epoch_order(of: Quotas, seed: int, name: str, epoch: int) -> "array[int]":
    """The places of the items of one epoch, shuffled: fixed by seed, name and epoch.

    Where an epoch is not simply all items, each source has an endless order of its own, epoch-wise
    shuffled, of which an epoch takes the next ones: no item comes twice before all others of its
    source did. The items of a source stand together, source by source.
    """
    if all(count == taken for count, taken in of):
        return array("q", order_of(sum(count for count, _ in of), seed, name, epoch))
    places: list[int] = []
    first = 0
    for number, (count, taken) in enumerate(of):
        own = stream(count, taken, seed, f"{name} {number}", epoch)
        places += [first + place for place in own]
        first += count
    return array("q", (places[i] for i in order_of(len(places), seed, name, epoch)))


def stream(size: int, count: int, seed: int, name: str, run: int) -> list[int]:
    """The `run`-th `count` of an endless stream of places below `size`, epoch-wise shuffled."""
    taken: list[int] = []
    at = run * count
    while count:
        epoch, start = divmod(at, size)
        part = order_of(size, seed, name, epoch)[start : start + count]
        taken += part
        at, count = at + len(part), count - len(part)
    return taken
