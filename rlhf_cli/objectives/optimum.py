"""What is best at all: the optimum of the KL-regularised objective, and the best of n, exactly.

Both are sums over all responses to a prompt, so they need a space that can be enumerated, with the
probability of each response under the reference. No policy has more reward at as much KL than the
optimum has.
"""

import torch
from torch import Tensor


def optimum(logprobs: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """The policy that maximises E[r] - beta KL(pi || ref): ref exp(r / beta) / Z.

    Source: 2305.18290 eq. 4.

    Args:
        logprobs: (Y,) of each response under the reference.
        rewards: (Y,).
        beta: above 0.

    Returns:
        (Y,) probabilities in float64.
    """
    return torch.softmax(logprobs.double() + rewards.double() / beta, -1)


def best_of_n_probabilities(probabilities: Tensor, scores: Tensor, n: int) -> Tensor:
    """How likely each response is the best of n, ties broken by lot: F(y)^n - F(y-)^n.

    Args:
        probabilities: (Y,) of one sample, summing to 1.
        scores: (Y,) what chooses. Equal ones share what falls to them as they do in one sample.

    Returns:
        (Y,) in float64.
    """
    probabilities = probabilities.double()
    levels, place = scores.unique(return_inverse=True)  # in ascending order
    mass = probabilities.new_zeros(len(levels)).index_add(0, place, probabilities)
    up_to = mass.cumsum(0)
    won = up_to**n - (up_to - mass) ** n
    return probabilities * (won / mass.clamp(min=torch.finfo(torch.double).tiny))[place]


def divergence(probabilities: Tensor, logprobs: Tensor) -> float:
    """KL to what has these log-probs, in nats; what has no probability counts for nothing.

    Args: probabilities, logprobs (Y,).
    """
    likely = probabilities > 0
    own = probabilities[likely].double()
    return (own * (own.log() - logprobs[likely].double())).sum().item()
