"""Batches: sequences as tensors, padded or packed, cut by a token budget.

A budget changes speed and memory only: losses are summed per item and divided once, by counts over
the whole optimizer step (training/optimize.py).
"""

from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_cli.config.schema.algorithms import DpoAlgo, RewardAlgo
from rlhf_cli.data.items import Answers, Judged, Tokens
from rlhf_cli.data.mixing import Quotas, epoch_order, epoch_size, quotas
from rlhf_cli.data.packing import PADDED, SHARED_FROM, Layout, Packing, pack
from rlhf_cli.data.transfer import numbers_like, to_device, together

Item = TypeVar("Item")


@dataclass
class Batch:
    """S sequences in B rows, and a grid, (S, R), that says where their tokens stand.

    Each has a padded row of its own, B = S, or all stand end to end in one, B = 1, where responses
    may share their prompt. The grid is over whole sequences or over response tokens only. Whoever
    reads tokens by the grid need not know which.

    ids: (B, T) token ids, 0 at pads (masked out everywhere).
    positions: (B, T) places in prompt + response, whatever stands between them in the row.
    attention: (B, T) bool, True at real tokens.
    at: (S, R) each token's place in the flat B x T; pads of the grid repeat the last token's.
    before: (S, R) the place of the token that predicts it; means nothing where none does.
    response: (S, R) bool, True at response tokens that carry loss, EOS included; never at a
        sequence's first token.
    stands_for: (B, T) the number of sequences that a token is part of; 0 at pads.
    scored: (N,) the places of `response` in the flat S x R, so that no device is asked for them.
    packing: which tokens see which, of a row of several sequences.
    """

    ids: Tensor
    positions: Tensor
    attention: Tensor
    at: Tensor
    before: Tensor
    response: Tensor
    stands_for: Tensor
    scored: Tensor
    packing: Packing | None = None

    def __len__(self) -> int:
        return len(self.response)


def collate(
    sequences: Sequence[Tokens], device: torch.device | str = "cpu", layout: Layout = PADDED
) -> Batch:
    """A grid over whole sequences. [1 2 | 3] and [1 | 4 5 6] become

    padded: ids  1 2 3 0   response 0 0 1 0   at 0 1 2 2   before 0 0 1 1
                 1 4 5 6            0 1 1 1      4 5 6 7          4 4 5 6
    packed: ids  1 2 3 1 4 5 6                at 0 1 2 2   before 0 0 1 1
                                                 3 4 5 6          3 3 4 5
    """
    return _collated(sequences, layout, True, device)


def collate_answers(
    groups: Sequence[Answers], device: torch.device | str = "cpu", layout: Layout = PADDED
) -> Batch:
    """A grid over response tokens, group by group, in each group's order.

    Prompt [1 2] with responses [3] and [4 5] becomes

    padded: ids  1 2 3 0   at  2 2   before  1 1      shared: ids  1 2 3 4 5   positions 0 1 2 2 3
                 1 2 4 5       6 7           5 6              at  2 2   before  1 1
                                                                  3 4           1 3

    In the shared row 4 and 5 see 1, 2 and each other, but not 3.
    """
    sequences = [each for group in groups for each in group.sequences]
    return _collated(sequences, layout, False, device)


def _collated(
    sequences: Sequence[Tokens], layout: Layout, whole: bool, device: torch.device | str
) -> Batch:
    """All is built on the host and moved once; `whole`: the grid is over whole sequences."""
    row = _packed_row(sequences, layout.shared) if layout.packed else _padded_rows(sequences)
    prompts = torch.tensor([len(each.prompt) for each in sequences])[:, None]  # (S, 1)
    lengths = torch.tensor([len(each) for each in sequences])[:, None]
    first = torch.zeros_like(prompts) if whole else prompts
    steps = first + torch.arange(int((lengths - first).max()))  # (S, R)
    inside = torch.minimum(steps, lengths - 1)
    starts, goes_on = (torch.tensor(each)[:, None] for each in (row.prompts, row.responses))

    def place(step: Tensor) -> Tensor:
        return torch.where(step < prompts, starts + step, goes_on + step - prompts)

    response = (steps >= prompts.clamp(min=1)) & (steps < lengths)
    for s, sequence in enumerate(sequences):
        if sequence.loss is not None:
            start = len(sequence.prompt) if whole else 0
            response[s, start : start + len(sequence.loss)] &= torch.tensor(sequence.loss)
    before = place((inside - 1).clamp(min=0))
    grids = [place(inside), before, response, row.stands_for, _places(response)]
    ids, positions, attention, *moved = together(
        [row.ids, row.positions, row.stands_for > 0, *grids], device
    )
    at, before, response, stands_for, scored = moved
    packing = None if row.pieces is None else _packing(row.pieces, torch.device(device))
    return Batch(ids, positions, attention, at, before, response, stands_for, scored, packing)


def _packing(pieces: "list[_Piece]", device: torch.device) -> Packing:
    """Who sees whom."""
    lengths = [each.tokens for each in pieces]
    if not any(each.seen for each in pieces):
        return Packing(lengths, device)
    ranges = [
        torch.arange(start, start + count)
        for each in pieces
        for start, count in ((each.prompt, each.seen), (each.start, each.tokens))
    ]
    key_lengths = [each.seen + each.tokens for each in pieces]
    return Packing(lengths, device, key_lengths, torch.cat(ranges))


