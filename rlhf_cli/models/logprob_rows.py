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


def rows_of(table: Tensor, part: slice) -> Tensor:
    """Some rows of it; itself where they are all: a view costs the host a microsecond or two."""
    return table if part.start == 0 and part.stop == len(table) else table[part]


@dataclass(frozen=True)
class Figures:
    """Of rows of logits z, and z' of a reference: (n,) each, None for what is not asked.

    logprobs: of the targets; entropy and kl of the distributions.
    lse, their_lse: the log of the sum of exponentials of z and of z'.
    """

    logprobs: Tensor
    lse: Tensor
    entropy: Tensor | None = None
    kl: Tensor | None = None
    their_lse: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence["Figures"]) -> "Figures":
        """Of the rows of all parts."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(None if each[0] is None else torch.cat(each) for each in columns))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Coefficients:
    """Of the gradient target onehot(t) + p (every + own z + other z'): (n,) each.

    lse: of z.
    own: None where only log-probs are asked for; other: None without a reference.
    """

    target: Tensor
    every: Tensor
    lse: Tensor
    own: Tensor | None = None
    other: Tensor | None = None

    def of(self, part: slice) -> "Coefficients":
        """Those of some rows."""
        columns = vars(self).values()
        return Coefficients(*(None if each is None else rows_of(each, part) for each in columns))  # type: ignore[arg-type]


def coefficients(
    incoming: Sequence[Tensor | None], figures: Figures, temperature: float
) -> Coefficients:
    """From what comes back to logprobs, entropy and kl, None for nothing; see `logprob_head`.

    Args:
        temperature: that logits were divided by.
    """
    lse, entropy, kl = figures.lse, figures.entropy, figures.kl

    def of(each: Tensor | None) -> Tensor:
        if each is None:
            return torch.zeros_like(lse)
        return each if temperature == 1 else each / temperature

    of_logprobs = of(incoming[0])
    every = -of_logprobs
    if entropy is None and kl is None:
        return Coefficients(of_logprobs, every, lse)
    of_entropy, of_kl = of(incoming[1]), of(incoming[2])
    if entropy is not None:
        every = every + of_entropy * (lse - entropy)
    if kl is None or figures.their_lse is None:
        return Coefficients(of_logprobs, every, lse, -of_entropy)
    every = every - of_kl * (kl + lse - figures.their_lse)
    return Coefficients(of_logprobs, every, lse, of_kl - of_entropy, -of_kl)


def figures_of(logits: Sequence[Tensor], targets: Tensor, with_entropy: bool) -> Figures:
    """Log-probs of the targets and what else is asked for.

    Args:
        logits: (n, V) of the policy and, if there is one, of the reference. They are overwritten
            by what `gradient_of` calls kept.
        targets: (n,) ids.
    """
    kernels = _kernels_for(logits[0])
    if kernels is not None:
        figures: Figures = kernels.figures_of(logits, targets, with_entropy)
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
        # of a width that compiles what most vocabularies use
        kernels.figures_of([torch.zeros(1, 16, device="cuda")], targets, False)

    return tried("rlhf_cli.models.logprob_kernels", trial, "log-probs")


# --------------------------------------------------------------------------- the plain versions


def plain_figures(logits: Sequence[Tensor], targets: Tensor, with_entropy: bool) -> Figures:
    """`figures_of`; leaves the softmax in place of logits where they are asked for nothing more.

    The softmax is the fastest pass over a row that there is on a CPU, and its greatest entry gives
    lse: that of the greatest logit is exp(max - lse).
    """
    own, others = logits[0], logits[1:]
    alone = not with_entropy and not others
    at_target, highest = own.gather(-1, targets[:, None])[:, 0], own.amax(-1)
    soft = _softmax_(own) if alone else torch.softmax(own, -1)
    likeliest = soft.amax(-1).log()
    lse = highest - likeliest
    entropy = kl = their_lse = None
    if with_entropy:
        apart = own - highest[:, None]  # 0 where most of p is, whose sum is 1 but for rounding
        entropy = -likeliest - apart.mul_(soft).sum(-1)
    for theirs in others:
        their_lse = theirs.amax(-1) - torch.softmax(theirs, -1).amax(-1).log()
        kl = their_lse - lse + (own - theirs).mul_(soft).sum(-1)
    return Figures((at_target - highest).add_(likeliest), lse, entropy, kl, their_lse)


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
