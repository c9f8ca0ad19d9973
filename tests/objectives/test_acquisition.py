"""What labels would be worth, by hand."""

import math

import pytest
import torch

from rlhf_cli.objectives.acquisition import (
    comparison_weights,
    information_gain,
    information_known,
    mean_over_pairs,
    optimistic_gaps,
    preference_variance,
)


def shrunk(covariance: torch.Tensor, phi: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    known = information_known(weights, phi @ covariance @ phi.mT)
    return covariance - covariance @ phi.mT @ known @ phi @ covariance


def test_a_gap_is_the_mean_difference_and_its_deviations() -> None:
    scores = torch.tensor([[0.0, 1.0, 3.0], [0.0, -1.0, 5.0]])
    # differences of 0 and 1: -1 and 1, mean 0, std 1; of 0 and 2: -3 and -5; of 1 and 2: -2 and -6
    gaps = optimistic_gaps(scores, 0.5)
    assert gaps.tolist() == [[0.0, 0.5, 4.5], [0.5, 0.0, 5.0], [4.5, 5.0, 0.0]]
    assert optimistic_gaps(scores[:1], 2.0)[1, 2] == 2.0  # of one scorer the plain difference
    assert optimistic_gaps(scores, 0.0).max() == 4.0


def test_variance_is_of_preferences_and_not_of_sizes() -> None:
    even = math.log(3)  # preferred with 0.75
    scores = torch.tensor([[0.0, even, 20.0], [0.0, -even, 50.0]])
    variance = preference_variance(scores)
    assert variance[0, 1].item() == pytest.approx(0.25**2)  # 0.75 and 0.25
    assert variance[0, 2] < 1e-9  # both prefer the last one, by however much
    assert torch.allclose(variance, variance.mT, atol=1e-12)


def test_the_value_of_a_set_is_the_mean_over_its_pairs() -> None:
    values = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 6.0], [2.0, 6.0, 0.0]])
    assert mean_over_pairs(values, torch.tensor([[0, 1, 2]])).tolist() == [3.0]
    assert mean_over_pairs(values, torch.tensor([[0, 1], [2, 1]])).tolist() == [1.0, 6.0]


def test_a_pair_tells_a_quarter_where_it_is_even_and_nothing_where_it_is_sure() -> None:
    even, sure = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 90.0])
    assert comparison_weights(even).tolist() == [[0.25, -0.25], [-0.25, 0.25]]
    assert comparison_weights(sure).abs().max() < 1e-12
    # phi = 0 and 4 on a line, M = 2: log(1 + 0.25 * 16 / 2)
    states, covariance = torch.tensor([[0.0], [4.0]]).double(), torch.tensor([[0.5]]).double()
    weights = comparison_weights(even)
    gain = information_gain(weights, states @ covariance @ states.mT)
    assert gain.item() == pytest.approx(math.log(3))
    assert shrunk(covariance, states, weights).item() == pytest.approx(1 / 6)


def test_gains_add_up_to_the_determinant_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 4, 5, generator=generator).double()  # three sets of four
    scores = torch.randn(3, 4, generator=generator).double()
    whole = 0.7 * torch.eye(5, dtype=torch.double)
    covariance, gained = whole.inverse(), 0.0
    for phi, said in zip(states, scores, strict=True):
        weights = comparison_weights(said)
        gained += information_gain(weights, phi @ covariance @ phi.mT).item()
        covariance = shrunk(covariance, phi, weights)
        for a in range(4):
            for b in range(a):
                p, apart = (said[a] - said[b]).sigmoid(), phi[a] - phi[b]
                whole += p * (1 - p) * torch.outer(apart, apart)
    assert gained == pytest.approx((whole.logdet() - 5 * math.log(0.7)).item())
    assert torch.allclose(covariance, whole.inverse())
