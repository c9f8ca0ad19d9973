"""Estimates with uncertainty clustered by prompt, and how well scores agree with judgements."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_cli.objectives.rounding import EQUAL


@dataclass
class Estimate:
    """A mean and its standard error."""

    mean: float
    stderr: float


def clustered_mean(values: Tensor) -> Estimate:
    """Mean over all values; the error is that of the N prompt means, std (ddof 1) / sqrt(N).

    Responses to one prompt are not independent of each other, prompts are. Args: values (N, K).
    """
    per_prompt = values.double().mean(-1)  # (N,)
    spread = per_prompt.std() if len(per_prompt) > 1 else torch.tensor(float("nan"))
    return Estimate(per_prompt.mean().item(), (spread / len(per_prompt) ** 0.5).item())


def ratio_mean(sums: Tensor, counts: Tensor) -> Estimate:
    """Mean over all values of N clusters of unlike size, such as the tokens of a prompt.

    The error is that of a ratio of means: sqrt(N / (N - 1) * sum of (sum_i - mean * count_i)^2)
    over the number of values; `clustered_mean` where all clusters are of one size.

    Args: sums (N,) over each cluster, counts (N,) of its values.
    """
    total, clusters = counts.double().sum(), len(sums)
    mean = sums.double().sum() / total
    squares = (sums.double() - mean * counts.double()).square().sum()
    spread = (
        (squares * clusters / (clusters - 1)).sqrt() if clusters > 1 else torch.tensor(math.nan)
    )
    return Estimate(mean.item(), (spread / total).item())


def clustered_stderr(values: Tensor, clusters: Sequence[Hashable]) -> float:
    """Standard error of the mean of (N,) values whose G clusters (prompts) are independent.

    sqrt(sum over clusters of (sum of deviations)^2) / N, without the factor sqrt(G / (G - 1)) of
    small samples. Not a number where all values are of one cluster.
    """
    sums: defaultdict[Hashable, float] = defaultdict(float)
    deviations = (values.double() - values.double().mean()).tolist()
    for cluster, deviation in zip(clusters, deviations, strict=True):
        sums[cluster] += deviation
    if len(sums) < 2:
        return math.nan
    return math.sqrt(sum(total**2 for total in sums.values())) / len(deviations)


def numbered(clusters: Sequence[Hashable]) -> Tensor:
    """(N,) the number of each one's cluster, from 0, in the order in which they first stand."""
    places = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    return torch.tensor([places[name] for name in clusters], dtype=torch.long)


def means_within(values: Tensor, clusters: Sequence[Hashable]) -> Tensor:
    """(G,) the mean of (N,) values over each of their clusters."""
    places = numbered(clusters)
    counts = places.bincount().double()
    return counts.new_zeros(len(counts)).index_add_(0, places, values.double()) / counts


