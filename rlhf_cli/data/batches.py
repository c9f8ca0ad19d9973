"""Batches: padded tensors cut by a token budget, and data order as a function of the seed.

A budget changes speed and memory only: losses are summed per item and divided once, by counts over
the whole optimizer step (training/optimize.py).
"""

import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rlhf_cli.data.tokens import Tokens

Item = TypeVar("Item")


@dataclass
class Batch:
    """Sequences padded on the right.

    ids: (B, T) token ids, 0 at pads (masked out everywhere).
    attention: (B, T) bool, True at real tokens.
    response: (B, T) bool, True at response tokens, EOS included; never at the first token.
    """

    ids: Tensor
    attention: Tensor
    response: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def positions(self) -> Tensor:
        """(B, T) positions counted from each sequence's first real token."""
        return (self.attention.long().cumsum(-1) - 1).clamp(min=0)


def collate(sequences: Sequence[Tokens], device: torch.device | str = "cpu") -> Batch:
    """Right-padded tensors. [1 2 | 3] and [1 | 4 5 6] become

    ids      1 2 3 0   attention 1 1 1 0   response 0 0 1 0
             1 4 5 6             1 1 1 1            0 1 1 1
    """
    width = max(len(sequence) for sequence in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    attention = torch.zeros(len(sequences), width, dtype=torch.bool)
    response = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        length, start = len(sequence), max(len(sequence.prompt), 1)
        ids[row, :length] = torch.tensor(sequence.prompt + sequence.response)
        attention[row, :length] = True
        response[row, start:length] = True
    return Batch(ids.to(device), attention.to(device), response.to(device))


def cut(
    items: Iterable[Item],
    tokens: int,
    length: Callable[[Item], int] = len,  # type: ignore[assignment]
) -> list[list[Item]]:
    """Groups whose padded size is at most `tokens`, longest first.

    An item longer than the budget stands alone.
    """
    groups: list[list[Item]] = []
    for item in sorted(items, key=length, reverse=True):
        if groups and (len(groups[-1]) + 1) * length(groups[-1][0]) <= tokens:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def derived_seed(seed: int, *names: object) -> int:
    """A seed for one named use, so that uses do not shift each other: (7, "rollout", 3)."""
    return zlib.crc32(repr((seed, *names)).encode())


def order_of(count: int, seed: int, name: str, epoch: int) -> list[int]:
    """The order of `count` items in one epoch: a permutation fixed by seed, name and epoch."""
    order = list(range(count))
    random.Random(derived_seed(seed, name, epoch)).shuffle(order)
    return order


def epochs_of(
    items: Sequence[Item], batch_size: int, epochs: int, seed: int, name: str
) -> Iterator[list[Item]]:
    """Shuffled batches of each epoch in turn; the last of an epoch may be smaller."""
    for epoch in range(epochs):
        order = order_of(len(items), seed, name, epoch)
        for start in range(0, len(items), batch_size):
            yield [items[i] for i in order[start : start + batch_size]]


def draw(items: Sequence[Item], count: int, seed: int, name: str, step: int) -> list[Item]:
    """The `step`-th run of `count` items of an endless, epoch-wise shuffled stream."""
    picked = []
    for place in range(step * count, (step + 1) * count):
        epoch, offset = divmod(place, len(items))
        picked.append((epoch, offset))
    orders = {epoch: order_of(len(items), seed, name, epoch) for epoch, _ in picked}
    return [items[orders[epoch][offset]] for epoch, offset in picked]
