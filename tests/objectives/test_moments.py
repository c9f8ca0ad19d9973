"""Moments of all values so far."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli.objectives.moments import RunningMoments


def test_worked_moments() -> None:
    # 1, 3: mean 2, variance 1; then 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5, std of ddof 1
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, math.nan, 3.0]))
    assert (moments.mean, moments.var, moments.count) == (2.0, 1.0, 2)
    moments.update(torch.tensor([5.0, 7.0]))
    assert (moments.mean, moments.var, moments.count) == (4.0, 5.0, 4)
    assert moments.std == pytest.approx((20 / 3) ** 0.5)


def test_nothing_seen_has_no_spread() -> None:
    moments = RunningMoments()
    moments.update(torch.tensor([math.nan, math.inf, -math.inf]))
    assert moments == RunningMoments()
    assert moments.std == 0
    moments.update(torch.tensor([4.0]))
    assert (moments.mean, moments.std) == (4.0, 0.0)


@given(st.lists(st.lists(st.floats(-10, 10), max_size=5), min_size=1, max_size=6))
def test_batches_add_up_to_the_whole(batches: list[list[float]]) -> None:
    """Far from 0, where a difference of squares would have nothing left."""
    moments = RunningMoments()
    for batch in batches:
        moments.update(torch.tensor(batch, dtype=torch.float64) + 1e6)
    whole = torch.tensor([value for batch in batches for value in batch], dtype=torch.float64)
    assert moments.count == len(whole)
    if len(whole):
        assert moments.mean - 1e6 == pytest.approx(whole.mean().item(), abs=1e-7)
        assert moments.var == pytest.approx(whole.var(correction=0).item(), abs=1e-5)


def test_rounding_is_no_spread() -> None:
    moments = RunningMoments()
    moments.update(torch.tensor([0.3, 0.3 + 2e-7, 0.3 - 2e-7]))
    assert moments.std > 0 and not moments.varies
    moments.update(torch.tensor([0.4]))
    assert moments.varies