def redrawn(count: int, seed: int, resamples: int = 1000) -> Tensor:
    """(R, N) how often each of N clusters is in each of R bootstraps of all (Efron 1979)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (resamples, count), generator=generator)
    times = torch.zeros(resamples, count, dtype=torch.double)
    return times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.double))


@dataclass
class Share:
    """A share, its standard error and a 95% interval."""

    mean: float
    stderr: float
    low: float
    high: float


def clustered_share(hits: Tensor, clusters: Sequence[Hashable]) -> Share:
    """Mean of (N,) hits (1, 0, or one half at a tie) whose clusters (prompts) are independent.

    The interval is Wilson's, at the number of independent hits that would have the same standard
    error (Kish's effective sample size), at most N. Where all hits are equal, or all of one
    cluster, their spread says nothing and each cluster counts once. It is somewhat narrow where
    few clusters hold all the misses: it covered 88% at a share of 0.95 in 60 clusters of 1 to 5.
    """
    share, stderr = hits.double().mean().item(), clustered_stderr(hits, clusters)
    count = float(len(set(clusters)))
    if count > 1 and 0 < share < 1:
        independent = share * (1 - share) / len(hits)  # squared error, were there no clusters
        count = len(hits) / max(1.0, stderr**2 / independent)
    return Share(share, stderr, *wilson_interval(share * count, count))


def wilson_interval(successes: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """Interval of a share (Wilson 1927): inside [0, 1], and of some width at 0 and at n of n."""
    centre = 2 * successes + z**2
    half = z * math.sqrt(z**2 + 4 * successes * (1 - successes / n))
    width = 2 * (n + z**2)
    return max(0.0, (centre - half) / width), min(1.0, (centre + half) / width)


@dataclass
class WinRate:
    """Shares of wins, ties and losses, and a 95% interval of wins + ties / 2."""

    win: float
    tie: float
    loss: float
    low: float
    high: float

    @property
    def score(self) -> float:
        """Wins and half the ties."""
        return self.win + self.tie / 2


def win_rate(ours: Tensor, theirs: Tensor, tie: float) -> WinRate:
    """Head-to-head comparison of responses to the same prompts.

    Every response of one side meets every response of the other to the same prompt, so the order
    of samples plays no part.

    Args:
        ours, theirs: (N, K) and (N, L) scores.
        tie: differences up to this are ties, and such as rounding makes (objectives/rounding.py).
    """
    wins, ties, losses = outcomes(ours, theirs, tie)
    interval = points_interval(wins + ties / 2, ours.shape[1] * theirs.shape[1])
    return WinRate(wins.mean().item(), ties.mean().item(), losses.mean().item(), *interval)


def outcomes(ours: Tensor, theirs: Tensor, tie: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of N prompts the shares of wins, ties and losses of ours, (N,) each; as win_rate."""
    size = torch.maximum(ours.abs().amax(), theirs.abs().amax()).clamp(min=1).item()
    even = tie + EQUAL * size
    difference = (ours[:, :, None] - theirs[:, None, :]).double().flatten(1)  # (N, K * L)
    wins = (difference > even).double().mean(-1)
    ties = (difference.abs() <= even).double().mean(-1)
    losses = (difference < -even).double().mean(-1)
    return wins, ties, losses


def points_interval(points: Tensor, comparisons: int) -> tuple[float, float]:
    """95% interval of the mean of (N,) points of prompts, each from 0 to 1.

    Wilson's, at the number of independent wins and losses that would vary as the points do. How
    they vary is estimated with one prompt more that is won throughout and one that is lost: where
    nearly all are won, the few that are seen say too little of the others. Covers 91 to 100% of
    truths from 0.5 to 1 with 20 to 200 prompts (tests/objectives/test_estimates.py).

    Args:
        comparisons: for each prompt; so many count at most.
    """
    more = torch.cat([points, points.new_tensor([0.0, 1.0])])
    mean, variance = more.mean(), more.var()
    count = float((mean * (1 - mean) / variance).clamp(1, comparisons) * len(points))
    return wilson_interval(points.mean().item() * count, count)


@dataclass
class Bin:
    """Predictions with a probability in [low, high): their mean, and the share that came true."""

    low: float
    high: float
    confidence: float
    accuracy: float
    count: int


@dataclass
class Calibration:
    """Expected calibration error and the bins, without the empty ones, that it is made of."""

    error: float
    bins: list[Bin]


def calibration_error(probabilities: Tensor, outcomes: Tensor, bins: int = 10) -> Calibration:
    """Sum over bins of n_b / N |accuracy_b - confidence_b| (Guo 2017, 1706.04599 eq. 3).

    Bins are equal-width on [0, 1] and closed below, so that one half begins a bin; the last holds
    1. The error is never negative, so chance alone makes it positive where bins are small.

    Args:
        probabilities: (N,) what the scorer gives the event.
        outcomes: (N,) 1 where it happened, 0 where not, one half at a tie.
    """
    probabilities, outcomes = probabilities.double(), outcomes.double()
    places = (probabilities * bins).floor().clamp(max=bins - 1)
    filled, error = [], 0.0 if probabilities.isfinite().all() else math.nan
    for place in range(bins):
        inside = places == place
        if count := int(inside.sum()):
            confidence = probabilities[inside].mean().item()
            accuracy = outcomes[inside].mean().item()
            filled.append(Bin(place / bins, (place + 1) / bins, confidence, accuracy, count))
            error += count / len(outcomes) * abs(accuracy - confidence)
    return Calibration(error, filled)


def kendall_tau(scores: Tensor, ranks: Tensor) -> float | None:
    """tau-b of one ranking (Kendall 1945): 1 where the best score has the lowest rank, and so on.

    (concordant - discordant) / sqrt(pairs untied in scores * pairs untied in ranks), over all
    pairs; None where all scores or all ranks are tied.

    Args:
        scores: (K,) higher is better.
        ranks: (K,) 1 is best.
    """
    by_score = (scores[:, None] - scores).double().sign()  # (K, K); each pair stands there twice
    by_rank = (ranks - ranks[:, None]).double().sign()
    untied = (by_score**2).sum() * (by_rank**2).sum()
    return ((by_score * by_rank).sum() / untied.sqrt()).item() if untied > 0 else None


def correlation(x: Tensor, y: Tensor) -> float | None:
    """Pearson's correlation of (N,) values; None where either does not vary."""
    if min(len(x.unique()), len(y.unique())) < 2:
        return None
    return torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1].item()


def area_under_curve(scores: Tensor, labels: Tensor) -> float | None:
    """P(a positive scores above a negative), ties half: Mann-Whitney's U / (positives * negatives).

    None without both. Args: scores (N,), labels (N,) in [0, 1]; a share counts as that share.
    """
    _, places = scores.unique(return_inverse=True)  # in ascending order of the scores
    positives = places.bincount(labels.double())
    negatives = places.bincount(1 - labels.double())
    beaten = negatives.cumsum(0) - negatives / 2  # by a positive with this score
    pairs = positives.sum() * negatives.sum()
    return ((positives * beaten).sum() / pairs).item() if pairs > 0 else None
