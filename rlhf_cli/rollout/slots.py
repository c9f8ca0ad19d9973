"""Slots: rows of a cache that each hold a response at its own length, and a step of all of them.

A slot starts with all tokens of its prompt but the last; a step reads one token in each slot, draws
the next and moves on where the slot has not ended. It has fixed shapes, writes in place and asks
nothing of the device, so that a graph of it can be replayed (rollout/graphs.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from rlhf_cli.data.packing import Packing
from rlhf_cli.models.decoder import embedding_rows, taken_by, trunk, unembed
from rlhf_cli.models.kernels import tried
from rlhf_cli.models.row_attention import Layout, Slots, laid_out
from rlhf_cli.rollout.sampling import Chooser, Sampling, seen_in

GROWTH = 32  # tokens by which slots grow
PASS = 8192  # tokens of prompts that are read in one pass, but for one that is longer


@dataclass(frozen=True)
class Start:
    """A prompt's tokens but the last, and the slots whose responses it begins."""

    ids: Sequence[int]
    slots: Sequence[int]


class SlotCache(Cache):
    """Keys and values of slots: per layer (slots, H_kv, capacity, d) each, made as they first come.

    Windows keep all of their keys; the attention looks at no more than it should. In memory the
    tokens of a slot come first on a GPU, as its kernels want them, and the heads elsewhere.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.slots, self.capacity = slots, capacity
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._targets: tuple[Tensor, Tensor, Tensor] | None = None
        self._places: Tensor | None = None
        self._rows = torch.arange(slots)

    def to_copy(self, starts: Sequence[Start], device: torch.device) -> None:
        """The next pass reads these prompts end to end; its keys and values go to their slots."""
        firsts = accumulate([len(start.ids) for start in starts], initial=0)
        source, rows, places = [], [], []
        for first, start in zip(firsts, starts, strict=False):
            steps = torch.arange(len(start.ids))
            source.append((first + steps).repeat(len(start.slots)))
            places.append(steps.repeat(len(start.slots)))
            rows.append(torch.tensor(start.slots).repeat_interleave(len(start.ids)))
        source_, rows_, places_ = (torch.cat(each).to(device) for each in (source, rows, places))
        self._targets = source_, rows_, places_

    def to_append(self, places: Tensor) -> None:
        """The next passes read a token in each of the first slots, at (B,) places."""
        self._targets, self._places = None, places

    def grow(self, tokens: int, most: int) -> None:
        """Give each slot room for so many tokens, and a few more so that it need not grow soon.

        What is beyond `most` is of slots that have ended: nothing moves then, as graphs of a step
        hold where keys and values are.
        """
        if min(tokens, most) <= self.capacity:
            return
        capacity = min(-(-tokens // GROWTH) * GROWTH, most)
        for layer, kept in self.kept.items():
            keys, values = (self._room(each, capacity) for each in kept)
            for new, old in zip((keys, values), kept, strict=True):
                new[:, :, : self.capacity] = old
                new[:, :, self.capacity :] = 0
            self.kept[layer] = keys, values
        self.capacity = capacity

    def _room(self, like: Tensor, capacity: int) -> Tensor:
        """Room for keys or values like (B, H_kv, T, d): (slots, H_kv, capacity, d) of any value."""
        _, heads, _, width = like.shape
        if like.is_cuda:
            return like.new_empty(self.slots, capacity, heads, width).transpose(1, 2)
        return like.new_empty(self.slots, heads, capacity, width)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep (B, H_kv, T, d) keys and values; all that the tokens' rows hold is returned."""
        new = key_states, value_states
        if layer_idx not in self.kept:
            keys, values = (self._room(each, self.capacity).zero_() for each in new)
            self.kept[layer_idx] = keys, values
        kept = self.kept[layer_idx]
        if self._targets is not None:
            source, rows, places = self._targets
            for slots, each in zip(kept, new, strict=True):
                slots[rows, :, places] = each[0].transpose(0, 1)[source]
            return new
        assert self._places is not None
        at = self._places
        if key_states.is_cuda:
            _append(kept, new, at)
        else:
            for slots, each in zip(kept, new, strict=True):
                slots[self._rows[: len(at)], :, at] = each[:, :, 0]
        return kept[0][: len(at)], kept[1][: len(at)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing that is asked for it goes by it: positions and masks are given."""
        return 0


def _append(kept: Sequence[Tensor], new: Sequence[Tensor], places: Tensor) -> None:
    """Write (B, H_kv, 1, d) keys and values to places of the first slots, on CUDA."""
    kernels = _kernels()
    if kernels is not None and all(each.stride(-1) == 1 for each in new):
        kernels.append(*kept, *new, places)
        return
    for slots, each in zip(kept, new, strict=True):
        # a scatter, as an assignment by index sorts first where sums are to keep their order
        own = slots[: len(places)]
        own.scatter_(2, places[:, None, None, None].expand(each.shape), each)


@cache
def _kernels() -> Any:
    """The kernel that writes keys and values, if it runs."""

    def trial(kernels: Any) -> None:
        kept, new = (torch.zeros(2, 1, 1, 8, device="cuda") for _ in range(2))
        kernels.append(kept[:1], kept[1:], new[:1], new[1:], torch.zeros(1, device="cuda").long())

    return tried("rlhf_cli.rollout.slot_kernels", trial, "keys and values are kept")


class SlotTable:
    """All slots of a model at one way of sampling, and what is drawn in them.

    The first so many slots take part in a step; one that has ended stays as it is.

    ids: (S,) the token that each slot reads next.
    places: (S,) where it stands in prompt + response.
    drawn: (S,) tokens of the response so far.
    ended: (S,) whether nothing is to be drawn any more.
    bad: (S,) whether logits were not finite before the end.
    noise: (S, max_tokens + 1) uniform numbers that decide the draws, and one that nobody reads.
    tokens, logprobs: (S, max_tokens + 1) of the response, and one that nobody reads.
    seen: (S, V) the ids of prompt and response, where the repetition penalty asks for them.
    """

    def __init__(
        self,
        model: nn.Module,
        sampling: Sampling,
        stop_ids: Sequence[int],
        slots: int,
        capacity: int,
    ) -> None:
        """Room for so many slots with so many tokens each; none is in use."""
        self._model, self._trunk = model, trunk(model)
        self.slots, self.capacity = slots, capacity
        # a graph wants tensors that stay; without one, attention to empty room is saved
        self.cache = SlotCache(slots, capacity if next(model.parameters()).is_cuda else 0)
        self.device = next(model.parameters()).device
        self._layouts: dict[int, Slots] = {}
        self._choose = Chooser(sampling, list(stop_ids), self.device)
        self._stops = torch.tensor(stop_ids, dtype=torch.long, device=self.device)

        def zeros(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(slots, *size, dtype=dtype, device=self.device)

        longest = sampling.max_tokens + 1
        self.ids = zeros(dtype=torch.long)
        self.places = zeros(dtype=torch.long)
        self.lengths = zeros(dtype=torch.int32)
        self.drawn = zeros(dtype=torch.long)
        self.ended = ~zeros(dtype=torch.bool)
        self.bad = zeros(dtype=torch.bool)
        self.noise = zeros(longest, dtype=torch.float32)
        self.tokens = zeros(longest, dtype=torch.long)
        self.logprobs = zeros(longest, dtype=torch.float32)
        self.seen: Tensor | None = None
        if self._choose.penalises:
            self.seen = zeros(embedding_rows(model), dtype=torch.bool)

    def reach(self, tokens: int) -> None:
        """Give each slot room for so many tokens now."""
        self.cache.grow(tokens, self.capacity)

    def state(self) -> dict[str, Tensor]:
        """All that a step changes but keys and values, which it writes alike however often."""
        names = ("ids", "places", "drawn", "ended", "bad", "tokens", "logprobs", "seen")
        own = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in own.items() if tensor is not None}

    def start(self, slots: Sequence[int], prompts: Sequence[Sequence[int]], noise: Tensor) -> None:
        """Begin a response to each prompt; one that is the same object several times is read once.

        Args:
            noise: (N, max_tokens).
        """
        self.reach(max(map(len, prompts)))
        at = torch.tensor(slots, device=self.device)

        def put(own: Tensor, values: Any) -> None:
            own[at] = torch.as_tensor(values, dtype=own.dtype).to(self.device)

        put(self.ids, [ids[-1] for ids in prompts])
        put(self.places, [len(ids) - 1 for ids in prompts])
        put(self.drawn, [0] * len(prompts))
        put(self.ended, [False] * len(prompts))
        put(self.bad, [False] * len(prompts))
        put(self.noise, nn.functional.pad(noise, (0, 1)))
        if self.seen is not None:
            size = self.seen.shape[1]
            put(self.seen, torch.cat([seen_in(torch.tensor([ids]), size) for ids in prompts]))
        self._fill(slots, prompts)

    def _fill(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Read each prompt once, into all of its slots."""
        shared: dict[int, Start] = {}
        for slot, ids in zip(slots, prompts, strict=True):
            known = shared.setdefault(id(ids), Start(ids[:-1], []))
            shared[id(ids)] = Start(known.ids, [*known.slots, slot])
        self._read_all([each for each in shared.values() if each.ids])

    def _read_all(self, starts: Sequence[Start]) -> None:
        for part in _passes(starts):
            self._read(part)

    def _read(self, starts: Sequence[Start]) -> None:
        """One pass over some prompts, end to end."""
        ids = torch.tensor([[id for start in starts for id in start.ids]])
        positions = torch.cat([torch.arange(len(start.ids)) for start in starts])[None]
        self.cache.to_copy(starts, self.device)
        packing = Packing([len(start.ids) for start in starts], self.device)
        with laid_out(self._model, packing):
            self._hidden(ids.to(self.device), positions.to(self.device))

    def _hidden(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The last states of the trunk: (B, T) -> (B, T, d)."""
        output = self._trunk(
            **taken_by(
                self._trunk,
                input_ids=ids,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
            )
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def layout(self, rows: int) -> Layout:
        """How the first so many slots lie, for `laid_out` around steps of them.

        It stays the same one, for a graph of a step holds where its tensors are.
        """
        if rows not in self._layouts:
            self._layouts[rows] = Slots.of(self.lengths[:rows], self.capacity)
        return self._layouts[rows]

    def step(self, rows: int) -> None:
        """Read a token in each of the first slots and draw the next one; within `layout`."""
        logits = unembed(self._model, self.read(rows))
        self._write(rows, logits)

    def read(self, rows: int) -> Tensor:
        """The states after the tokens that the first slots read now, (B, d)."""
        places = self.places[:rows]
        torch.add(places, 1, out=self.lengths[:rows])
        self.cache.to_append(places)
        return self._hidden(self.ids[:rows, None], places[:, None])[:, -1]

    def _write(self, rows: int, logits: Tensor) -> None:
        """Draw from (B, V) logits and move on where a slot has not ended."""
        drawn, ended = self.drawn[:rows], self.ended[:rows]
        most = self.tokens.shape[1] - 1
        at = drawn.masked_fill(ended, most)[
            :, None
        ]  # (B, 1); what has ended writes where none read
        noise = self.noise[:rows].gather(1, at)[:, 0]
        seen = None if self.seen is None else self.seen[:rows]
        token, logprob, sound = self._choose(logits, noise, drawn, seen)
        self.bad[:rows] |= ~sound
        self.tokens[:rows].scatter_(1, at, token[:, None])
        self.logprobs[:rows].scatter_(1, at, logprob[:, None])
        if seen is not None:
            seen.scatter_(1, token[:, None], True)
        drawn += ~ended
        ended |= (token[:, None] == self._stops).any(-1) | (drawn >= most)
        self.ids[:rows] = torch.where(ended, self.ids[:rows], token)
        self.places[:rows] += ~ended

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """What some slots hold goes to others, which are free; the sources have ended then."""
        source, target = (torch.tensor(each, device=self.device) for each in (sources, targets))
        for own in (*self.state().values(), self.noise):
            own[target] = own[source]
        for keys_and_values in self.cache.kept.values():
            for own in keys_and_values:
                own[target] = own[source]
        self.ended[source] = True


def _passes(starts: Sequence[Start]) -> list[list[Start]]:
    """Prompts in order, as many at once as a pass is to read."""
    passes: list[list[Start]] = []
    tokens = 0
    for start in starts:
        if not passes or tokens + len(start.ids) > PASS:
            passes.append([])
            tokens = 0
        passes[-1].append(start)
        tokens += len(start.ids)
    return passes
