"""How far those agree who judged the same things."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_cli.objectives.estimates import numbered, redrawn

NOMINAL, ORDINAL = "nominal", "ordinal"


@dataclass
class Alpha:
    """Krippendorff's alpha and its 95% interval; not numbers where they are not known."""

    value: float
    low: float
    high: float


def krippendorff_alpha(
    values: Tensor, clusters: Sequence[Hashable], metric: str = NOMINAL, seed: int = 0
) -> Alpha:
    """Krippendorff's alpha: 1 - disagreement seen / disagreement expected by chance.

    1 where all agree, 0 where they agree as chance would have it, below 0 where less. A unit that
    fewer than two have judged says nothing (Krippendorff 2011, Computing Krippendorff's
    Alpha-Reliability). What chance gives is known by the judgements alone: alpha is not a number
    where no unit is judged twice, or all judgements are alike.

    The interval is that of 1,000 bootstraps over clusters, which keep what is said within one
    together. Where none of them differs from alpha, as where all agree, they tell nothing of its
    error, and the interval is not a number.

    Args:
        values: (N, R) what each of R raters says of N units; NaN where nothing.
        clusters: (N,) what units are not independent within.
        metric: nominal takes all different values as equally far apart; ordinal goes by how many
            judgements lie between them.
    """
    shared = [i for i, count in enumerate((~values.isnan()).sum(-1).tolist()) if count > 1]
    if not shared:
        return Alpha(math.nan, math.nan, math.nan)
    of_units = coincidences(values[shared])  # (N', V, V)
    places = numbered([clusters[i] for i in shared])
    count = int(places.max()) + 1
    of_clusters = of_units.new_zeros(count, *of_units.shape[1:]).index_add_(0, places, of_units)
    value = alpha_of(of_clusters.sum(0), metric).item()
    times = redrawn(count, seed)
    drawn = alpha_of((times @ of_clusters.flatten(1)).unflatten(-1, of_units.shape[1:]), metric)
    known = drawn[~drawn.isnan()]
    if math.isnan(value) or bool((known - value).abs().max() < 1e-9):
        return Alpha(value, math.nan, math.nan)
    low, high = known.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return Alpha(value, low, high)


def either_way(values: Tensor) -> Tensor:
    """Judgements of pairs, of 1 for the first side, 0 for the second and one half for a tie, with
    those of the same pairs whose sides are exchanged: (N, R) -> (2 N, R).

    Which side of a pair is called the first is arbitrary, but what alpha expects by chance is the
    disagreement of judgements of different pairs, and depends on it: where the better side happens
    to stand first, all seem to say the same. Each pair both ways, as Fisher's intraclass
    correlation has its brothers (1925, chapter VII), gives one alpha whatever is called first: by
    chance wins are as frequent as losses, and without ties alpha is nearly 2 x agreement - 1. Ties
    lie halfway, so that ordinal distances are those of the numbers 0, 1/2 and 1.
    """
    return torch.cat([values, 1 - values])


def coincidences(values: Tensor) -> Tensor:
    """(N, V, V) how often each unit is given both of two of the V values that occur: of its m
    judgements each is paired with each other one, and counts 1 / (m - 1).

    Args: values (N, R), NaN where a rater says nothing; at least two say something.
    """
    levels = values[~values.isnan()].unique()
    given = (values[:, :, None] == levels).double().sum(1)  # (N, V) judgements of each value
    pairs = given[:, :, None] * given[:, None, :] - torch.diag_embed(given)
    return pairs / (given.sum(-1) - 1)[:, None, None]


def alpha_of(coincidences: Tensor, metric: str) -> Tensor:
    """Alpha by the coincidences of all units: (..., V, V) -> (...)."""
    totals = coincidences.sum(-1)  # (..., V)
    chance = totals[..., :, None] * totals[..., None, :] - torch.diag_embed(totals)
    expected = chance / (totals.sum(-1) - 1)[..., None, None]
    apart = _distances(totals, metric)
    return 1 - (coincidences * apart).sum((-1, -2)) / (expected * apart).sum((-1, -2))


def _distances(totals: Tensor, metric: str) -> Tensor:
    """(..., V, V) squared distances of the values, of which there are so many judgements each."""
    if metric == NOMINAL:
        return 1 - torch.eye(totals.shape[-1], dtype=totals.dtype)
    middle = totals.cumsum(-1) - totals / 2
    return (middle[..., :, None] - middle[..., None, :]).square()


def flip_rate(agreement: float) -> float:
    """How often each of two errs on two outcomes if they agree so often and err independently.

    a = f^2 + (1 - f)^2, so f = (1 - sqrt(2a - 1)) / 2; one half where they agree no more often than
    by chance. It falls with a, so the ends of an interval of a give those of f.
    """
    return (1 - math.sqrt(max(0.0, 2 * agreement - 1))) / 2
