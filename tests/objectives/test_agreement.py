"""Agreement against published and hand-worked numbers."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from rlhf_cli.objectives.agreement import (
    NOMINAL,
    ORDINAL,
    Alpha,
    either_way,
    flip_rate,
    krippendorff_alpha,
)

N = math.nan
# Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, section D: four observers
PUBLISHED = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, N, N, N],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, N, 3],
    [N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, N],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, N],
]


def alpha(table: Tensor, metric: str = NOMINAL) -> Alpha:
    """Of units that are independent."""
    return krippendorff_alpha(table, range(len(table)), metric)


def alpha_of_pairs(table: Tensor, metric: str = NOMINAL) -> Alpha:
    """Of pairs, each of a prompt of its own."""
    return krippendorff_alpha(either_way(table), 2 * [*range(len(table))], metric)


@pytest.mark.parametrize(("metric", "value"), [(NOMINAL, 0.743), (ORDINAL, 0.815)])
def test_alpha_is_the_published_one(metric: str, value: float) -> None:
    found = alpha(torch.tensor(PUBLISHED).T, metric)
    assert found.value == pytest.approx(value, abs=5e-4)
    assert found.low < found.value < found.high


def test_alpha_by_hand() -> None:
    """Two raters, four units, one disagreement: D_o = 2/8, D_e = (3 x 5 x 2) / (8 x 7)."""
    table = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    assert alpha(table).value == pytest.approx(1 - 0.25 / (30 / 56))


def test_alpha_of_pairs_by_hand() -> None:
    """The same, either way: 16 judgements, 8 of each value: D_e = (8 x 8 x 2) / (16 x 15)."""
    table = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    assert alpha_of_pairs(table).value == pytest.approx(1 - 0.25 / (128 / 240))


def test_alpha_of_pairs_with_a_tie_by_hand() -> None:
    """Two raters agree on two pairs, and one calls the third a tie.

    Either way 12 judgements: 5 wins, 5 losses, 2 ties; 4 of 12 pairings disagree. Nominal D_e is
    2 (25 + 10 + 10) / (12 x 11); ordinal distances are 1 between win and loss, 1/4 to a tie.
    """
    table = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.5]])
    assert alpha_of_pairs(table).value == pytest.approx(1 - (4 / 12) / (90 / 132))
    found = alpha_of_pairs(table, ORDINAL).value
    assert found == pytest.approx(1 - (4 / 12 / 4) / ((50 + 40 / 4) / 132))


@pytest.mark.parametrize("metric", [NOMINAL, ORDINAL])
def test_alpha_of_pairs_is_one_whatever_is_called_first(metric: str) -> None:
    """Of all 32 ways to write five pairs; by alpha of the table as it is they differ."""
    table = torch.tensor([[1.0, 1, 1], [1, 0, N], [1, 0.5, 1], [0.5, 0.5, 0], [1, 1, N]])
    turned = [
        torch.where(torch.tensor(turns)[:, None], 1 - table, table)
        for turns in product([False, True], repeat=5)
    ]
    found = [alpha_of_pairs(each, metric) for each in turned]
    for end in ("value", "low", "high"):
        assert len({round(getattr(each, end), 9) for each in found}) == 1
    assert len({round(alpha(each, metric).value, 9) for each in turned}) > 4


def test_alpha_of_nothing_and_of_all_alike() -> None:
    assert math.isnan(alpha(torch.tensor([[1.0, N], [N, 0.0]])).value)
    assert math.isnan(alpha(torch.tensor([[1.0, 1.0], [1.0, 1.0]])).value)
    assert math.isnan(alpha_of_pairs(torch.tensor([[0.5, 0.5], [0.5, 0.5]])).value)
    agreed = [
        alpha(torch.tensor([[1.0, 1.0], [0.0, 0.0]])),
        alpha_of_pairs(torch.tensor([[1.0, 1.0], [1.0, 1.0]])),  # the better one was called first
    ]
    for found in agreed:
        assert found.value == 1 and math.isnan(found.low) and math.isnan(found.high)


def test_the_interval_is_over_clusters() -> None:
    """Six pairs of a prompt on which two agree, or do not, say no more than one of them."""
    once = torch.tensor([[1.0, 1.0]] * 30 + [[1.0, 0.0]] * 10)
    prompts = [*range(40)]
    alone = krippendorff_alpha(either_way(once), [*prompts, *prompts])
    six = [prompt for prompt in prompts for _ in range(6)]
    often = krippendorff_alpha(either_way(once.repeat_interleave(6, 0)), [*six, *six])
    assert (often.low, often.high) == pytest.approx((alone.low, alone.high), abs=0.02)
    as_if = alpha_of_pairs(once.repeat_interleave(6, 0))
    assert as_if.high - as_if.low < 0.5 * (often.high - often.low)


def test_the_interval_covers_what_is_true() -> None:
    """Two raters err independently in a quarter of 40 pairs: they agree in 0.625, alpha is 1/4."""
    generator, covered = torch.Generator().manual_seed(0), 0
    for _ in range(60):
        flips = (torch.rand(40, 2, generator=generator) < 0.25).double()
        found = alpha_of_pairs(1 - flips)
        covered += found.low <= 0.25 <= found.high
    assert covered >= 53  # of 57 at 95%; fewer than 53 by chance in 1 of 100


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.25, 0.5])
def test_a_planted_rate_of_errors_is_found_again(rate: float) -> None:
    assert flip_rate(rate**2 + (1 - rate) ** 2) == pytest.approx(rate)


def test_what_one_alone_has_judged_widens_no_interval() -> None:
    table = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]] * 5)
    more = torch.cat([table, torch.tensor([[1.0, N], [N, N]] * 30)])
    assert alpha(more) == alpha(table)
