"""Several policies on the same prompts: paired differences, many tests at once, and ratings."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_cli.objectives.estimates import numbered, redrawn

ELO = 400 / math.log(10)
"""Points of Elo's scale to a unit of log odds: 400 points are odds of 10 to 1."""

ROUNDS = 100  # of Newton's method, which needs about ten
STEP = 2.0  # of log odds, at most, lest an early step run away
EXACT = 1e-12
SAME = 1e-6  # points that rounding may tell ratings apart by
FEWEST = 6  # prompts that can tell players apart: a coin gives all of five to one in 1 of 16


@dataclass
class Difference:
    """A mean of differences, its standard error, and the chance of one as far from 0 if 0 is true.

    p: two-sided, by Student's t; not a number with one prompt. Where they do not vary t would be
        infinite however few they are: it is 1 if all are 0, else that of the sign test.
    """

    mean: float
    stderr: float
    p: float


def paired_difference(ours: Tensor, theirs: Tensor) -> Difference:
    """Of ours over theirs on the same N prompts, which are what is independent.

    How hard a prompt is falls out, so that the error is that of the differences alone.

    Args: ours (N, K), theirs (N, L): responses of both to each prompt.
    """
    return mean_difference(ours.double().mean(-1) - theirs.double().mean(-1))


def mean_difference(differences: Tensor) -> Difference:
    """Of (N,) differences, one for each prompt."""
    count = len(differences)
    mean = differences.double().mean().item()
    if count < 2:
        return Difference(mean, math.nan, math.nan)
    stderr = (differences.double().std() / count**0.5).item()
    if stderr == 0:
        return Difference(mean, 0.0, 0.5 ** (count - 1) if mean else 1.0)
    return Difference(mean, stderr, student_p(mean / stderr, count - 1))


