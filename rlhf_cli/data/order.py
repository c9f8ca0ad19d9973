"""The order of data as a function of the seed, so that a resumed run needs no state of it."""

import random
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

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
