"""Attention of one new token in each of many rows, some of which go on from the same prompt.

A prompt's keys and values are kept once and read once for all of its rows, whose queries are as
many rows of one product; what each row has of its own is read beside it. On a CPU, where a step is
bound by what it reads of them, that is most of what there was to save.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_cli.models.row_attention import Kind, OwnLayout


class PromptRows(OwnLayout):
    """One new token in each of B rows, which follow prompts that are kept aside.

    before: (B,) tokens of each row's prompt.
    own: (B,) tokens that follow it, the new one included; set before each step.
    prompts: (P, H_kv, S, d) keys and values of the layer that is computed, set by the cache.
    """

    def __init__(self, before: Tensor, members: Sequence[Sequence[int]]) -> None:
        """`members`: the rows of each prompt; a row of none gives no figure that means anything."""
        self.before = before
        self.own = torch.zeros_like(before)
        self.prompts: tuple[Tensor, Tensor] | None = None
        self._masks: dict[tuple[int | None, int, int], Tensor] = {}
        most = max(map(len, members))
        # prompt by prompt, each as often as the one of most rows
        filled = [[*rows, *[rows[0]] * (most - len(rows))] for rows in members]
        self._order = torch.tensor(filled)  # (P, R)
        self._places = torch.zeros_like(before)  # of each row in that order
        for prompt, rows in enumerate(members):
            self._places[list(rows)] = torch.arange(len(rows)) + prompt * most
        # as all are that begin together, until the first ends
        self._in_order = self._order.flatten().tolist() == list(range(len(before)))

    def begin(self, own: Tensor) -> None:
        """A step at which rows have so many tokens of their own, (B,)."""
        self.own = own
        self._masks = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, kind: Kind) -> Tensor:
        """(B, H, 1, d) queries and (B, H_kv, S, d) own keys and values -> (B, 1, H, d)."""
        assert self.prompts is not None
        keys, values = self.prompts
        heads = key.shape[1]
        q = query[:, :, 0].unflatten(1, (heads, -1)) * kind.scale  # (B, H_kv, G, d)
        of_prompt = self._apart(self._together(q) @ keys.transpose(-1, -2), q)
        scores = torch.cat([of_prompt, q @ key.transpose(-1, -2)], -1)  # (B, H_kv, G, S)
        if kind.softcap is not None:
            scores = kind.softcap * torch.tanh(scores / kind.softcap)
        scores += self._mask(kind.window, keys.shape[2], key.shape[2])
        if kind.sinks is not None:
            nothing = kind.sinks.view(1, heads, -1, 1).expand(len(q), -1, -1, 1)
            scores = torch.cat([scores, nothing], -1)
        weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        before, own = weights.split([keys.shape[2], weights.shape[-1] - keys.shape[2]], -1)
        out = self._apart(self._together(before) @ values, q)
        out += own[..., : value.shape[2]] @ value
        return out.flatten(1, 2)[:, None]

    def _together(self, rows: Tensor) -> Tensor:
        """(B, H, G, x) -> (P, H, R G, x), the rows of each prompt beside each other."""
        prompts, most = self._order.shape
        ordered = rows if self._in_order else rows[self._order.flatten()]
        return ordered.unflatten(0, (prompts, most)).transpose(1, 2).flatten(2, 3)

    def _apart(self, grouped: Tensor, like: Tensor) -> Tensor:
        """(P, H, R G, x) -> (B, H, G, x)."""
        rows = grouped.unflatten(2, (-1, like.shape[2])).transpose(1, 2).flatten(0, 1)
        return rows if self._in_order else rows[self._places]

    def _mask(self, window: int | None, prompt: int, own: int) -> Tensor:
        """(B, 1, 1, S), -inf where a row does not see a place; the same for all layers of a step.

        Args:
            window: the most tokens that one sees, itself included.
            prompt, own: places of prompts and of rows.
        """
        key = window, prompt, own
        if key not in self._masks:
            before, now = self.before[:, None], self.own[:, None]  # (B, 1)
            in_prompt, in_own = torch.arange(prompt), torch.arange(own)
            seen = torch.cat([in_prompt < before, in_own < now], -1)
            if window is not None:
                first = before + now - window
                seen &= torch.cat([in_prompt >= first, before + in_own >= first], -1)
            nothing = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
            self._masks[key] = nothing[:, None, None]
        return self._masks[key]
