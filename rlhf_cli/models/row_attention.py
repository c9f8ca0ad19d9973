"""One attention for the two layouts without padding: sequences end to end, and slots of a cache.

transformers calls it by a name of its own in place of `sdpa`, and makes no mask for a name that it
does not know. What the layout is stands in this module for as long as a block lasts, as many
families hand no argument of ours on to their attention.

On a GPU with 16-bit numbers the flash kernels of torch compute it; else its plain products do, a
sequence at a time, which is the reference that tests and probes compare with.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig

from rlhf_cli.data.packing import Packing

NAME = "rlhf_rows"
FLASH_WIDTH = 256  # the widest head that the kernels take


class UnknownAttention(Exception):
    """An attention that is not computed here; whoever meets it goes back to padded rows."""


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


class OwnLayout(ABC):
    """A layout that computes attention by itself."""

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, kind: "Kind") -> Tensor:
        """(B, H, T, d) queries, (B, H_kv, S, d) keys and values -> (B, T, H, d)."""


Layout = Packing | Slots | OwnLayout
_layout: Layout | None = None
_configs: WeakKeyDictionary[nn.Module, list[PreTrainedConfig]] = WeakKeyDictionary()


class laid_out:  # a block, which may be entered again once it has ended  # noqa: N801
    """The model reads its inputs in this layout within the block."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        if model not in _configs:
            found = (getattr(each, "config", None) for each in model.modules())
            unique = {id(each): each for each in found if isinstance(each, PreTrainedConfig)}
            _configs[model] = list(unique.values())
        self._configs = _configs[model]
        self._layout = layout

    def __enter__(self) -> None:
        global _layout
        self._names = [config._attn_implementation_internal for config in self._configs]
        self._before, _layout = _layout, self._layout
        for config in self._configs:
            config._attn_implementation_internal = NAME

    def __exit__(self, *error: object) -> None:
        global _layout
        _layout = self._before
        for config, name in zip(self._configs, self._names, strict=True):
            config._attn_implementation_internal = name


