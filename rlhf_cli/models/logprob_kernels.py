"""The passes over rows of logits as one kernel each, for CUDA: see `logprob_rows`.

Triton comes with torch on CUDA. A program takes a row, so that logits are read once for all
figures, and read once and written once, in the type of the product, for the gradient.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_cli.models.logprob_rows import Coefficients, Figures

COLUMNS, WARPS = 4096, 8  # of a row that are taken at once, and threads / 32 that take them


@triton.jit(do_not_specialize=["rows"])
def _figures(  # type: ignore[no-untyped-def]
    own,
    theirs,
    targets,
    figures,
    rows,
    size,
    ENTROPY: tl.constexpr,
    KL: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Running greatest logit and sums relative to it, corrected whenever a greater one comes."""
    row = tl.program_id(0).to(tl.int64)
    inside = tl.arange(0, COLUMNS)
    highest, total, apart, between = float("-inf"), 0.0, 0.0, 0.0
    their_highest, their_total = float("-inf"), 0.0
    for start in range(0, size, COLUMNS):
        there = start + inside < size
        z = tl.load(own + row * size + start + inside, mask=there, other=float("-inf"))
        top = tl.maximum(highest, tl.max(z, 0))
        shrink = tl.exp(highest - top)
        weights = tl.exp(z - top)
        if ENTROPY:  # sum of exp(z - top) (z - top)
            moved = tl.where(total > 0, (highest - top) * total, 0.0)
            apart = (apart + moved) * shrink
            apart += tl.sum(tl.where(there, weights * (z - top), 0.0), 0)
        if KL:
            other = tl.load(theirs + row * size + start + inside, mask=there, other=float("-inf"))
            between = between * shrink
            between += tl.sum(tl.where(there, weights * (z - other), 0.0), 0)
            their_top = tl.maximum(their_highest, tl.max(other, 0))
            their_total = their_total * tl.exp(their_highest - their_top)
            their_total += tl.sum(tl.exp(other - their_top), 0)
            their_highest = their_top
        total = total * shrink + tl.sum(weights, 0)
        highest = top
    log_total = tl.log(total)
    lse = highest + log_total
    target = tl.load(targets + row)
    tl.store(figures + row, tl.load(own + row * size + target) - highest - log_total)
    tl.store(figures + 3 * rows + row, lse)
    if ENTROPY:
        tl.store(figures + rows + row, log_total - apart / total)
    if KL:
        their_lse = their_highest + tl.log(their_total)
        tl.store(figures + 2 * rows + row, between / total - (lse - their_lse))
        tl.store(figures + 4 * rows + row, their_lse)


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    own,
    theirs,
    targets,
    out,
    target_coef,
    every_coef,
    lses,
    own_coef,
    their_coef,
    size,
    EXTRA: tl.constexpr,
    KL: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """target_coef at the target, and softmax times every_coef + own_coef z + their_coef z'."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = place < size
    z = tl.load(own + row * size + place, mask=there, other=float("-inf"))
    factor = tl.load(every_coef + row)
    if EXTRA:
        factor = factor + tl.load(own_coef + row) * z
    if KL:
        other = tl.load(theirs + row * size + place, mask=there, other=0.0)
        factor = factor + tl.load(their_coef + row) * other
    slope = tl.exp(z - tl.load(lses + row)) * factor
    at_target = place == tl.load(targets + row)
    slope += tl.where(at_target, tl.load(target_coef + row), 0.0)
    tl.store(out + row * size + place, slope.to(out.dtype.element_ty), mask=there)


def figures_of(logits: Sequence[Tensor], targets: Tensor, with_entropy: bool) -> Figures:
    """As `logprob_rows.figures_of`; logits stay as they are."""
    own = logits[0]
    rows, size = own.shape
    figures = torch.empty(5, rows, dtype=own.dtype, device=own.device)
    asked = with_entropy, len(logits) > 1
    _figures[(rows,)](
        own, logits[-1], targets, figures, rows, size, *asked, COLUMNS, num_warps=WARPS
    )
    logprobs, entropy, kl, lse, their_lse = figures
    found = Figures(logprobs, lse)
    if with_entropy:
        found = replace(found, entropy=entropy)
    return replace(found, kl=kl, their_lse=their_lse) if len(logits) > 1 else found


def gradient_of(
    logits: Sequence[Tensor], targets: Tensor, coefs: Coefficients, out: Tensor
) -> None:
    """As `logprob_rows.gradient_of`, of logits that were kept or are computed anew."""
    own = logits[0]
    rows, size = own.shape
    own_coef = coefs.target if coefs.own is None else coefs.own
    their_coef = coefs.target if coefs.other is None else coefs.other
    columns = coefs.target, coefs.every, coefs.lse, own_coef, their_coef
    asked = coefs.own is not None, len(logits) > 1
    _gradient[(rows, triton.cdiv(size, COLUMNS))](
        own, logits[-1], targets, out, *columns, size, *asked, COLUMNS, num_warps=WARPS
    )
