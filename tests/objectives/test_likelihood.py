"""Sums, masked means and whitening."""

import pytest
import torch

from rlhf_cli.objectives.likelihood import (
    masked_mean,
    masked_scale,
    masked_whiten,
    nll_sum,
    sequence_logprob,
)

MASK = torch.tensor([[True, True, False], [False, True, False]])
LOGPROBS = torch.tensor([[-1.0, -2.0, -99.0], [-99.0, -4.0, -99.0]])


def test_only_masked_tokens_count() -> None:
    assert nll_sum(LOGPROBS, MASK).item() == 7.0  # 1 + 2 + 4
    assert sequence_logprob(LOGPROBS, MASK).tolist() == [-3.0, -4.0]
    assert masked_mean(LOGPROBS, MASK).item() == pytest.approx(-7 / 3)


def test_an_empty_mask_gives_zero_and_not_nan() -> None:
    nowhere = torch.zeros_like(MASK)
    assert masked_mean(LOGPROBS, nowhere).item() == 0
    assert nll_sum(LOGPROBS, nowhere).item() == 0
    assert masked_whiten(LOGPROBS, nowhere).abs().sum().item() == 0


def test_worked_whitening() -> None:
    # values 1, 3, 5: mean 3, biased variance (4 + 0 + 4) / 3 = 8 / 3
    values = torch.tensor([[1.0, 3.0, 70.0], [-8.0, 5.0, 0.0]], dtype=torch.float64)
    whitened = masked_whiten(values, MASK)
    deviation = (8 / 3) ** 0.5
    expected = torch.tensor([[-2 / deviation, 0, 0], [0, 2 / deviation, 0]], dtype=torch.float64)
    torch.testing.assert_close(whitened, expected)


def test_whitening_sees_nothing_outside_the_mask() -> None:
    torch.manual_seed(0)
    values, mask = torch.randn(5, 7, dtype=torch.float64), torch.rand(5, 7) < 0.6
    whitened = masked_whiten(values, mask)
    assert abs(masked_mean(whitened, mask).item()) < 1e-9
    assert masked_mean(whitened**2, mask).item() == pytest.approx(1, abs=1e-7)
    assert (whitened[~mask] == 0).all()
    other = torch.where(mask, values, 1e3)
    torch.testing.assert_close(masked_whiten(other, mask), whitened, rtol=0, atol=1e-9)
    kept = masked_whiten(values, mask, shift_mean=False)
    assert masked_mean(kept, mask).item() == pytest.approx(masked_mean(values, mask).item())
    assert (kept[~mask] == 0).all()


def test_scaling_divides_by_the_std_and_adds_nothing() -> None:
    values = torch.tensor([[1.0, 3.0, 100.0], [5.0, 7.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    expected = torch.tensor([[1.0, 3.0, 0.0], [5.0, 7.0, 0.0]]) / 5**0.5  # of 1 3 5 7
    torch.testing.assert_close(masked_scale(values, mask), expected)


@pytest.mark.parametrize("value", [0.1, -0.3, 7e3])
def test_values_that_do_not_vary_are_not_blown_up(value: float) -> None:
    """Their deviation is rounding; divided by its own size it would be noise of order 1."""
    values, mask = torch.full((7, 9), value), torch.ones(7, 9, dtype=torch.bool)
    torch.testing.assert_close(masked_scale(values, mask), values)
    assert masked_whiten(values, mask).abs().max() == 0
    kept = masked_whiten(values, mask, shift_mean=False)
    torch.testing.assert_close(kept, values)