def _places(response: Tensor) -> Tensor:
    """(N,) where it is True, in the flat mask."""
    return response.flatten().nonzero()[:, 0]


@dataclass
class _Rows:
    """Sequences laid out; (B, T) each, and of each sequence where its prompt and where its
    response begins in the flat B x T.
    """

    ids: Tensor
    positions: Tensor
    stands_for: Tensor
    prompts: list[int]
    responses: list[int]
    pieces: "list[_Piece] | None" = None


@dataclass
class _Piece:
    """Tokens on end in a row that see each other, causally, and perhaps a prompt before.

    start, tokens: in the flat row.
    prompt, seen: where that begins, and its tokens; 0 of them where it is none.
    stands_for: the sequences that it is part of.
    """

    start: int
    tokens: int
    prompt: int = 0
    seen: int = 0
    stands_for: int = 1


def _padded_rows(sequences: Sequence[Tokens]) -> _Rows:
    """A row each, with pads on the right."""
    rows = [torch.tensor(each.prompt + each.response) for each in sequences]
    ids = pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(each) for each in sequences])[:, None]
    places = torch.arange(ids.shape[1])
    starts = [s * ids.shape[1] for s in range(len(sequences))]
    return _Rows(
        ids,
        torch.minimum(places, lengths - 1),
        (places < lengths).long(),
        starts,
        [start + len(each.prompt) for start, each in zip(starts, sequences, strict=True)],
    )


def _packed_row(sequences: Sequence[Tokens], share: bool) -> _Rows:
    """All end to end, prompt by prompt; `share`: a prompt once for all of its responses."""
    ids: list[int] = []
    pieces: list[_Piece] = []
    prompts, responses = [0] * len(sequences), [0] * len(sequences)
    for prompt, members in _by_prompt(sequences, share):
        start = len(ids)
        if len(members) > 1:
            ids += prompt
            pieces.append(_Piece(start, len(prompt), stands_for=len(members)))
        for s in members:
            response = sequences[s].response
            if len(members) > 1:
                pieces.append(_Piece(len(ids), len(response), start, len(prompt)))
            else:
                pieces.append(_Piece(start, len(prompt) + len(response)))
                ids += prompt
            prompts[s], responses[s] = start, len(ids)
            ids += response
    lengths = torch.tensor([each.tokens for each in pieces])
    first = torch.tensor([each.start - each.seen for each in pieces])  # the place of position 0
    counts = torch.tensor([each.stands_for for each in pieces])
    return _Rows(
        torch.tensor(ids)[None],
        (torch.arange(len(ids)) - first.repeat_interleave(lengths))[None],
        counts.repeat_interleave(lengths)[None],
        prompts,
        responses,
        pieces,
    )


def _by_prompt(sequences: Sequence[Tokens], share: bool) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts with the places of the sequences that begin with them; each alone if not shared."""
    families: dict[Hashable, list[int]] = {}
    for s, each in enumerate(sequences):
        key = tuple(each.prompt) if share and len(each.prompt) >= SHARED_FROM else s
        families.setdefault(key, []).append(s)
    return ((sequences[members[0]].prompt, members) for members in families.values())


def rankings_of(
    items: Sequence[Answers], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(P, K) ranks of the responses of ranking rows, 1 is best, and (P, K) bool where they are."""
    ranks = [torch.tensor(item.row.ranks, dtype=torch.float32) for item in items]
    counts = torch.tensor([len(each) for each in ranks])
    mask = torch.arange(int(counts.max())) < counts[:, None]
    return to_device(pad_sequence(ranks, batch_first=True), device), to_device(mask, device)


def doubts_of(items: Sequence[Answers], algo: RewardAlgo | DpoAlgo, like: Tensor) -> Tensor | float:
    """The chance that the chosen side of a pair is not the better one: of each, (N,), by the soft
    labels of their rows, in the type of `like`; or of all.
    """
    if algo.soft_labels:
        return 1 - numbers_like(like, [item.row.p for item in items])
    return algo.label_smoothing or 0.0


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


def micro_batches(
    items: Iterable[Item],
    tokens: int,
    layout: Layout,
    of: Callable[[Item], Judged] = lambda item: item,  # type: ignore[assignment,return-value]
    ranks: int = 1,
) -> list[list[Item]]:
    """Groups of at most so many tokens, which are real ones in packed rows, else padded ones.

    Args:
        of: the responses of an item, and their prompt.
        ranks: that share them: there are as many for each, if there are enough items.
    """
    if layout.packed:
        return pack(items, tokens, layout, of, ranks)

    def longest(item: Item) -> int:
        return len(of(item).prompt) + max(map(len, of(item).responses))

    groups = cut(items, tokens, longest, lambda item: len(of(item).responses))
    while len(groups) % ranks:
        largest = max(groups, key=lambda group: len(group) * longest(group[0]))
        if len(largest) == 1:
            break
        groups.remove(largest)
        groups += [largest[::2], largest[1::2]]  # of like lengths both
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
