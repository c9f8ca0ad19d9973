"""Filters and the draw, on logits that are worked out by hand."""

import pytest
import torch
from torch import Tensor

from rlhf_cli.rollout.sampling import Sampling, choose, filter_logits

LOGITS = torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625]]).log()  # ids 0 to 4
SEEN = torch.tensor([[3, 3]])


def probabilities(logits: Tensor = LOGITS, generated: int = 9, **options: float) -> list[float]:
    """After filters, of the first row."""
    sampling = Sampling(99, **options)  # type: ignore[arg-type]
    found: list[float] = torch.softmax(
        filter_logits(logits, SEEN, generated, sampling, stop_ids=[0]), -1
    )[0].tolist()
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.25, 0.125, 0.0625, 0.0625]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_k": 4}, [0.5, 0.25, 0.125, 0.0625, 0.0625]),  # the tie at the fourth is kept
        ({"top_p": 0.8}, [4 / 7, 2 / 7, 1 / 7, 0, 0]),  # .5 + .25 < .8 <= .875
        ({"top_p": 0.75}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_p": 1e-6}, [1, 0, 0, 0, 0]),
        ({"min_p": 0.25}, [4 / 7, 2 / 7, 1 / 7, 0, 0]),  # .125 / .5 = .25 stays
        ({"temperature": 0.5}, [x * x / 0.3359375 for x in (0.5, 0.25, 0.125, 0.0625, 0.0625)]),
        ({"generated": 1, "min_tokens": 2}, [0, 0.5, 0.25, 0.125, 0.125]),
        ({"generated": 2, "min_tokens": 2}, [0.5, 0.25, 0.125, 0.0625, 0.0625]),
        # log .0625 is negative, so it is multiplied: 2 ** -8
        ({"repetition_penalty": 2.0}, [x / 0.94140625 for x in (0.5, 0.25, 0.125, 2**-8, 0.0625)]),
        # temperature first, then top-p: at T = .5 the first holds .744
        ({"temperature": 0.5, "top_p": 0.7}, [1, 0, 0, 0, 0]),
    ],
)
def test_a_worked_filter(options: dict[str, float], expected: list[float]) -> None:
    assert probabilities(**options) == pytest.approx(expected, abs=1e-6)  # type: ignore[arg-type]


def test_a_positive_logit_is_divided_by_the_penalty() -> None:
    sampling = Sampling(9, repetition_penalty=2.0)
    logits = torch.tensor([[3.0, -1.0, 3.0, -1.0]])
    seen = torch.tensor([[0, 1, 1]])
    ours = filter_logits(logits, seen, 0, sampling, [])
    assert ours.tolist() == [[1.5, -2.0, 3.0, -1.0]]


def test_neutral_options_change_no_bit() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 40)
    seen = torch.randint(40, (5, 3))
    neutral = Sampling(9, 1.0, top_k=40, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    assert torch.equal(filter_logits(logits, seen, 0, neutral, [2]), logits)
    assert torch.equal(filter_logits(logits, seen, 0, Sampling(9), [2]), logits)


def test_the_input_is_left_alone() -> None:
    logits = LOGITS.clone()
    everything = Sampling(9, 0.7, 3, 0.9, 0.1, 1.3, 5)
    filter_logits(logits, SEEN, 0, everything, [1])
    assert torch.equal(logits, LOGITS)


def test_log_odds_scale_with_one_over_the_temperature() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 9, dtype=torch.float64)
    for temperature in (0.1, 0.7, 3.0):
        warm = filter_logits(logits, SEEN, 0, Sampling(9, temperature), [])
        odds = warm[:, :1] - warm[:, 1:]
        expected = (logits[:, :1] - logits[:, 1:]) / temperature
        torch.testing.assert_close(odds, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"top_k": 6}, {"top_p": 0.8}, {"temperature": 0.6}])
def test_draws_have_the_filtered_distribution(options: dict[str, float]) -> None:
    """Pearson's statistic over 1e5 draws stays below the .999 quantile."""
    torch.manual_seed(1)
    logits = torch.randn(1, 12) * 1.5
    filtered = filter_logits(logits, SEEN, 0, Sampling(9, **options), [])  # type: ignore[arg-type]
    expected = torch.softmax(filtered[0], -1) * 1e5
    noise = torch.rand(100_000, generator=torch.Generator().manual_seed(2))
    counts = torch.bincount(choose(filtered.expand(100_000, -1), noise, False), minlength=12)
    possible = expected > 0
    assert (counts[~possible] == 0).all()
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
    quantile = {12: 31.26, 6: 20.52}.get(int(possible.sum()), 31.26)  # 11 and 5 degrees of freedom
    assert statistic < quantile


def test_the_ends_of_the_noise() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    almost_one = 1 - 2**-24  # the largest float32 that torch.rand gives
    noise = torch.tensor([0.0, 0.4999, 0.5, almost_one])
    assert choose(logits.expand(4, -1), noise, False).tolist() == [1, 1, 2, 2]
    assert choose(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([0.99]), True).tolist() == [1]
