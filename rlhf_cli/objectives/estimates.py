"""Estimates from N prompts x K responses, with uncertainty clustered by prompt."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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


def clustered_stderr(values: Tensor, clusters: Sequence[Hashable]) -> float:
    """Standard error of the mean of (N,) values whose clusters (prompts) are independent.

    sqrt(sum over clusters of (sum of deviations)^2) / N; with one value each it is the usual one.
    """
    sums: defaultdict[Hashable, float] = defaultdict(float)
    deviations = (values.double() - values.double().mean()).tolist()
    for cluster, deviation in zip(clusters, deviations, strict=True):
        sums[cluster] += deviation
    return math.sqrt(sum(total**2 for total in sums.values())) / len(deviations)


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


def win_rate(ours: Tensor, theirs: Tensor, tie: float, seed: int, resamples: int = 2000) -> WinRate:
    """Head-to-head comparison of responses to the same prompts.

    Every response of one side meets every response of the other to the same prompt, so the order
    of samples plays no part. The interval is a percentile bootstrap over prompts.

    Args:
        ours, theirs: (N, K) and (N, L) scores.
        tie: differences up to this are ties.
    """
    difference = (ours[:, :, None] - theirs[:, None, :]).double().flatten(1)  # (N, K * L)
    wins = (difference > tie).double().mean(-1)  # (N,)
    ties = (difference.abs() <= tie).double().mean(-1)
    points = wins + ties / 2
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(points), (resamples, len(points)), generator=generator)
    low, high = points[picks].mean(-1).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    win, even = wins.mean().item(), ties.mean().item()
    return WinRate(win, even, (difference < -tie).double().mean().item(), low, high)
