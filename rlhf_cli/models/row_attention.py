"""One attention for the two layouts without padding: sequences end to end, and slots of a cache.

transformers calls it by a name of its own in place of `sdpa`, and makes no mask for a name that it
does not know. What the layout is stands in this module for as long as a block lasts, as many
families hand no argument of ours on to their attention.

On a GPU with 16-bit numbers the flash kernels of torch compute it; else its plain products do, a
sequence at a time, which is the reference that tests and probes compare with.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig

NAME = "rlhf_rows"
FLASH_WIDTH = 256  # the widest head that the kernels take


class UnknownAttention(Exception):
    """An attention that is not computed here; whoever meets it goes back to padded rows."""


@dataclass(frozen=True)
class Packing:
    """Sequences end to end in one row, (1, T): each sees itself, causally, and no other.

    With `keys` a sequence sees tokens that stand elsewhere before its own, as a response does its
    prompt: its queries are the last of its keys.

    lengths: the tokens of each sequence; their sum is T.
    key_lengths: what each sees, its own tokens included; the same where `keys` is None.
    keys: (K,) places in the row of what each sees, one sequence after the other.
    """

    lengths: Sequence[int]
    device: torch.device
    key_lengths: Sequence[int] = ()
    keys: Tensor | None = None
    starts: Tensor = field(init=False)  # (S + 1,) int32
    key_starts: Tensor = field(init=False)  # (S + 1,) int32

    def __post_init__(self) -> None:
        seen = self.lengths if self.keys is None else self.key_lengths
        starts = _starts(self.lengths, self.device)
        made = {
            "key_lengths": seen,
            "starts": starts,
            "key_starts": starts if self.keys is None else _starts(seen, self.device),
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Slots:
    """One new token in each of B slots of a cache, whose layers return all that they hold.

    lengths: (B,) int32, the tokens that each slot holds, the new one included.
    starts: (B + 1,) int32, 0 to B.
    key_starts: (B + 1,) int32, the same times the capacity of a slot.
    """

    lengths: Tensor
    starts: Tensor
    key_starts: Tensor

    @classmethod
    def of(cls, lengths: Tensor, capacity: int) -> "Slots":
        """Slots of a capacity in tokens; `lengths` stays the same tensor as they grow."""
        starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
        return cls(lengths, starts, starts * capacity)


Layout = Packing | Slots
_layout: Layout | None = None


@contextmanager
def laid_out(model: nn.Module, layout: Layout) -> Iterator[None]:
    """The model reads its inputs in this layout within the block."""
    global _layout
    found = (getattr(each, "config", None) for each in model.modules())
    configs = {id(each): each for each in found if isinstance(each, PreTrainedConfig)}
    names = [(each, each._attn_implementation_internal) for each in configs.values()]
    before, _layout = _layout, layout
    try:
        for config, _ in names:
            config._attn_implementation_internal = NAME
        yield
    finally:
        _layout = before
        for config, name in names:
            config._attn_implementation_internal = name


def recomputing(model: nn.Module) -> tuple[AbstractContextManager[None], ...]:
    """The blocks of a checkpoint's forward and of its recomputation, for `context_fn`.

    A forward that is done again in the backward pass, when the block has ended, is to find the
    layout that it had.
    """
    again = nullcontext() if _layout is None else laid_out(model, _layout)
    return nullcontext(), again


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers asks of an attention: (B, H, T, d) queries -> (B, T, H, d).

    Args:
        key, value: (B, H_kv, S, d).
        sliding_window: the most tokens that one sees, itself included.
        softcap: c of c tanh(score / c).
        s_aux: (H,) a score of nothing, for each head.

    Raises:
        UnknownAttention: it is more than that.
    """
    causal = others.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if (
        attention_mask is not None
        or dropout
        or not causal
        or others.get("position_bias") is not None
    ):
        raise UnknownAttention(f"{type(module).__name__} masks, biases or drops what it sees")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    plain = softcap is None and s_aux is None
    kind = _Kind(scale, sliding_window, softcap, s_aux)
    flash = plain and _has_flash(query, key, value)
    if isinstance(_layout, Packing):
        return (_flash_packed if flash else _packed)(_layout, query, key, value, kind), None
    if isinstance(_layout, Slots):
        return (_flash_slots if flash else _slots)(_layout, query, key, value, kind), None
    raise UnknownAttention("no layout is set")


AttentionInterface.register(NAME, attend)


@dataclass(frozen=True)
class _Kind:
    """How scores are made and which count."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


def _starts(lengths: Sequence[int], device: torch.device) -> Tensor:
    """(S + 1,) int32, where each sequence begins, and the end of the last."""
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return starts.to(device, non_blocking=True)


def _has_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch's flash kernels take these tensors: Ampere or newer, 16 bits."""
    width = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and width == value.shape[-1]
        and width <= FLASH_WIDTH
        and width % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


# --------------------------------------------------------------------------- packed


def _flash_packed(
    layout: Packing, query: Tensor, key: Tensor, value: Tensor, kind: _Kind
) -> Tensor:
    """(1, T, H, d) by the kernels for sequences of any lengths, causal from the last key back."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, d)
    if layout.keys is not None:
        k, v = k[layout.keys], v[layout.keys]  # (K, H_kv, d)
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        layout.starts,
        layout.key_starts,
        max(layout.lengths),
        max(layout.key_lengths),
        0.0,
        True,
        False,
        scale=kind.scale,
        window_size_left=None if kind.window is None else kind.window - 1,
        window_size_right=None if kind.window is None else 0,
    )[0]
    return out[None]


def _packed(layout: Packing, query: Tensor, key: Tensor, value: Tensor, kind: _Kind) -> Tensor:
    """(1, T, H, d) a sequence at a time."""
    if layout.keys is not None:
        key, value = key[:, :, layout.keys], value[:, :, layout.keys]
    queries = query.split(list(layout.lengths), 2)
    keys = key.split(list(layout.key_lengths), 2)
    values = value.split(list(layout.key_lengths), 2)
    outs = [
        _products(q, k, v, kind, _seen(q.shape[2], k.shape[2], kind.window, q.device))
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(outs, 2).transpose(1, 2)


def _seen(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """(queries, keys) bool, what the last `queries` of so many tokens see; None: plainly causal."""
    if queries == keys and (window is None or keys <= window):
        return None
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return seen if window is None else seen.triu(keys - queries - window + 1)


# --------------------------------------------------------------------------- slots


def _flash_slots(layout: Slots, query: Tensor, key: Tensor, value: Tensor, kind: _Kind) -> Tensor:
    """(B, 1, H, d) by the same kernels, which look at no more of a slot than it holds."""
    q = query[:, :, 0]  # (B, H, d)
    k, v = (x.transpose(1, 2).flatten(0, 1) for x in (key, value))  # (B * capacity, H_kv, d)
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        layout.starts,
        layout.key_starts,
        1,
        key.shape[2],
        0.0,
        False,
        False,
        scale=kind.scale,
        window_size_left=None if kind.window is None else kind.window - 1,
        window_size_right=None if kind.window is None else 0,
        seqused_k=layout.lengths,
    )[0]
    return out[:, None]


def _slots(layout: Slots, query: Tensor, key: Tensor, value: Tensor, kind: _Kind) -> Tensor:
    """(B, 1, H, d) with a mask of what each slot holds."""
    places = torch.arange(key.shape[2], device=key.device)
    ends = layout.lengths[:, None]  # (B, 1)
    seen = places < ends
    if kind.window is not None:
        seen &= places >= ends - kind.window
    return _products(query, key, value, kind, seen[:, None, None]).transpose(1, 2)


# --------------------------------------------------------------------------- products


def _products(
    query: Tensor, key: Tensor, value: Tensor, kind: _Kind, seen: Tensor | None
) -> Tensor:
    """Attention as it is defined: (B, H, T, d), of keys and values (B, H_kv, S, d).

    Args:
        seen: bool, True where a query sees a key, to be broadcast; None: causal.
    """
    queries, heads = query.shape[2], key.shape[1]
    together = queries == 1 and kind.sinks is None
    if together:  # the heads of a group are as many queries of the same keys
        query = query.unflatten(1, (heads, -1)).flatten(2, 3)
    if kind.softcap is None and kind.sinks is None:
        out = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=seen,
            is_causal=seen is None and queries > 1,
            scale=kind.scale,
            enable_gqa=query.shape[1] > heads,
        )
    else:
        out = _by_scores(query, key, value, kind, seen)
    return out.unflatten(2, (-1, 1)).flatten(1, 2) if together else out


def _by_scores(
    query: Tensor, key: Tensor, value: Tensor, kind: _Kind, seen: Tensor | None
) -> Tensor:
    """The same by the scores themselves, for what is done to them before they are weighed."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * kind.scale  # (B, H, T, S)
    if kind.softcap is not None:
        scores = kind.softcap * torch.tanh(scores / kind.softcap)
    if seen is None:
        seen = torch.ones_like(scores[0, 0], dtype=torch.bool)
        seen = seen.tril() if query.shape[2] == key.shape[2] else seen
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if kind.sinks is not None:
        nothing = kind.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, nothing], -1)
    weights = scores.softmax(-1, dtype=torch.float32)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value
