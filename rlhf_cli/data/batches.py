"""Batches: sequences as padded tensors, cut by a token budget.

A budget changes speed and memory only: losses are summed per item and divided once, by counts over
the whole optimizer step (training/optimize.py).
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_cli.data.items import Answers, Tokens
from rlhf_cli.data.mixing import Quotas, epoch_order, epoch_size, quotas

Item = TypeVar("Item")
# A token of hidden width d takes as long as ATTENTION * d pairs of tokens that attention looks at:
# fits the times of benchmarks/shared_prompts.py for d from 64 to 768 (2 to 4, by case).
ATTENTION = 3


@dataclass
class Batch:
    """S sequences in B padded rows, and a grid, (S, R), that says where their tokens stand.

    A row holds one sequence, B = S, or a prompt and then all of its responses, which share it:
    B < S. The grid is over whole sequences, R = T, or over response tokens only. Whoever reads
    tokens by the grid need not know which.

    ids: (B, T) token ids, 0 at pads (masked out everywhere).
    positions: (B, T) places in prompt + response, whatever stands between them in the row.
    attention: (B, T) bool, True at real tokens; of shared prompts (B, 1, T, T) bool, True where
        the token at [2] may see the token at [3].
    at: (S, R) each token's place in the flat B x T; pads of the grid repeat the last token's.
    before: (S, R) the place of the token that predicts it; means nothing where none does.
    response: (S, R) bool, True at response tokens that carry loss, EOS included; never at a
        sequence's first token.
    stands_for: (B, T) the number of sequences that a token is part of; 0 at pads.
    """

    ids: Tensor
    positions: Tensor
    attention: Tensor
    at: Tensor
    before: Tensor
    response: Tensor
    stands_for: Tensor

    def __len__(self) -> int:
        return len(self.response)

    @classmethod
    def of_sequences(cls, ids: Tensor, attention: Tensor, response: Tensor) -> "Batch":
        """A grid over whole sequences, a row each, with pads on either side: (B, T) each."""
        places = torch.arange(ids.shape[1], device=ids.device)  # (T,)
        last = (places * attention).amax(-1, keepdim=True)  # (B, 1)
        in_row = torch.minimum(places, last)  # (B, T)
        rows = ids.shape[1] * torch.arange(len(ids), device=ids.device)[:, None]  # (B, 1)
        return cls(
            ids,
            positions=(attention.long().cumsum(-1) - 1).clamp(min=0),  # from the first real token
            attention=attention,
            at=rows + in_row,
            before=rows + (in_row - 1).clamp(min=0),
            response=response,
            stands_for=attention.long(),
        )


def _lay_out(rows: Sequence[Tokens | Answers]) -> tuple[Tensor, Tensor]:
    """Each prompt and what follows it in rows that are padded on the right.

    Returns:
        (B, T) ids, 0 at pads, and (B, T) owners: 0 the prompt, n the n-th response, -1 a pad.
    """
    ids = torch.zeros(len(rows), _longest(rows), dtype=torch.long)
    owner = torch.full_like(ids, -1)
    for b, row in enumerate(rows):
        start = 0
        for number, tokens in enumerate([row.prompt, *row.responses]):
            end = start + len(tokens)
            ids[b, start:end] = torch.tensor(tokens)
            owner[b, start:end] = number
            start = end
    return ids, owner


def _longest(rows: Sequence[Tokens | Answers]) -> int:
    """Tokens of the longest row: its prompt once, and all of its responses."""
    return max(len(row.prompt) + sum(map(len, row.responses)) for row in rows)


def collate(sequences: Sequence[Tokens], device: torch.device | str = "cpu") -> Batch:
    """A row and a grid over whole sequences. [1 2 | 3] and [1 | 4 5 6] become

    ids  1 2 3 0   attention 1 1 1 0   response 0 0 1 0   at 0 1 2 2   before 0 0 1 1
         1 4 5 6             1 1 1 1            0 1 1 1      4 5 6 7          4 4 5 6
    """
    ids, owner = _lay_out(sequences)
    response = owner == 1
    response[:, 0] = False
    for b, sequence in enumerate(sequences):
        if sequence.loss is not None:
            start = len(sequence.prompt)
            response[b, start : start + len(sequence.loss)] &= torch.tensor(sequence.loss)
    return Batch.of_sequences(ids.to(device), (owner >= 0).to(device), response.to(device))


def _rows(groups: Sequence[Answers], share: bool) -> list[Tokens | Answers]:
    """The rows of a layout. An empty prompt leaves nothing to share, nor to predict from."""
    rows: list[Tokens | Answers] = []
    for group in groups:
        rows += [group] if share and group.prompt else group.sequences
    return rows


def sharing_pays(groups: Sequence[Answers], width: int) -> bool:
    """Whether computing each prompt once is faster, judged by the padded sizes of both layouts.

    A shared row saves tokens, but attention looks at every pair of its tokens, seen or not.

    Args:
        width: of the model's hidden states; the wider, the less attention weighs.
    """

    def cost(rows: Sequence[Tokens | Answers]) -> float:
        longest = _longest(rows)
        return len(rows) * longest * (1 + longest / (ATTENTION * width))

    return cost(_rows(groups, share=True)) < cost(_rows(groups, share=False))


def collate_answers(
    groups: Sequence[Answers], device: torch.device | str = "cpu", share: bool = False
) -> Batch:
    """A grid over response tokens, group by group, in each group's order.

    Prompt [1 2] with responses [3] and [4 5] becomes

    separate: ids  1 2 3 0   at  2 2   before  1 1      shared: ids  1 2 3 4 5   positions 0 1 2 2 3
                   1 2 4 5       6 7           5 6              at  2 2   before  1 1
                                                                    3 4           1 3

    In the shared row 4 and 5 see 1, 2 and each other, but not 3.
    """
    rows = _rows(groups, share)
    ids, owner = _lay_out(rows)
    positions = torch.zeros_like(ids)
    lengths = [len(response) for row in rows for response in row.responses]
    steps = torch.arange(max(lengths))
    at = torch.empty(len(lengths), max(lengths), dtype=torch.long)
    before = torch.empty_like(at)
    response = torch.empty_like(at, dtype=torch.bool)
    s = 0
    for b, row in enumerate(rows):
        first, prompt = b * ids.shape[1], len(row.prompt)
        positions[b, :prompt] = torch.arange(prompt)
        start = prompt
        for length in map(len, row.responses):
            positions[b, start : start + length] = prompt + steps[:length]
            at[s] = first + start + steps.clamp(max=length - 1)
            before[s] = at[s] - 1
            before[s, 0] = first + max(prompt - 1, 0)
            response[s] = steps < length
            response[s, 0] = prompt > 0
            start, s = start + length, s + 1
    attention = owner >= 0
    stands_for = attention.long()
    if share:
        counts = torch.tensor([len(row.responses) for row in rows])
        stands_for = torch.where(owner == 0, counts[:, None], stands_for)
        query, key = owner[:, :, None], owner[:, None, :]
        # a pad sees the prompt and the pads up to itself, so that no softmax is over nothing
        attention = ((key == 0) | (key == query)).tril()[:, None]  # (B, 1, T, T)
    tensors = (ids, positions, attention, at, before, response, stands_for)
    return Batch(*(tensor.to(device) for tensor in tensors))


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


class EpochBatches(Generic[Item]):
    """Shuffled batches of each epoch in turn, one per step; the last of an epoch may be smaller.

    Any batch can be had at once, without those before it.
    """

    def __init__(
        self,
        items: Sequence[Item],
        batch_size: int,
        epochs: int,
        seed: int,
        name: str,
        max_steps: int | None = None,
    ) -> None:
        """Seed and name fix the orders, as in `epoch_order`; `max_steps` ends the last epoch."""
        self._items, self._size, self._epochs = items, batch_size, epochs
        self._seed, self._name, self._most = seed, name, max_steps
        self._quotas = quotas(items)
        self._per_epoch = -(-epoch_size(items) // batch_size)
        self._epoch = -1  # the one whose order is known
        self._order: array[int] = array("q")

    def __len__(self) -> int:
        """Steps of all epochs."""
        steps = self._per_epoch * self._epochs
        return steps if self._most is None else min(steps, self._most)

    def __getitem__(self, step: int) -> list[Item]:
        """The batch of a step, counted from 0."""
        epoch, place = divmod(range(len(self))[step], self._per_epoch)
        if epoch != self._epoch:
            self._order = epoch_order(self._quotas, self._seed, self._name, epoch)
            self._epoch = epoch
        start = place * self._size
        return [self._items[i] for i in self._order[start : start + self._size]]

    def __iter__(self) -> Iterator[list[Item]]:
        """All of them in turn."""
        return (self[step] for step in range(len(self)))


STREAMS = 64  # whose orders are kept between draws: those of a run, and of the run before it
_orders: "dict[tuple[Quotas, int, str], dict[int, array[int]]]" = {}


def draw(items: Sequence[Item], count: int, seed: int, name: str, step: int) -> list[Item]:
    """The `step`-th run of `count` items of an endless, epoch-wise shuffled stream.

    The order of an epoch is made once: to shuffle a million items takes seconds.
    """
    size = epoch_size(items)
    places = [divmod(place, size) for place in range(step * count, (step + 1) * count)]
    stream = (quotas(items), seed, name)
    known = _orders.pop(stream, {})
    orders = {epoch: known.get(epoch) for epoch, _ in places}
    made = {
        epoch: epoch_order(*stream, epoch) if order is None else order
        for epoch, order in orders.items()
    }
    _orders[stream] = made  # the latest at the end
    while len(_orders) > STREAMS:
        del _orders[next(iter(_orders))]
    return [items[made[epoch][offset]] for epoch, offset in places]
