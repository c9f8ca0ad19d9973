"""What a label would be worth: by the distance of responses, by doubt about it, by information.

Values are of comparisons of two responses among n to one prompt; that of a set is the mean over its
pairs, but of information, which pairs of a set share.
"""

import torch
from torch import Tensor


def optimistic_gaps(scores: Tensor, optimism: float) -> Tensor:
    """(n, n) how far apart two responses may be: |mean| + optimism x std of the difference.

    The upper confidence bound of the larger of both directions, over E scorers (2603.09692); of one
    it is the plain difference.

    Args:
        scores: (E, n).
        optimism: standard deviations over scorers.
    """
    apart = _differences(scores)
    return apart.mean(0).abs() + optimism * apart.std(0, correction=0)


def preference_variance(scores: Tensor) -> Tensor:
    """(n, n) how little E scorers agree on which of two is better: the variance over them of
    sigmoid(r_a - r_b) (Christiano 1706.03741 sec. 2.2.4).

    Args:
        scores: (E, n).
    """
    return _differences(scores).sigmoid().var(0, correction=0)


def _differences(scores: Tensor) -> Tensor:
    """(E, n, n) r_a - r_b."""
    return scores.double()[:, :, None] - scores.double()[:, None, :]


def mean_over_pairs(values: Tensor, sets: Tensor) -> Tensor:
    """(C,) the mean value of the pairs of each set.

    Args:
        values: (n, n) symmetric.
        sets: (C, K) places, K of at least 2.
    """
    first, second = torch.triu_indices(sets.shape[1], sets.shape[1], offset=1)
    return values[sets[:, first], sets[:, second]].mean(-1)


# --------------------------------------------------------------------------- information


def comparison_weights(scores: Tensor) -> Tensor:
    """(..., K, K) the Laplacian L of K responses that are all compared.

    The Fisher information of a linear reward r = theta phi is Phi^T L Phi, the sum over pairs of
    p (1 - p) (phi_a - phi_b) (phi_a - phi_b)^T with p = sigmoid(r_a - r_b) (2502.04354).

    Args:
        scores: (..., K).
    """
    chances = (scores.double()[..., :, None] - scores.double()[..., None, :]).sigmoid()
    weights = chances * (1 - chances)
    return torch.diag_embed(weights.sum(-1)) - weights  # what a pairs with itself falls out


def information_gain(weights: Tensor, gram: Tensor) -> Tensor:
    """(...) what a set adds to log det of the information: log det(I + L Phi M^-1 Phi^T).

    D-optimal design: the larger the determinant, the smaller the volume in which theta may lie.

    Args:
        weights: (..., K, K) by `comparison_weights`.
        gram: (..., K, K) Phi M^-1 Phi^T, where M is the information so far.
    """
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype)
    return torch.linalg.slogdet(unit + weights @ gram)[1]


def information_known(weights: Tensor, gram: Tensor) -> Tensor:
    """(K, K) S by which M^-1 shrinks once a set is known: M^-1 - M^-1 Phi^T S Phi M^-1 (Woodbury).

    Args:
        weights: (K, K) by `comparison_weights`.
        gram: (K, K) Phi M^-1 Phi^T before.
    """
    unit = torch.eye(len(weights), dtype=weights.dtype)
    return weights @ torch.linalg.inv(unit + gram @ weights)
