"""Kullback-Leibler divergence: estimators on samples, and what sets its coefficient.

All are of the next token in its context. Summed over the tokens of sampled responses they estimate
the KL of responses. As losses they have the gradient of each token's own KL only: that a token
leads to contexts with more or less KL after it is left out, which a KL in the reward does see.
"""

import math

import torch
from torch import Tensor

LEAST_KL_COEF = 1e-8


def k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """log(pi / ref), the unbiased estimator whose samples may be negative.

    Right inside a reward, where no gradient flows; as a loss its expected gradient is zero.
    Shapes: (B, T) or any, elementwise. Source: Schulman, joschu.net/blog/kl-approx.
    """
    return logprobs - reference


def k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """u^2 / 2 with u = log(pi / ref): a biased value, of little spread while pi is near ref.

    As a loss on samples of pi its gradient u grad log pi is that of KL(pi || ref), unbiased; on
    samples of an older policy it is not. Elementwise.
    """
    return (logprobs - reference) ** 2 / 2


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """exp(-u) - 1 + u with u = log(pi / ref): unbiased, never negative, for reporting.

    As a loss on samples of pi its gradient is that of the forward KL(ref || pi), the wrong
    direction; `weighted_k3` is the one to differentiate. Elementwise.
    """
    return torch.expm1(reference - logprobs) - (reference - logprobs)


def weighted_k3(logprobs: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    """w k3 with the ratio w = pi / pi_old attached: its gradient is that of KL(pi || ref).

    E_old[w k3] = KL(pi || ref) for every pi, so the estimate and its gradient are both unbiased,
    also off-policy. Source: DeepSeek-V3.2 (2512.02556); GRPO (2402.03300 eq. 4) leaves w out.

    Args:
        logprobs: (B, T) current log-probs, with gradient.
        old: (B, T) log-probs of the policy that sampled.
        reference: (B, T) log-probs of the reference.
    """
    return torch.exp(logprobs - old) * k3(logprobs, reference)


def full_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(pi || ref) of the next token, summed over the vocabulary: no estimate, no sample.

    Exact in each context, on any samples; the contexts are still those that were sampled.

    Args:
        logits: (N, V) of the policy, with gradient; scaled by the temperature that samples.
        reference_logits: (N, V).

    Returns:
        (N,) in nats.
    """
    ours, theirs = logits.log_softmax(-1), reference_logits.log_softmax(-1)
    return (ours.exp() * (ours - theirs)).sum(-1)


def kl_loss(
    estimator: str,
    logprobs: Tensor,
    old: Tensor,
    reference: Tensor,
    full: Tensor | None,
    weights: Tensor | float = 1.0,
) -> Tensor:
    """The KL of each token as a term of the loss.

    Args:
        estimator: k2, k3, weighted_k3 or full.
        logprobs: current log-probs, with gradient.
        old, reference: log-probs of the policy that sampled, and of the reference.
        full: for `full`, what `full_kl` gave at each token.
        weights: of samples that another one than `old` drew; `full` takes no sample.
    """
    if estimator == "full":
        assert full is not None
        return full
    if estimator == "weighted_k3":
        return weights * weighted_k3(logprobs, old, reference)
    return weights * {"k2": k2, "k3": k3}[estimator](logprobs, reference)


def ziegler_kl_coef(kl_coef: float, kl: float, target: float, rollouts: int, horizon: int) -> float:
    """Proportional controller: kl_coef *= 1 + clip(kl/target - 1, -.2, .2) * rollouts/horizon.

    Where a batch has more than horizon rollouts it counts as horizon of them: the factor stays
    between 0.8 and 1.2, and from 5 horizons on it would be negative.

    Args:
        kl: measured KL to the reference per response, in nats.
        rollouts: responses since the last update.

    A KL that is NaN or infinite was not measured, and leaves it as it is.

    Source: Ziegler 1909.08593 sec. 2.2.
    """
    if not math.isfinite(kl):
        return kl_coef
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * min(rollouts / horizon, 1.0))


def schulman_kl_coef(kl_coef: float, kl: float, target: float) -> float:
    """Halve kl_coef below target / 1.5, double it above 1.5 target (PPO 1707.06347 sec. 4).

    It stays above 1e-8: a policy that rests for long must not lose the penalty for good. A KL that
    is NaN or infinite was not measured, and leaves it as it is.
    """
    if not math.isfinite(kl):
        return kl_coef
    if kl < target / 1.5:
        return max(kl_coef / 2, min(kl_coef, LEAST_KL_COEF))
    if kl > target * 1.5:
        return kl_coef * 2
    return kl_coef


def linear(start: float, end: float | None, step: int, steps: int) -> float:
    """Value at `step` of a straight line from `start` at step 1 to `end` at step `steps`.

    It stays at `start` where `end` is None, or where there is one step only.
    """
    if end is None or steps == 1:
        return start
    done = (step - 1) / (steps - 1)
    return (1 - done) * start + done * end
