"""How far those agree who judged the same things."""

import math

import torch
from torch import Tensor

NOMINAL, ORDINAL = "nominal", "ordinal"


def krippendorff_alpha(values: Tensor, metric: str = NOMINAL) -> float:
    """Krippendorff's alpha: 1 - disagreement seen / disagreement expected by chance.

    1 where all agree, 0 where they agree as chance would have it, below 0 where less. A unit that
    fewer than two have judged says nothing (Krippendorff 2011, Computing Krippendorff's
    Alpha-Reliability).

    Args:
        values: (N, R) what each of R raters says of N units; NaN where nothing.
        metric: nominal takes all different values as equally far apart; ordinal goes by how many
            judgements lie between them.

    Returns:
        Not a number where no unit is judged twice, or all judgements are alike.
    """
    values = values.double()
    counts = (~values.isnan()).sum(-1)
    values = values[counts > 1]
    levels = values[~values.isnan()].unique()
    if len(levels) < 2:
        return math.nan
    given = (values[:, :, None] == levels).double().sum(1)  # (N, V) judgements of each value
    judged = given.sum(-1)
    pairs = given[:, :, None] * given[:, None, :] - torch.diag_embed(given)
    coincidences = (pairs / (judged - 1)[:, None, None]).sum(0)  # (V, V)
    totals = coincidences.sum(-1)
    expected = (totals[:, None] * totals[None, :] - totals.diag()) / (totals.sum() - 1)
    apart = _distances(totals, metric)
    return 1 - ((coincidences * apart).sum() / (expected * apart).sum()).item()


def _distances(totals: Tensor, metric: str) -> Tensor:
    """(V, V) squared distances of the values, of which there are so many judgements each."""
    if metric == NOMINAL:
        return 1 - torch.eye(len(totals), dtype=totals.dtype)
    upto = totals.cumsum(0)
    middle = upto - totals / 2
    return (middle[:, None] - middle[None, :]).square()


def flip_rate(agreement: float) -> float:
    """How often each of two errs on two outcomes if they agree so often and err independently.

    a = f^2 + (1 - f)^2, so f = (1 - sqrt(2a - 1)) / 2; one half where they agree no more often than
    by chance.
    """
    return (1 - math.sqrt(max(0.0, 2 * agreement - 1))) / 2
