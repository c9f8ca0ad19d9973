"""Batches: padded tensors cut by a token budget, and data order as a function of the seed.

A budget changes speed and memory only: losses are summed per item and divided once, by counts over
the whole optimizer step (training/optimize.py).
"""

import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_cli.data.tokens import Answers, Tokens

Item = TypeVar("Item")
# A token of hidden width d takes as long as ATTENTION * d pairs of tokens that attention looks at:
# fits the times of benchmarks/shared_prompts.py for d from 64 to 768 (2 to 4, by case).
ATTENTION = 3


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


@dataclass
class AnswerBatch:
    """Responses to a few prompts, S in all: group by group, in each group's order.

    Two layouts hold them, and only `ids`, `positions` and `attention` tell which: separate, with a
    row per response, B = S; shared, with a row per group: its prompt, then all of its responses.

    ids: (B, T) token ids, 0 at pads.
    positions: (B, T) places in prompt + response, whatever stands between them in the row.
    attention: separate (B, T) bool, True at real tokens; shared (B, 1, T, T) bool, True where the
        token at [2] may see the token at [3].
    at: (S, R) each response token's place in the flat B x T; pads repeat the last.
    before: (S, R) the place of the token that predicts it.
    response: (S, R) bool, True at response tokens, EOS included; never at a sequence's first token.
    """

    ids: Tensor
    positions: Tensor
    attention: Tensor
    at: Tensor
    before: Tensor
    response: Tensor

    def __len__(self) -> int:
        return len(self.response)


def _rows(groups: Sequence[Answers], share: bool) -> list[Answers]:
    """The rows of a layout. An empty prompt leaves nothing to share, nor to predict from."""
    rows: list[Answers] = []
    for group in groups:
        if share and group.prompt:
            rows.append(group)
        else:
            rows += [Answers(group.prompt, [each], group.row) for each in group.responses]
    return rows


def _longest(rows: Sequence[Answers]) -> int:
    """Tokens of the longest row: its prompt once, and all of its responses."""
    return max(len(row.prompt) + sum(map(len, row.responses)) for row in rows)


def sharing_pays(groups: Sequence[Answers], width: int) -> bool:
    """Whether computing each prompt once is faster, judged by the padded sizes of both layouts.

    A shared row saves tokens, but attention looks at every pair of its tokens, seen or not.

    Args:
        width: of the model's hidden states; the wider, the less attention weighs.
    """

    def cost(rows: list[Answers]) -> float:
        longest = _longest(rows)
        return len(rows) * longest * (1 + longest / (ATTENTION * width))

    return cost(_rows(groups, share=True)) < cost(_rows(groups, share=False))


def collate_answers(
    groups: Sequence[Answers], device: torch.device | str = "cpu", share: bool = False
) -> AnswerBatch:
    """Tensors in either layout. Prompt [1 2] with responses [3] and [4 5] becomes

    separate: ids  1 2 3 0   at  2 2   before  1 1      shared: ids  1 2 3 4 5   positions 0 1 2 2 3
                   1 2 4 5       6 7           5 6              at  2 2   before  1 1
                                                                    3 4           1 3

    In the shared row 4 and 5 see 1, 2 and each other, but not 3.
    """
    rows = _rows(groups, share)
    width = _longest(rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros_like(ids)
    owner = torch.full_like(ids, -1)  # 0: the prompt, n: the n-th response, -1: a pad
    lengths = [len(response) for row in rows for response in row.responses]
    at = torch.empty(len(lengths), max(lengths), dtype=torch.long)
    before = torch.empty_like(at)
    response = torch.empty_like(at, dtype=torch.bool)
    steps = torch.arange(max(lengths))
    s = 0
    for b, row in enumerate(rows):
        start = len(row.prompt)
        ids[b, :start] = torch.tensor(row.prompt)
        positions[b, :start] = torch.arange(start)
        owner[b, :start] = 0
        for number, tokens in enumerate(row.responses, 1):
            end = start + len(tokens)
            ids[b, start:end] = torch.tensor(tokens)
            positions[b, start:end] = len(row.prompt) + steps[: len(tokens)]
            owner[b, start:end] = number
            at[s] = b * width + start + steps.clamp(max=len(tokens) - 1)
            before[s] = at[s] - 1
            before[s, 0] = b * width + max(len(row.prompt) - 1, 0)
            response[s] = steps < len(tokens)
            response[s, 0] = len(row.prompt) > 0
            start, s = end, s + 1
    if share:
        query, key = owner[:, :, None], owner[:, None, :]
        # a pad sees the prompt and the pads up to itself, so that no softmax is over nothing
        sees = ((key == 0) | (key == query)).tril()  # (B, T, T)
        attention = sees[:, None]
    else:
        attention = owner >= 0
    tensors = (ids, positions, attention, at, before, response)
    return AnswerBatch(*(tensor.to(device) for tensor in tensors))


def rankings_of(
    items: Sequence[Answers], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(P, K) ranks of the responses of ranking rows, 1 is best, and (P, K) bool where they are."""
    ranks = [torch.tensor(item.row.ranks, dtype=torch.float32) for item in items]
    counts = torch.tensor([len(each) for each in ranks])
    mask = torch.arange(int(counts.max())) < counts[:, None]
    return pad_sequence(ranks, batch_first=True).to(device), mask.to(device)


def one(item: object) -> int:
    """The rows of an item that is one sequence."""
    return 1


def cut(
    items: Iterable[Item],
    tokens: int,
    length: Callable[[Item], int] = len,  # type: ignore[assignment]
    count: Callable[[Item], int] = one,
) -> list[list[Item]]:
    """Groups whose padded size, rows times the longest, is at most `tokens`, longest first.

    An item longer than the budget stands alone.

    Args:
        length: the tokens of an item's longest row.
        count: the rows that an item takes.
    """
    groups: list[list[Item]] = []
    rows = 0  # of the last group
    for item in sorted(items, key=length, reverse=True):
        if groups and (rows + count(item)) * length(groups[-1][0]) <= tokens:
            groups[-1].append(item)
            rows += count(item)
        else:
            groups.append([item])
            rows = count(item)
    return groups


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
