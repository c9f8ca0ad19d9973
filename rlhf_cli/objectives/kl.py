"""Kullback-Leibler divergence: estimators on samples and controllers of its coefficient."""

import torch
from torch import Tensor


def k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """log(pi / ref), the unbiased estimator whose samples may be negative.

    Right inside a reward, where no gradient flows; as a loss its expected gradient is zero.
    Shapes: (B, T) or any, elementwise. Source: Schulman, joschu.net/blog/kl-approx.
    """
    return logprobs - reference


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """exp(-u) - 1 + u with u = log(pi / ref): unbiased, never negative, for reporting.

    As a loss on samples of pi its gradient is that of the forward KL(ref || pi), the wrong
    direction; `kl_loss` is the one to differentiate. Elementwise.
    """
    return torch.expm1(reference - logprobs) - (reference - logprobs)


def kl_loss(logprobs: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    """w k3 with the ratio w = pi / pi_old attached: its gradient is that of KL(pi || ref).

    E_old[w k3] = KL(pi || ref) for every pi, so the estimate and its gradient are both unbiased,
    also off-policy. Source: DeepSeek-V3.2 (2512.02556); GRPO (2402.03300 eq. 4) leaves w out.

    Args:
        logprobs: (B, T) current log-probs, with gradient.
        old: (B, T) log-probs of the policy that sampled.
        reference: (B, T) log-probs of the reference.
    """
    return torch.exp(logprobs - old) * k3(logprobs, reference)


def ziegler_kl_coef(kl_coef: float, kl: float, target: float, rollouts: int, horizon: int) -> float:
    """Proportional controller: kl_coef *= 1 + clip(kl/target - 1, -.2, .2) * rollouts/horizon.

    Args:
        kl: measured KL to the reference per response, in nats.
        rollouts: responses since the last update.

    Source: Ziegler 1909.08593 sec. 2.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * rollouts / horizon)


def schulman_kl_coef(kl_coef: float, kl: float, target: float) -> float:
    """Halve kl_coef below target / 1.5, double it above 1.5 target (PPO 1707.06347 sec. 4)."""
    if kl < target / 1.5:
        return kl_coef / 2
    if kl > target * 1.5:
        return kl_coef * 2
    return kl_coef