def recomputing(
    model: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
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
    kind = Kind(scale, sliding_window, softcap, s_aux)
    flash = plain and _has_flash(query, key, value)
    if isinstance(_layout, Packing):
        if plain and torch.compiler.is_compiling():
            return _in_graph(query, key, value, scale, sliding_window)[0], None
        return (_flash_packed if flash else _packed)(_layout, query, key, value, kind), None
    if isinstance(_layout, Slots):
        return (_flash_slots if flash else _slots)(_layout, query, key, value, kind), None
    if isinstance(_layout, OwnLayout):
        return _layout.attend(query, key, value, kind), None
    raise UnknownAttention("no layout is set")


AttentionInterface.register(NAME, attend)


@dataclass(frozen=True)
class Kind:
    """How scores are made and which count."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


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


def _flash_packed(layout: Packing, query: Tensor, key: Tensor, value: Tensor, kind: Kind) -> Tensor:
    """(1, T, H, d) by the kernels for sequences of any lengths, causal from the last key back."""
    out: Tensor = _flash_forward(layout, query, key, value, kind)[0]
    return out[None]


def _flash_forward(
    layout: Packing, query: Tensor, key: Tensor, value: Tensor, kind: Kind
) -> tuple[Tensor, ...]:
    """(T, H, d) and what its backward needs."""
    return torch.ops.aten._flash_attention_forward(
        *_rows(layout, query, key, value),
        *_sizes(layout),
        0.0,
        True,
        False,
        **_settings(kind),
    )


def _rows(layout: Packing, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Queries (T, H, d), keys and values (K, H_kv, d), as each sequence sees them."""
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    if layout.keys is None:
        return q, k, v
    both: Tensor = _AsSeen.apply(torch.cat([k, v], -1), layout)
    return q, both[..., : k.shape[-1]], both[..., k.shape[-1] :]


class _AsSeen(torch.autograd.Function):
    """(T, H, d) -> (K, H, d): keys or values as each sequence sees them."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, layout: Packing) -> Tensor:
        ctx.layout = layout
        return tokens[layout.keys]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _of_tokens(ctx.layout, grad), None


def _of_tokens(layout: Packing, grad: Tensor) -> Tensor:
    """(K, H, d) gradients of what sequences see -> (T, H, d), the sums of those of each token."""
    assert layout.repeated is not None
    filled = torch.cat([grad, torch.zeros_like(grad[:1])])
    sums = filled[layout.repeated].sum(1, dtype=torch.float32).to(grad.dtype)
    return torch.cat([filled, sums])[layout.whence]


def _sizes(layout: Packing) -> tuple[Tensor, Tensor, int, int]:
    """Where sequences begin, of queries and keys, and the longest of each."""
    return layout.starts, layout.key_starts, layout.longest, layout.longest_keys


def _settings(kind: Kind) -> dict[str, Any]:
    """The kernels' words for a scale and a window."""
    left = None if kind.window is None else kind.window - 1
    right = None if kind.window is None else 0
    return {"scale": kind.scale, "window_size_left": left, "window_size_right": right}


def _packed(layout: Packing, query: Tensor, key: Tensor, value: Tensor, kind: Kind) -> Tensor:
    """(1, T, H, d) a sequence at a time."""
    query, key, value = (x.transpose(0, 1)[None] for x in _rows(layout, query, key, value))
    queries = query.split(list(layout.lengths), 2)
    keys = key.split(list(layout.key_lengths), 2)
    values = value.split(list(layout.key_lengths), 2)
    outs = []
    for q, k, v in zip(queries, keys, values, strict=True):
        sizes = q.shape[2], k.shape[2], kind.window
        seen = None if _plainly_causal(*sizes) else _seen(*sizes, q.device)
        outs.append(_products(q, k, v, kind, seen))
    return torch.cat(outs, 2).transpose(1, 2)


def _seen(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) bool, what the last `queries` of so many tokens see."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return seen if window is None else seen.triu(keys - queries - window + 1)


def _plainly_causal(queries: int, keys: int, window: int | None) -> bool:
    """Whether each query sees all keys up to its own, as kernels without a mask have it."""
    return queries == keys and (window is None or keys <= window)


# --------------------------------------------------------------------------- compiled

# A layer that is compiled is one graph for sequences of any number and lengths: it sees an operator
# and not the layout, which the operator finds here, by number in backward.
RECENT = 64  # layouts whose backward may still come
_recent: OrderedDict[int, Packing] = OrderedDict()
_numbers = count()


def _remembered(layout: Packing) -> Tensor:
    """() int64 on the CPU, the number under which a layout is found again."""
    number = next((at for at, known in _recent.items() if known is layout), None)
    if number is None:
        number = next(_numbers)
        _recent[number] = layout
        if len(_recent) > RECENT:
            _recent.popitem(last=False)
    return torch.tensor(number)


@torch.library.custom_op("rlhf_cli::packed_attention", mutates_args=())
def _in_graph(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`_flash_packed` or `_packed` of the layout that is set, with what backward needs.

    Returns:
        (1, T, H, d) the result, (H, T) log of the sums of the kernels, () number of the layout.
    """
    assert isinstance(_layout, Packing)
    number, kind = _remembered(_layout), Kind(scale, window, None, None)
    if _has_flash(query, key, value):
        out, sums = _flash_forward(_layout, query, key, value, kind)[:2]
        return out[None], sums, number
    out = _packed(_layout, query, key, value, kind).contiguous()
    return out, query.new_empty(query.shape[1:3], dtype=torch.float32), number


@_in_graph.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, heads, tokens, _ = query.shape
    return (
        query.new_empty(rows, tokens, heads, value.shape[-1]),
        query.new_empty(heads, tokens, dtype=torch.float32),
        torch.empty((), dtype=torch.int64),
    )


@torch.library.custom_op("rlhf_cli::packed_attention_backward", mutates_args=())
def _in_graph_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    number: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, like them."""
    layout, kind = _recent[int(number)], Kind(scale, window, None, None)
    if _has_flash(query, key, value):
        work = torch.ops.aten._flash_attention_backward
        of_rows = work(
            grad[0],
            *_rows(layout, query, key, value),
            *(out[0], sums),
            *_sizes(layout),
            *(0.0, True),
            torch.zeros(2, dtype=torch.uint64, device=grad.device),  # of the dropout, of which
            torch.empty(0, device=grad.device),  # there is none
            **_settings(kind),
        )
    else:
        of_rows = _packed_backward(layout, grad, query, key, value, kind)
    of_queries, of_keys, of_values = of_rows
    if layout.keys is not None:  # what several sequences see has a gradient from each
        both = _of_tokens(layout, torch.cat([of_keys, of_values], -1))
        of_keys, of_values = both[..., : key.shape[-1]], both[..., key.shape[-1] :]
    grads = (each.transpose(0, 1)[None].contiguous() for each in (of_queries, of_keys, of_values))
    query_grad, key_grad, value_grad = grads
    return query_grad, key_grad, value_grad


def _packed_backward(
    layout: Packing, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, kind: Kind
) -> list[Tensor]:
    """Gradients of what `_rows` gives, by the products of attention; grad: (1, T, H, d)."""
    rows = _rows(layout, query, key, value)
    groups = query.shape[1] // key.shape[1]
    sides = [
        each.split(list(lengths))
        for each, lengths in (
            (grad[0], layout.lengths),
            (rows[0], layout.lengths),
            (rows[1], layout.key_lengths),
            (rows[2], layout.key_lengths),
        )
    ]
    found = []
    for each in zip(*sides, strict=True):
        g, q, k, v = (x.transpose(0, 1) for x in each)  # (H, T, d), (H_kv, S, d)
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = q @ k.transpose(1, 2) * kind.scale  # (H, T, S)
        hidden = ~_seen(q.shape[1], k.shape[1], kind.window, q.device)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        of_weights = g @ v.transpose(1, 2)
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
        of_scores *= kind.scale
        pairs = of_scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ g  # (H, S, d) each
        shared = [pair.unflatten(0, (-1, groups)).sum(1) for pair in pairs]
        found.append([x.transpose(0, 1) for x in (of_scores @ k, *shared)])
    return [torch.cat(column) for column in zip(*found, strict=True)]


@_in_graph_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    number: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(  # type: ignore[return-value]
        torch.empty_like(each, memory_format=torch.contiguous_format)
        for each in (query, key, value)
    )


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(query, key, value, *output)


def _backward(ctx: Any, grad: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
    grads = _in_graph_backward(grad.contiguous(), *ctx.saved_tensors, ctx.scale, ctx.window)
    return *grads, None, None


_in_graph.register_autograd(_backward, setup_context=_keep_for_backward)


# --------------------------------------------------------------------------- slots


def _flash_slots(layout: Slots, query: Tensor, key: Tensor, value: Tensor, kind: Kind) -> Tensor:
    """(B, 1, H, d) by the same kernels, which look at no more of a slot than it holds."""
    q = query[:, :, 0]  # (B, H, d)
    k, v = (x.transpose(1, 2).flatten(0, 1) for x in (key, value))  # (B * capacity, H_kv, d)
    out: Tensor = torch.ops.aten._flash_attention_forward(
        *(q, k, v, layout.starts, layout.key_starts, 1, key.shape[2]),
        *(0.0, False, False),  # the one query is the last token: nothing to hide from it
        **_settings(kind),
        seqused_k=layout.lengths,
    )[0]
    return out[:, None]


def _slots(layout: Slots, query: Tensor, key: Tensor, value: Tensor, kind: Kind) -> Tensor:
    """(B, 1, H, d) with a mask of what each slot holds."""
    places = torch.arange(key.shape[2], device=key.device)
    ends = layout.lengths[:, None]  # (B, 1)
    seen = places < ends
    if kind.window is not None:
        seen &= places >= ends - kind.window
    if key.is_cpu and key.is_contiguous() and kind.softcap is None and kind.sinks is None:
        return _two_products(query, key, value, kind.scale, seen)
    return _products(query, key, value, kind, seen[:, None, None]).transpose(1, 2)


def _two_products(query: Tensor, key: Tensor, value: Tensor, scale: float, seen: Tensor) -> Tensor:
    """(B, 1, H, d) of one query a slot: on a CPU twice as fast as the fused kernel."""
    slots, heads = key.shape[:2]
    queries = query.reshape(slots * heads, -1, query.shape[-1])  # those of a group beside it
    scores = torch.bmm(queries, key.flatten(0, 1).transpose(1, 2)).mul_(scale)
    hidden = ~seen.repeat_interleave(heads, 0)[:, None]  # (B * H_kv, 1, S)
    weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
    return torch.bmm(weights, value.flatten(0, 1)).reshape(slots, 1, query.shape[1], -1)


# --------------------------------------------------------------------------- products


def _products(query: Tensor, key: Tensor, value: Tensor, kind: Kind, seen: Tensor | None) -> Tensor:
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
    query: Tensor, key: Tensor, value: Tensor, kind: Kind, seen: Tensor | None
) -> Tensor:
    """The same by the scores themselves, for what is done to them before they are weighed."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * kind.scale  # (B, H, T, S)
    if kind.softcap is not None:
        scores = kind.softcap * torch.tanh(scores / kind.softcap)
    if seen is None:
        seen = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if kind.sinks is not None:
        nothing = kind.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, nothing], -1)
    weights = scores.softmax(-1, dtype=torch.float32)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value