def student_p(t: float, freedom: int) -> float:
    """Chance of |T| >= |t| for Student's t with so many degrees of freedom.

    With t = sqrt(freedom) tan(angle) the density is that of cos(angle)^(freedom - 1); it is summed
    by Simpson's rule, far tails apart from the rest, so that small chances keep their digits.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))

    def area(low: float, high: float) -> float:
        points = torch.linspace(low, high, 2001, dtype=torch.double)
        weights = torch.ones_like(points)
        weights[1:-1:2], weights[2:-1:2] = 4, 2
        heights = points.cos().clamp(min=0) ** (freedom - 1)
        return (weights * heights).sum().item() * (high - low) / 6000

    # most of it lies within a few 1 / sqrt(freedom) of 0: steps are fine where it is
    edge = min(math.pi / 2, 12 / math.sqrt(freedom))
    whole = area(0, edge) + area(edge, math.pi / 2)
    end = min(math.pi / 2, angle + 12 / math.sqrt(freedom))
    return min(1.0, (area(angle, end) + area(end, math.pi / 2)) / whole)


def holm(chances: Sequence[float]) -> list[float]:
    """The chances of m tests made at once, corrected (Holm 1979): those below 0.05 hold together.

    In ascending order the i-th is multiplied by m - i + 1, and none is less than one before it. One
    that is not a number counts as a test that says nothing.
    """
    order = sorted(range(len(chances)), key=lambda i: 1.0 if math.isnan(chances[i]) else chances[i])
    corrected, most = [math.nan] * len(chances), 0.0
    for rank, i in enumerate(order):
        if not math.isnan(chances[i]):
            most = max(most, min(1.0, (len(chances) - rank) * chances[i]))
            corrected[i] = most
    return corrected


def bradley_terry(points: Tensor, anchor: int = 0) -> Tensor:
    """The strengths under which the points are likeliest (Bradley and Terry 1952), in log odds.

    Maximises sum over i, j of points_ij log sigmoid(s_i - s_j), whose maximum does not depend on
    the order of games. It is finite where each player, or a chain of others, has taken points from
    every other one. Newton's method, with the anchor held at 0.

    Args:
        points: (..., P, P) what i took from j: a win is 1, a tie one half for both.
        anchor: the player whose strength is 0.

    Returns:
        (..., P).
    """
    points = points.double()
    games = points + points.mT
    strengths = points.new_zeros(points.shape[:-1])
    free = [i for i in range(points.shape[-1]) if i != anchor]
    if not free:
        return strengths
    for _ in range(ROUNDS):
        chances = (strengths[..., :, None] - strengths[..., None, :]).sigmoid()
        gradient = (points - games * chances).sum(-1)
        spread = games * chances * (1 - chances)
        curvature = torch.diag_embed(spread.sum(-1)) - spread
        step = torch.linalg.solve(curvature[..., free, :][..., free], gradient[..., free])
        strengths[..., free] += step.clamp(-STEP, STEP)
        if step.abs().max() < EXACT:
            break
    return strengths


@dataclass
class Ratings:
    """Of P players, in points of Elo's scale above the anchor, whose rating is 0.

    low, high: (P,) of a 95% interval; not numbers where all bootstraps have the same rating, as of
        who wins on every prompt: they tell nothing of the error.
    apart: (P, P) whether i is above j: the interval of their difference lies above 0, and is of
        FEWEST prompts or more. Where one wins all of fewer no redrawing of them says otherwise.
    """

    points: Tensor
    low: Tensor
    high: Tensor
    apart: Tensor


def ratings(points: Tensor, anchor: int, seed: int, resamples: int = 1000) -> Ratings:
    """Ratings from all head-to-heads, with intervals by a bootstrap over prompts.

    A prompt is drawn with all that was played on it: games on one prompt are not independent. One
    prompt more, on which all tie, keeps ratings finite where one player takes every point; so a
    difference is a little smaller than it may be.

    Args:
        points: (N, P, P) what i took from j on each prompt, as shares of their games there; both
            are 0 where they did not meet.
        anchor: the player that has 0.
        seed: of the bootstrap.
    """
    count, players = points.shape[:2]
    points = points.double()
    tied = (1 - torch.eye(players, dtype=torch.double)) / 2
    sums = redrawn(count, seed, resamples) @ points.flatten(1)
    sums = sums.unflatten(-1, (players, players)) + tied
    centre = ELO * bradley_terry(points.sum(0) + tied, anchor)
    again = ELO * bradley_terry(sums, anchor)  # (R, P)
    ends = torch.tensor([0.025, 0.975], dtype=torch.double)
    alike = again.amax(0) - again.amin(0) < SAME
    alike[anchor] = False  # its 0 is no estimate
    low, high = again.quantile(ends, 0).masked_fill(alike, math.nan)
    gaps = again[:, :, None] - again[:, None, :]
    apart = (gaps.quantile(0.025, 0) > 0) & (count >= FEWEST)
    return Ratings(centre, low, high, apart)


def length_controlled(
    points: Tensor, longer: Tensor, clusters: Sequence[Hashable] | None = None
) -> Difference:
    """The win rate if both sides were equally long (Dubois 2024, 2404.04475, without its term for
    how hard a prompt is): sigmoid(a) of the regression sigmoid(a + b tanh(longer / its std)).

    p is that of one half. Errors are those of the sandwich, clustered by prompt. A unit of a normal
    prior holds b, and a little of one a, where one side wins or loses all. Then, and of one prompt,
    what is seen tells nothing of the error, and neither it nor p is a number.

    Args:
        points: (N,) 1 where ours won, 0 where it lost, in between where a judge was unsure.
        longer: (N,) by how many tokens ours is the longer one.
        clusters: (N,) the prompt of each comparison; None where each has one of its own.
    """
    points, longer = points.double(), longer.double()
    cluster = numbered(clusters or range(len(points)))
    count = int(cluster.max()) + 1
    spread = longer.square().mean().sqrt().clamp(min=1e-9)
    columns = torch.stack([torch.ones_like(longer), (longer / spread).tanh()], -1)  # (N, 2)
    prior = points.new_tensor([0.01, 1.0])
    found = points.new_zeros(2)
    for _ in range(ROUNDS):
        chances = (columns @ found).sigmoid()
        weights = chances * (1 - chances)
        curvature = columns.mT @ (weights[:, None] * columns) + prior.diag()
        step = torch.linalg.solve(curvature, columns.mT @ (points - chances) - prior * found)
        found = found + step.clamp(-STEP, STEP)
        if step.abs().max() < EXACT:
            break
    scores = columns.new_zeros(count, 2)
    scores.index_add_(0, cluster, columns * (points - chances)[:, None])
    bread = torch.linalg.inv(curvature)
    stderr = (bread @ (scores.mT @ scores) @ bread)[0, 0].sqrt().item()
    rate = found[0].sigmoid().item()
    if count < 2 or bool((points == points[0]).all()):
        stderr = math.nan
    p = student_p(found[0].item() / stderr, count - 1) if stderr > 0 else math.nan
    return Difference(rate, stderr * rate * (1 - rate), p)
