"""Likelihood of responses: the loss of SFT and of the pretraining mix."""

import torch
from torch import Tensor


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


def masked_scale(values: Tensor, mask: Tensor) -> Tensor:
    """Values divided by their standard deviation (ddof 0) over the mask; zero outside it.

    Unlike `masked_whiten` with shift_mean=False it adds nothing to every token, which a sum over
    the tokens of a response would pay by its length.
    """
    variance = masked_mean((values - masked_mean(values, mask)) ** 2, mask)
    return values * torch.rsqrt(variance + 1e-8) * mask


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Values of mean 0 and variance 1 over the mask; zero outside it.

    The variance is the biased one (ddof 0), as in OpenAI's code and N+ 2403.17031 detail 13.

    Args:
        values, mask: (B, T).
        shift_mean: False keeps the mean (reward whitening).
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask
