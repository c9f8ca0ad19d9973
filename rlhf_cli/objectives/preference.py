"""Direct optimisation of a policy on feedback, without a reward model.

Symbols: y_w is preferred to y_l, rho(y) = log pi(y|x) - log ref(y|x) in nats, summed over the
response's tokens with its EOS, and h = rho(y_w) - rho(y_l). The caller computes rho and h; beta rho
is the implicit reward. Losses are per pair or per response, (N,) -> (N,).

- Length-normalised DPO and IPO are `dpo_loss` and `ipo_loss` of an h from averaged log-ratios,
  rho(y) / |y|.
- Plackett-Luce DPO (2305.18290 App. A.3) is `reward_model.plackett_luce_loss` of beta rho.
- ORPO and SimPO take mean log-probs of the policy, log pi(y|x) / |y|, and have no reference.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_loss(h: Tensor, beta: float, label_smoothing: Tensor | float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h).

    DPO (2305.18290 eq. 7) with e = 0, else conservative DPO (Mitchell, ericmitchell.ai/cdpo.pdf),
    which is least at sigmoid(beta h) = 1 - e. ln 2 where policy and reference are the same.

    Args:
        h: (N,) difference of log-ratios.
        beta: tie to the reference; larger stays closer.
        label_smoothing: assumed share e of flipped labels, 0 <= e < 0.5. Or (N,) the chance of each
            that its sides are the wrong way round, 1 - p of a soft label p: the cross-entropy of
            sigmoid(beta h) with p, as cDPO stands for in 2409.06691.
    """
    return -(1 - label_smoothing) * logsigmoid(beta * h) - label_smoothing * logsigmoid(-beta * h)


def dpo_gradient_weight(h: Tensor, beta: float, label_smoothing: Tensor | float = 0.0) -> Tensor:
    """|sigmoid(-beta h) - e|, how far the implicit rewards are from the label; no gradient.

    |d dpo_loss / d rho_w| is beta times this (2305.18290 sec. 4). It is |1/2 - e| at the start, and
    0 where sigmoid(beta h) is 1 - e. (N,).
    """
    return (torch.sigmoid(-beta * h) - label_smoothing).abs().detach()


