"""How the sequences of a micro-batch stand beside each other: in padded rows, or end to end."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapreplace
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from rlhf_cli.data.items import Judged
from rlhf_cli.data.transfer import to_device

Item = TypeVar("Item")
SHARED_FROM = 8  # tokens of a prompt that is worth a sequence of its own


@dataclass(frozen=True)
class Layout:
    """How a model reads a micro-batch.

    packed: sequences stand end to end in one row, without a pad; else each has a padded row.
    shared: of packed ones, a prompt stands once for all of its responses.
    """

    packed: bool = False
    shared: bool = False

    def __and__(self, other: "Layout") -> "Layout":
        """What both allow."""
        return Layout(self.packed and other.packed, self.shared and other.shared)


PADDED, PACKED, SHARED = Layout(), Layout(packed=True), Layout(packed=True, shared=True)


@dataclass(frozen=True)
class Packing:
    """Sequences end to end in one row, (1, T): each sees itself, causally, and no other.

    With `keys` a sequence sees tokens that stand elsewhere before its own, as a response does its
    prompt: its queries are the last of its keys.

    lengths: the tokens of each sequence; their sum is T.
    key_lengths: what each sees, its own tokens included; the same where `keys` is None.
    keys: (K,) places in the row of what each sees, one sequence after the other.
    repeated: (P, M) of each token that several see its places in `keys`, filled up with K.
    whence: (T,) where the gradient of each token is: its one place in `keys`, or K + 1 + its row of
        `repeated`.
    """

    lengths: Sequence[int]
    device: torch.device
    key_lengths: Sequence[int] = ()
    keys: Tensor | None = None
    starts: Tensor = field(init=False)  # (S + 1,) int32
    key_starts: Tensor = field(init=False)  # (S + 1,) int32
    longest: int = field(init=False)
    longest_keys: int = field(init=False)
    repeated: Tensor | None = field(init=False)
    whence: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        seen = self.lengths if self.keys is None else self.key_lengths
        starts = _starts(self.lengths, self.device)
        keys, repeated, whence = self.keys, None, None
        if keys is not None:
            repeated, whence = (to_device(each, self.device) for each in _back_from(keys.cpu()))
            keys = to_device(keys, self.device)
        made = {
            "keys": keys,
            "repeated": repeated,
            "whence": whence,
            "key_lengths": seen,
            "starts": starts,
            "key_starts": starts if self.keys is None else _starts(seen, self.device),
            "longest": max(self.lengths),
            "longest_keys": max(seen),
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)


def _back_from(keys: Tensor) -> tuple[Tensor, Tensor]:
    """`repeated` and `whence` of a packing: its gradients are read by them, which is faster than to
    add them up by `keys`, and always in the same order.
    """
    counts = keys.bincount()  # (T,)
    order = keys.argsort(stable=True)  # (K,)
    starts = counts.cumsum(0) - counts
    several = counts > 1
    rows = several.cumsum(0) - 1
    repeated = torch.full((int(several.sum()), int(counts.max())), len(keys))
    tokens = keys[order]
    turns = torch.arange(len(keys)) - starts[tokens]
    chosen = several[tokens]
    repeated[rows[tokens[chosen]], turns[chosen]] = order[chosen]
    return repeated, torch.where(several, len(keys) + 1 + rows, order[starts])


def _starts(lengths: Sequence[int], device: torch.device) -> Tensor:
    """(S + 1,) int32, where each sequence begins, and the end of the last."""
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return to_device(starts, device)


def pack(
    items: Iterable[Item],
    tokens: int,
    layout: Layout,
    of: Callable[[Item], Judged] = lambda item: item,  # type: ignore[assignment,return-value]
    ranks: int = 1,
) -> list[list[Item]]:
    """Groups of at most so many real tokens and of about equal size, the largest first.

    Responses that share a prompt stay together. An item longer than the budget stands alone.

    Args:
        of: the responses of an item, and their prompt.
        ranks: that share them: there are as many for each, if there is as much to part.
    """
    families: dict[Hashable, tuple[int, list[Item]]] = {}
    pieces: list[tuple[int, list[Item]]] = []  # tokens, and what is never parted
    for item in items:
        prompt, responses = of(item).prompt, of(item).responses
        size = sum(map(len, responses))
        if not layout.shared or len(prompt) < SHARED_FROM:
            pieces.append((size + len(prompt) * len(responses), [item]))
            continue
        before, family = families.get(tuple(prompt), (0, []))
        if family and before + size > tokens:
            pieces.append((before, family))
            family = []
        families[tuple(prompt)] = (size + before if family else size + len(prompt), [*family, item])
    pieces = sorted([*pieces, *families.values()], key=lambda piece: piece[0], reverse=True)
    count = -(-sum(size for size, _ in pieces) // tokens)
    count = min(-(-count // ranks) * ranks, len(pieces))
    groups = _even(pieces, count)
    while any(size > tokens and len(group) > 1 for size, group in groups):
        count = min(count + ranks, len(pieces))
        groups = _even(pieces, count)
    return [group for _, group in groups]


def _even(pieces: Sequence[tuple[int, list[Item]]], count: int) -> list[tuple[int, list[Item]]]:
    """So many groups, each piece in turn in the smallest; the largest group first.

    Args:
        pieces: tokens and items of each, the largest first.
    """
    heap = [(0, number) for number in range(count)]
    groups: list[list[Item]] = [[] for _ in heap]
    sizes = [0] * count
    for size, items in pieces:
        before, number = heap[0]
        heapreplace(heap, (before + size, number))
        groups[number] += items
        sizes[number] += size
    return sorted(zip(sizes, groups, strict=True), key=lambda each: each[0], reverse=True)
