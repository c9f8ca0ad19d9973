"""Load balancing of mixtures of experts (Switch Transformer, 2101.03961 sec. 2.2).

    L = E sum_i f_i P_i                                                      eq. 4

where, over the tokens of all layers, f_i is the share that goes to expert i (eq. 5) and P_i the
mean probability that the router gives it (eq. 6). Each token goes to k experts, so that f sums to
k, and L is k where the experts are chosen alike. No gradient flows through f: for a given f the
loss is linear in P, so that a sum over micro-batches is exact if f is that of the whole batch.
"""

import torch
from torch import Tensor


def expert_counts(scores: Tensor, weights: Tensor, k: int) -> Tensor:
    """How many tokens go to each expert: (E,).

    Args:
        scores: (N, E) of the router, before softmax.
        weights: (N,) how often each token counts; 0 at pads.
        k: experts that a token goes to, those of the highest scores.
    """
    chosen = scores.detach().topk(k, dim=-1).indices  # (N, k)
    counts = torch.zeros(scores.shape[-1], dtype=torch.float64, device=scores.device)
    return counts.index_add(0, chosen.flatten(), weights.double().repeat_interleave(k))


def probability_sums(scores: Tensor, weights: Tensor) -> Tensor:
    """The probability that the router gives each expert, summed over tokens: (E,).

    Args:
        scores, weights: as for `expert_counts`.
    """
    return (torch.softmax(scores.float(), -1) * weights.float()[:, None]).sum(0)


def load_balancing_loss(counts: Tensor, probabilities: Tensor, tokens: Tensor | float) -> Tensor:
    """L, or the part of it whose probabilities these are.

    Args:
        counts: (E,) of the whole batch.
        probabilities: (E,) sums over the tokens of a part of it.
        tokens: of the whole batch, in all layers.
    """
    return len(counts) * ((counts / tokens).float() * (probabilities / tokens)).sum()


def loads(counts: Tensor) -> Tensor:
    """(E,) the share of the choices that falls on each expert, times E: 1 where all are alike."""
    return counts / counts.sum() * len(counts)