def robust_dpo_loss(h: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """[-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1 - 2e).

    Where labels are flipped with probability e, its expectation is the loss on clean labels, so it
    has the clean optimum (2403.00409 sec. 3); a single value may be negative.

    Args:
        h: (N,) difference of log-ratios.
        beta: tie to the reference.
        label_smoothing: the rate of flips e, 0 <= e < 0.5.
    """
    right, flipped = -logsigmoid(beta * h), -logsigmoid(-beta * h)
    return ((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo_loss(h: Tensor, tau: float, label_smoothing: Tensor | float = 0.0) -> Tensor:
    """(h - (1 - 2e) / (2 tau))^2, whose optimum is finite for certain labels too.

    With e = 0 it is 2310.12036 eq. 17, where either order of a pair adds (h - I / tau)^2 / 2, I
    being 1 where the first one won and 0 where it lost. With the chance 1 - e of y_w in the place
    of that draw the two squares add up to this, and to the constant that eq. 17 leaves out as well.

    Over all pairs from mu it is least at pi = ref exp(p(y beats mu) / tau) / Z. It starts at
    1 / (4 tau^2).

    Args:
        h: (N,) difference of log-ratios; the paper sums over tokens, some tools average.
        tau: tie to the reference; larger stays closer.
        label_smoothing: the chance e that the sides are the wrong way round; or (N,) that of each,
            1 - p of a soft label p.
    """
    return (h - (1 - 2 * label_smoothing) / (2 * tau)) ** 2


def hinge_loss(h: Tensor, beta: float) -> Tensor:
    """relu(1 - beta h): SLiC (2305.10425) with a reference, as in RSO (2309.06657). (N,)."""
    return torch.relu(1 - beta * h)


def kto_loss(
    rho: Tensor,
    desirable: Tensor,
    z0: Tensor | float,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """w (1 - sigmoid(beta (rho - z0))) if desirable, w (1 - sigmoid(beta (z0 - rho))) if not.

    For single responses labelled good or bad (KTO 2402.01306 sec. 4). At the start it is w / 2.

    Args:
        rho: (N,) log-ratios.
        desirable: (N,) bool.
        z0: baseline in nats, from `kto_baseline`; no gradient flows through it.
        beta: how soon the loss saturates as rho leaves z0.
        desirable_weight, undesirable_weight: lambda_D and lambda_U, from `kto_weights`.
    """
    if isinstance(z0, Tensor):
        z0 = z0.detach()
    gain = torch.where(desirable, rho - z0, z0 - rho)
    losses = torch.sigmoid(-beta * gain)  # 1 - sigmoid(x) without the cancellation
    return torch.where(desirable, desirable_weight * losses, undesirable_weight * losses)


def kto_baseline(mismatched_rho: Tensor) -> Tensor:
    """z0 = max(0, mean of rho), a biased estimate of KL(pi || ref); scalar, no gradient.

    Each response stands after the prompt of another one (KTO 2402.01306 sec. 4).
    Args: mismatched_rho (N,) log-ratios of these, N >= 1; a larger batch is less noisy.
    """
    return mismatched_rho.detach().mean().clamp(min=0)


def kto_weights(desirable: int, undesirable: int) -> tuple[float, float]:
    """(lambda_D, lambda_U) with lambda_D n_D = lambda_U n_U: the larger side keeps weight 1.

    2402.01306 sec. 4 asks for a ratio lambda_D n_D / (lambda_U n_U) in [1, 4/3] (later versions:
    [1, 3/2]); this one is 1.

    Args:
        desirable, undesirable: numbers n_D and n_U of responses; ValueError if one is 0.
    """
    if desirable < 1 or undesirable < 1:
        raise ValueError(
            f"KTO needs desirable and undesirable responses, not {desirable} and {undesirable}"
        )
    most = max(desirable, undesirable)
    return most / desirable, most / undesirable


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(log odds(y_w) - log odds(y_l)): ORPO's second term (2403.07691 eq. 6, 7).

    The whole loss adds lambda times this to the mean negative log-likelihood of y_w.
    Args: chosen, rejected (N,) mean log-probs.
    """
    return -logsigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(mean_logprob: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean_logprob), the geometric mean of the token probabilities."""
    return mean_logprob - log1mexp(mean_logprob)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, to full precision at both ends; elementwise.

    Source: Mächler, Accurately computing log(1 - exp(-|a|)), 2012.
    """
    near = x > -math.log(2)
    # at x = 0, where p was rounded to 1, the value stays finite and the gradient is 0
    by_expm1 = (-torch.expm1(x.clamp(max=-torch.finfo(x.dtype).tiny))).log()
    # of an x near 0 this slope is infinite, and NaN once torch.where has multiplied it by 0
    by_log1p = torch.log1p(-torch.where(near, -1.0, x).exp())
    return torch.where(near, by_expm1, by_log1p)


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (a_w - a_l) - gamma) of mean log-probs a (SimPO 2405.14734 eq. 6).

    Args:
        chosen, rejected: (N,) a_w and a_l.
        beta: scale of the implicit reward beta a.
        gamma: the margin asked for, in units of that reward.
    """
    return -logsigmoid(beta * (chosen - rejected) - gamma)


def unlikelihood_loss(chosen: Tensor, rejected: Tensor, alpha: float) -> Tensor:
    """-log pi(y_w) + alpha log pi(y_l): a baseline of the DPO paper (2305.18290 sec. 6).

    Unbounded below: nothing like `dpo_gradient_weight` fades as pi(y_l) vanishes, so the loss keeps
    falling while the model falls apart.

    Args:
        chosen, rejected: (N,) log-probs summed over the response's tokens.
        alpha: weight of the second term, 0 to 1.
    """
    return -chosen + alpha * rejected
