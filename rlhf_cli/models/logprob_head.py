"""Log-probs, entropies and KLs of a plain output head, without logits that outlive their use.

With logits z = (x W^T + b) / T, their softmax p and targets t, three figures of each row

    l = z_t - lse(z)        H = lse(z) - sum p z        K = sum p (z - z') - lse(z) + lse(z')

(z' of a reference) have one gradient, from what comes back to each (g_l, g_H, g_K):

    dz = g_l onehot(t) + p (c + a z + b z')             a = g_K - g_H,  b = -g_K
    c = -g_l + g_H (lse(z) - H) - g_K (K + lse(z) - lse(z'))

so that a backward pass needs the logits of a chunk once more, or kept where all fit in one, and
nothing else of the vocabulary's size but the gradient of the weight. Logits, sums and that gradient
are float32 whatever the product's type: sums of chunks in bfloat16 would be biased.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_cli.models.logprob_rows import Figures, coefficients, figures_of, gradient_of, rows_of

CACHED = 2**20  # logits that stay in a CPU's cache between the passes over them
FEW, MANY = 64, 1024  # rows from which on a product is fast on a CPU, and on a GPU


@dataclass(frozen=True)
class LinearHead:
    """Output embeddings that are no more than a product.

    weight: (V, d); bias: (V,) or None.
    dtype: of the product.
    """

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype

    def logits(self, states: Tensor, temperature: float = 1.0, out: Tensor | None = None) -> Tensor:
        """Of (n, d) states: (n, V) in float32, or float64 where `dtype` is; with no_grad only."""
        logits = product(states.to(self.dtype), self.weight.to(self.dtype).T, out)
        if self.bias is not None:
            logits.add_(self.bias)
        return logits if temperature == 1 else logits.div_(temperature)


@dataclass(frozen=True)
class HeadScores:
    """(N,) each in float32, None if not asked for: l, H and K of the module's text."""

    logprobs: Tensor
    entropy: Tensor | None
    kl: Tensor | None


def head_scores(
    head: LinearHead,
    states: Tensor,
    targets: Tensor,
    *,
    chunk: int,
    temperature: float = 1.0,
    with_entropy: bool = False,
    reference: tuple[LinearHead, Tensor] | None = None,
) -> HeadScores:
    """Of each row the log-prob of its target and, if asked for, entropy and KL to a reference.

    Args:
        states: (N, d). Gradients flow to them, and to weight and bias of the head.
        targets: (N,) ids.
        chunk: rows whose logits exist at once, in forward and in backward.
        reference: its head and its (N, d) states, which get no gradient.
    """
    trained = [each for each in (states, head.weight, head.bias) if each is not None]
    wanted = torch.is_grad_enabled() and any(each.requires_grad for each in trained)
    asked = _Asked(chunk, temperature, with_entropy, head.dtype, keep=wanted)
    given: tuple[Tensor | None, ...] = ()
    if reference is not None:
        other, theirs = reference
        given = theirs.detach().to(other.dtype), other.weight.detach().to(other.dtype), other.bias
    scored = _Scores.apply(asked, targets, states, head.weight, head.bias, *given)
    return HeadScores(*scored)


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right, (n, k) by (k, m), with its sums and result in float32 (float64 of float64).

    On a CPU one of bfloat16 is rounded to that once, as layers round theirs.
    """
    if left.dtype in (torch.float32, torch.float64):
        return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)
    if left.is_cuda and out is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    rounded = torch.mm(left, right)
    return rounded.float() if out is None else out.copy_(rounded)


def plus_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right, as `product` has it, in the memory of the total if there is one."""
    if total is None:
        return product(left, right)
    if left.dtype == total.dtype:
        return total.addmm_(left, right)
    if left.is_cuda:
        return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    return total.add_(product(left, right))


# --------------------------------------------------------------------------- the function


@dataclass(frozen=True)
class _Asked:
    """What `head_scores` was; keep: whether a backward pass follows."""

    chunk: int
    temperature: float
    with_entropy: bool
    dtype: torch.dtype
    keep: bool


