"""Slots of a CPU, which keep each prompt once for all slots that go on from it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_cli.models.prompt_attention import PromptRows
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.rollout.slots import SlotCache, SlotTable, Start

NOWHERE, NOTHING = -1, 0  # the place of no prompt, and the identity of none


class PromptCache(SlotCache):
    """Keys and values of responses by slot, and of prompts in a room of their own.

    prompts: by layer, (P, H_kv, S, d) each.
    shown: prompts, and tokens of them, that attention looks at.
    width: tokens of slots that it looks at.
    """

    def __init__(self, slots: int, reach: int) -> None:
        """Room for prompts of so many tokens."""
        super().__init__(slots, 0)
        self.prompts: dict[int, tuple[Tensor, Tensor]] = {}
        self.places = 0  # that prompts have
        self.shown = 0, 0
        self.layout: PromptRows | None = None
        self.width = 0
        self._reach = reach

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep (B, H_kv, T, d) keys and values; what the slots hold of their own is returned."""
        kept = self._prompts_of(layer_idx, key_states, value_states)
        if self._targets is not None:
            source, rows, places = self._targets
            for prompts_, each in zip(kept, (key_states, value_states), strict=True):
                prompts_[rows, :, places] = each[0].transpose(0, 1)[source]
            return key_states, value_states
        assert self.layout is not None
        count, reach = self.shown
        self.layout.prompts = kept[0][:count, :, :reach], kept[1][:count, :, :reach]
        keys, values = super().update(key_states, value_states, layer_idx)
        return keys[:, :, : self.width], values[:, :, : self.width]

    def _prompts_of(self, layer: int, *new: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer keeps of prompts, with a room for each place."""
        known = self.prompts.get(layer)
        if known is None or len(known[0]) < self.places:
            keys, values = (
                each.new_zeros(self.places, each.shape[1], self._reach, each.shape[3])
                for each in new
            )
            for own, old in zip((keys, values), known or (), strict=False):
                own[: len(old)] = old
            known = self.prompts[layer] = keys, values
        return known

    def move_prompt(self, source: int, target: int) -> None:
        """What is kept of a prompt goes to another place."""
        for kept in self.prompts.values():
            for each in kept:
                each[target] = each[source]


class PromptTable(SlotTable):
    """A table whose slots of one prompt share what is kept of it.

    before: (S,) tokens of each slot's prompt but the last, which a slot reads itself.
    """

    def __init__(
        self,
        model: nn.Module,
        sampling: Sampling,
        stop_ids: Sequence[int],
        slots: int,
        capacity: int,
    ) -> None:
        """As of slots."""
        super().__init__(model, sampling, stop_ids, slots, capacity)
        self._most = sampling.max_tokens
        self._kept = self.cache = PromptCache(slots, capacity - self._most)
        self.before = torch.zeros(slots, dtype=torch.long, device=self.device)
        self._held: list[int] = []  # by place, the prompt by its identity
        self._alive: dict[int, Sequence[int]] = {}  # so that an identity is that of one prompt
        self._of = [NOWHERE] * slots  # the place of each slot's prompt

    def reach(self, tokens: int) -> None:
        """Slots grow by what they hold of their own."""

    def state(self) -> dict[str, Tensor]:
        """With where responses begin."""
        return {**super().state(), "before": self.before}

    def _fill(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Read the prompts that are not kept from before."""
        for slot, ids in zip(slots, prompts, strict=True):
            self._of[slot] = self._held.index(id(ids)) if id(ids) in self._held else NOWHERE
            self.before[slot] = len(ids) - 1
        starts = []
        for slot, ids in zip(slots, prompts, strict=True):
            if id(ids) not in self._held:
                place = next(at for at in range(len(self._held) + 1) if at not in self._of)
                self._held += [NOTHING] * (place == len(self._held))
                self._held[place], self._alive[id(ids)] = id(ids), ids
                if len(ids) > 1:
                    starts.append(Start(ids[:-1], [place]))
            self._of[slot] = self._held.index(id(ids))
        self._alive = {each: ids for each, ids in self._alive.items() if each in self._held}
        self._kept.places = len(self._held)
        self._read_all(starts)

    def layout(self, rows: int) -> PromptRows:
        """How the first so many slots lie by now; prompts that none is left of are not read."""
        live = [slot for slot, ended in enumerate(self.ended[:rows].tolist()) if not ended]
        used = sorted({self._of[slot] for slot in live})
        for place in [each for each in used if each >= len(used)]:
            self._pack(place, next(at for at in range(len(used)) if at not in used))
            used = sorted({self._of[slot] for slot in live})
        members = [[slot for slot in live if self._of[slot] == place] for place in used]
        self._kept.shown = len(used), int(self.before[live].max())
        self._kept.layout = PromptRows(self.before[:rows], members)
        return self._kept.layout

    def _pack(self, source: int, target: int) -> None:
        """A prompt goes where one was that is not used any more."""
        self._kept.move_prompt(source, target)
        self._held[target], self._held[source] = self._held[source], NOTHING
        self._of = [target if at == source else NOWHERE if at == target else at for at in self._of]

    def read(self, rows: int) -> Tensor:
        """The states after the tokens that the first slots read now, (B, d)."""
        own = (self.places - self.before)[:rows]
        reach = int(own.where(~self.ended[:rows], 0).max()) + 1
        self._kept.grow(reach, self._most)
        self._kept.width = reach
        self._kept.to_append(own.clamp(max=reach - 1))
        assert self._kept.layout is not None
        self._kept.layout.begin(own + 1)
        return self._hidden(self.ids[:rows, None], self.places[:rows, None])[:, -1]

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """What some slots hold goes to others, which are free; the sources have ended then."""
        super().move(sources, targets)
        for source, target in zip(sources, targets, strict=True):
            self._of[target] = self._of[source]
