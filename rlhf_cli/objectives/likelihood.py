"""Likelihood of responses: the loss of SFT and of the pretraining mix."""

import torch
from torch import Tensor

from rlhf_cli.objectives.rounding import equal_up_to


def nll_sum(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood summed over the tokens that count; divide by their global number.

    Args:
        logprobs: (B, T) log p(x_t | x_<t).
        mask: (B, T) bool, True at trained tokens (InstructGPT 2203.02155 sec. 3.5: responses).
    """
    return -(logprobs * mask).sum()


def sequence_logprob(logprobs: Tensor, mask: Tensor) -> Tensor:
    """log pi(y|x) = sum of the response's token log-probs, EOS included: (B, T) -> (B,)."""
    return (logprobs * mask).sum(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is True; 0 if it is nowhere."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def masked_moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (ddof 0) of `values` where `mask` is True."""
    mean = masked_mean(values, mask)
    return mean, masked_mean((values - mean) ** 2, mask)


def varies(mean: Tensor, variance: Tensor) -> bool:
    """Whether a deviation is more than the rounding of values of this size."""
    return bool(variance.sqrt() > equal_up_to(mean.dtype) * mean.abs().clamp(min=1))


def masked_scale(values: Tensor, mask: Tensor) -> Tensor:
    """Values divided by their standard deviation (ddof 0) over the mask; zero outside it.

    Unlike `masked_whiten` with shift_mean=False it adds nothing to every token, which a sum over
    the tokens of a response would pay by its length. Values that are all EQUAL, whose deviation is
    rounding, have no scale and stay as they are.
    """
    mean, variance = masked_moments(values, mask)
    scale = torch.rsqrt(variance + 1e-8) if varies(mean, variance) else 1.0
    return values * scale * mask


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Values of mean 0 and variance 1 over the mask; zero outside it. Values that are EQUAL become
    their mean, or 0.

    The variance is the biased one (ddof 0), as in OpenAI's code and N+ 2403.17031 detail 13.

    Args:
        values, mask: (B, T).
        shift_mean: False keeps the mean (reward whitening).
    """
    mean, variance = masked_moments(values, mask)
    scale = torch.rsqrt(variance + 1e-8) if varies(mean, variance) else 0.0
    whitened = (values - mean) * scale
    return (whitened if shift_mean else whitened + mean) * mask
