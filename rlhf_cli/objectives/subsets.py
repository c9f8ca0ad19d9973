"""What n of K samples would give, from all K: no bias, and less noise than from n fresh ones.

Each is the mean over all subsets of n of the K samples to a prompt, by a formula. K samples serve
every n up to K, at one price.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def pass_at(correct: Tensor, n: int) -> Tensor:
    """Chance that one of n samples is right: 1 - C(K - c, n) / C(K, n) (Chen 2021, 2107.03374).

    Args: correct (N, K), 1 or 0; n up to K. Returns (N,) float64.
    """
    count = correct.shape[-1]
    wrong = (count - correct.sum(-1)).long().tolist()
    whole = math.comb(count, n)
    return torch.tensor([1 - math.comb(w, n) / whole for w in wrong], dtype=torch.double)


def best_of(chosen_by: Tensor, values: Tensor, n: int) -> Tensor:
    """Expected value of that of n samples which scores highest; ties are broken by lot.

    The r-th of K in ascending order is the best of C(r - 1, n - 1) of the C(K, n) subsets; equal
    scores share what falls to their places.

    Args:
        chosen_by: (N, K) the scores that choose.
        values: (N, K) what is measured of the one that is chosen; it may be the same.
        n: up to K.

    Returns:
        (N,) float64.
    """
    count = chosen_by.shape[-1]
    whole = math.comb(count, n)
    shares = torch.tensor([math.comb(r, n - 1) / whole for r in range(count)], dtype=torch.double)
    order = chosen_by.argsort(-1)
    scores, values = chosen_by.gather(-1, order), values.double().gather(-1, order)
    equal = (scores[:, :, None] == scores[:, None, :]).double()  # (N, K, K)
    weights = equal @ shares / equal.sum(-1)  # (N, K)
    return (weights * values).sum(-1)


def best_of_n_kl_bound(n: int) -> float:
    """log n - (n - 1) / n, in nats: what best of n is at most away from one sample.

    It is reached where no response has a chance of its own to speak of (Beirami 2024, 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def majority_at(answers: Sequence[Hashable], correct: Sequence[float], n: int) -> float:
    """Chance that the most frequent answer of n samples is right; a tie is broken by lot.

    For each answer and number of votes it counts the subsets in which the others have no more, and
    how many of them as many.

    Args:
        answers: of K samples; those that count as one answer are equal.
        correct: of each, 1 or 0; equal answers are alike.
        n: up to K.
    """
    votes: defaultdict[Hashable, int] = defaultdict(int)
    right: dict[Hashable, float] = {}
    for answer, value in zip(answers, correct, strict=True):
        votes[answer] += 1
        right[answer] = value
    won = 0.0
    for answer, count in votes.items():
        if right[answer]:
            others = [of for other, of in votes.items() if other != answer]
            won += right[answer] * sum(
                math.comb(count, own) * _ways(others, n - own, own)
                for own in range(1, min(count, n) + 1)
            )
    return won / math.comb(len(answers), n)


def _ways(others: Sequence[int], size: int, most: int) -> float:
    """Subsets of `size` of the others with at most `most` of each, each weighed by 1 / (1 + ties).

    A tie is another answer that has `most` votes as well.
    """
    ways = {(0, 0): 1}  # taken, ties -> subsets
    for count in others:
        more: defaultdict[tuple[int, int], int] = defaultdict(int)
        for (taken, ties), so_far in ways.items():
            for own in range(min(count, most, size - taken) + 1):
                more[taken + own, ties + (own == most)] += so_far * math.comb(count, own)
        ways = more
    return sum(so_far / (1 + ties) for (taken, ties), so_far in ways.items() if taken == size)
