"""Agreement against published and hand-worked numbers."""

import math

import pytest
import torch

from rlhf_cli.objectives.agreement import NOMINAL, ORDINAL, flip_rate, krippendorff_alpha

N = math.nan
# Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, section D: four observers
PUBLISHED = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, N, N, N],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, N, 3],
    [N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, N],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, N],
]


@pytest.mark.parametrize(("metric", "alpha"), [(NOMINAL, 0.743), (ORDINAL, 0.815)])
def test_alpha_is_the_published_one(metric: str, alpha: float) -> None:
    table = torch.tensor(PUBLISHED).T
    assert krippendorff_alpha(table, metric) == pytest.approx(alpha, abs=5e-4)


def test_alpha_by_hand() -> None:
    """Two raters, four units, one disagreement: D_o = 2/8, D_e = (3 x 5 x 2) / (8 x 7)."""
    table = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    assert krippendorff_alpha(table) == pytest.approx(1 - 0.25 / (30 / 56))


def test_alpha_of_nothing_and_of_all_alike() -> None:
    assert math.isnan(krippendorff_alpha(torch.tensor([[1.0, N], [N, 0.0]])))
    assert math.isnan(krippendorff_alpha(torch.tensor([[1.0, 1.0], [1.0, 1.0]])))
    assert krippendorff_alpha(torch.tensor([[1.0, 1.0], [0.0, 0.0]])) == 1


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.25, 0.5])
def test_a_planted_rate_of_errors_is_found_again(rate: float) -> None:
    assert flip_rate(rate**2 + (1 - rate) ** 2) == pytest.approx(rate)
