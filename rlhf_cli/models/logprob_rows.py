"""What is done to rows of logits between the products of a head: their sums, and the gradient.

The plain versions are here; on CUDA those of `logprob_kernels` take their place, where Triton is
installed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.models.kernels import tried


@dataclass(frozen=True)
class Coefficients:
    """Of the gradient target onehot(t) + p (every + own z + other z'): (n,) each.

    lse: of z.
    own: None where only log-probs are wanted; other: None without a reference.
    """

    target: Tensor
    every: Tensor
    lse: Tensor
    own: Tensor | None = None
    other: Tensor | None = None

    def of(self, part: slice) -> "Coefficients":
        """Those of some rows."""
        own = None if self.own is None else self.own[part]
        other = None if self.other is None else self.other[part]
        return Coefficients(self.target[part], self.every[part], self.lse[part], own, other)


def coefficients(
    incoming: Sequence[Tensor | None],
    figures: Tensor,
    temperature: float,
    with_entropy: bool,
    with_kl: bool,
) -> Coefficients:
    """From what comes back to logprobs, entropy and kl, None for nothing; see `logprob_head`.

    Args:
        figures: (5, N) from `figures_of`.
        temperature: that logits were divided by.
    """
    none = torch.zeros_like(figures[0])
    of_logprobs, of_entropy, of_kl = (
        none if each is None else each / temperature for each in incoming
    )
    _, entropy, kl, lse, their_lse = figures
    if not with_entropy and not with_kl:
        return Coefficients(of_logprobs, -of_logprobs, lse)
    every = of_entropy * (lse - entropy) - of_kl * (kl + lse - their_lse) - of_logprobs
    own, other = of_kl - of_entropy, -of_kl if with_kl else None
    return Coefficients(of_logprobs, every, lse, own, other)


def figures_of(logits: Sequence[Tensor], targets: Tensor, with_entropy: bool) -> Tensor:
    """(5, n): log-prob of the target, entropy, KL, and lse of both; zeros for what is not asked.

    Args:
        logits: (n, V) of the policy and, if there is one, of the reference. They are overwritten
            by what `gradient_of` calls kept.
        targets: (n,) ids.
    """
    kernels = _kernels_for(logits[0])
    if kernels is not None:
        figures: Tensor = kernels.figures_of(logits, targets, with_entropy)
        return figures
    return plain_figures(logits, targets, with_entropy)


def gradient_of(
    logits: Sequence[Tensor], targets: Tensor, coefs: Coefficients, kept: bool, out: Tensor
) -> None:
    """The gradient of logits[0], (n, V), of any type, which may be its own memory.

    Args:
        logits: are overwritten.
        kept: whether they are what `figures_of` left, or computed anew.
    """
    kernels = _kernels_for(logits[0])
    if kernels is not None:
        kernels.gradient_of(logits, targets, coefs, out)
    else:
        plain_gradient(logits, targets, coefs, kept, out)


def _kernels_for(logits: Tensor) -> Any:
    return _kernels() if logits.is_cuda and logits.dtype == torch.float32 else None


@cache
def _kernels() -> Any:
    def trial(kernels: Any) -> None:
        targets = torch.zeros(1, dtype=torch.long, device="cuda")
        kernels.figures_of([torch.zeros(1, 2, device="cuda")], targets, False)

    return tried("rlhf_cli.models.logprob_kernels", trial, "log-probs")


# --------------------------------------------------------------------------- the plain versions


def plain_figures(logits: Sequence[Tensor], targets: Tensor, with_entropy: bool) -> Tensor:
    """`figures_of`; leaves the softmax in place of logits where they are asked for nothing more.

    The softmax is the fastest pass over a row that there is on a CPU, and its greatest entry gives
    lse: that of the greatest logit is exp(max - lse).
    """
    own, others = logits[0], logits[1:]
    alone = not with_entropy and not others
    at_target, highest = own.gather(-1, targets[:, None])[:, 0], own.amax(-1)
    soft = _softmax_(own) if alone else torch.softmax(own, -1)
    beyond = -soft.amax(-1).log()
    lse = highest + beyond
    entropy = kl = their_lse = torch.zeros_like(lse)
    if with_entropy:
        apart = own - highest[:, None]  # 0 where most of p is, whose sum is 1 but for rounding
        entropy = beyond - apart.mul_(soft).sum(-1)
    for theirs in others:
        their_lse = theirs.amax(-1) - torch.softmax(theirs, -1).amax(-1).log()
        kl = their_lse - lse + (own - theirs).mul_(soft).sum(-1)
    return torch.stack([at_target - highest - beyond, entropy, kl, lse, their_lse])


def plain_gradient(
    logits: Sequence[Tensor], targets: Tensor, coefs: Coefficients, kept: bool, out: Tensor
) -> None:
    """`gradient_of`."""
    own, others = logits[0], logits[1:]
    if coefs.own is None:
        soft = own if kept else _softmax_(own)
        slopes = soft.mul_(coefs.every[:, None])
    else:
        soft = torch.softmax(own, -1)
        slopes = own.mul_(coefs.own[:, None]).add_(coefs.every[:, None])
        for theirs in others:
            assert coefs.other is not None
            slopes.addcmul_(theirs, coefs.other[:, None])
        slopes.mul_(soft)
    slopes.scatter_add_(-1, targets[:, None], coefs.target[:, None])
    if out.data_ptr() != slopes.data_ptr():
        out.copy_(slopes)


def _softmax_(logits: Tensor) -> Tensor:
    """In place on a CPU, whose rows are read before they are written."""
    if logits.is_cuda:
        return logits.copy_(torch.softmax(logits, -1))
    return torch.softmax(logits, -1, out=logits)