class _Scores(torch.autograd.Function):
    """(logprobs, entropy or None, kl or None) of states, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        asked: _Asked,
        targets: Tensor,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *reference: Tensor,
    ) -> tuple[Tensor | None, ...]:
        rows = _Rows(asked, states, weight, bias, reference)
        whole = asked.keep and len(targets) <= asked.chunk
        room = rows.room(len(targets) if whole else rows.block)
        found = []
        for part in _parts(0, len(targets), rows.block):
            logits = rows.logits(part, _at(part, room))
            found.append(figures_of(logits, rows_of(targets, part), asked.with_entropy))
        figures = Figures.joined(found)
        ctx.asked, ctx.kept = asked, room if whole else None
        ctx.save_for_backward(*(targets, states, weight, bias, *reference), *vars(figures).values())
        ctx.set_materialize_grads(False)
        return figures.logprobs, figures.entropy, figures.kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        asked: _Asked = ctx.asked
        (targets, states, weight, bias, *reference), known = _split(ctx.saved_tensors)
        figures = Figures(*known)
        kept, ctx.kept = ctx.kept, None  # overwritten: a second backward computes them again
        _, _, for_states, for_weight, for_bias, *_ = ctx.needs_input_grad
        rows = _Rows(asked, states, weight, bias, reference)
        coefs = coefficients(incoming, figures, asked.temperature)
        of_states: list[Tensor] = []
        of_weight = of_bias = None
        room = kept or rows.room(rows.together)
        slopes = room[0]  # of logits, where they stood
        if asked.dtype != slopes.dtype:
            slopes = torch.empty_like(slopes[: rows.together], dtype=asked.dtype)
        for span in _parts(0, len(targets), rows.together):
            for part in _parts(span.start, span.stop, rows.block):
                logits = _at(part, room)
                if kept is None:
                    rows.logits(part, logits)
                (slope,) = _at(part, [slopes])
                those = rows_of(targets, part)
                gradient_of(logits, those, coefs.of(part), kept is not None, slope)
                if for_states:
                    of_states.append(product(slope, rows.weight).to(states.dtype))
            (of_span,) = _at(span, [slopes])
            if for_weight:
                those = rows_of(states, span).to(asked.dtype)
                of_weight = plus_product(of_weight, of_span.T, those)
            if for_bias:
                summed = of_span.sum(0, dtype=coefs.every.dtype)
                of_bias = summed if of_bias is None else of_bias.add_(summed)
        return None, None, _whole(of_states), of_weight, of_bias, *(None for _ in reference)


class _Rows:
    """Logits of the policy's rows and, with a reference, of its rows.

    block: rows to take at once; together: those that add to the weight's gradient at once.
    weight: of the policy's head, in the type of the product.
    """

    def __init__(
        self,
        asked: _Asked,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        reference: Sequence[Any],
    ) -> None:
        self._asked = asked
        self.weight = weight.to(asked.dtype)
        self._each = [(LinearHead(self.weight, bias, asked.dtype), states)]
        if reference:
            theirs, their_weight, their_bias = reference
            self._each.append((LinearHead(their_weight, their_bias, theirs.dtype), theirs))
        self.together = min(asked.chunk, len(states))
        if states.is_cuda:
            self.block = self.together = min(self.together, MANY)
        else:
            self.block = min(self.together, max(FEW, CACHED // len(weight)))

    def room(self, rows: int) -> list[Tensor]:
        """For the logits of so many rows: (rows, V) each."""
        wide = torch.promote_types(self._asked.dtype, torch.float32)
        return [self.weight.new_empty(rows, len(head.weight), dtype=wide) for head, _ in self._each]

    def logits(self, part: slice, room: list[Tensor]) -> list[Tensor]:
        """Those of some rows, in the room for just them."""
        return [
            head.logits(rows_of(states, part), self._asked.temperature, each)
            for (head, states), each in zip(self._each, room, strict=True)
        ]


def _whole(parts: list[Tensor]) -> Tensor | None:
    if len(parts) > 1:
        return torch.cat(parts)
    return parts[0] if parts else None


def _split(saved: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Inputs, and as many figures as there are."""
    count = len(fields(Figures))
    return saved[:-count], saved[-count:]


def _at(part: slice, room: Sequence[Tensor]) -> list[Tensor]:
    """Where some rows stand, in room for all or for so many that are taken at once."""
    first = part.start % len(room[0])
    return [rows_of(each, slice(first, first + part.stop - part.start)) for each in room]


def _parts(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))
