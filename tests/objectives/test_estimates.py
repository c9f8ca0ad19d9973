"""Means with clustered errors, and win rates."""

import math

import pytest
import torch

from rlhf_cli.objectives.estimates import clustered_mean, clustered_stderr, win_rate


def test_a_worked_estimate() -> None:
    # prompt means 1, 3, 5: mean 3, std 2 (ddof 1), error 2 / sqrt 3
    found = clustered_mean(torch.tensor([[0.0, 2.0], [3.0, 3.0], [9.0, 1.0]]))
    assert found.mean == 3
    assert found.stderr == pytest.approx(2 / math.sqrt(3))
    assert math.isnan(clustered_mean(torch.tensor([[1.0, 2.0]])).stderr)


def test_errors_of_uneven_clusters() -> None:
    # alone, each value counts: deviations -.5 .5 .5 -.5, error sqrt(1) / 4
    values = torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert clustered_stderr(values, range(4)) == pytest.approx(0.25)
    # deviations that agree within a prompt add up: sums -1 and 1, error sqrt(2) / 4
    assert clustered_stderr(values, ["a", "b", "b", "a"]) == pytest.approx(math.sqrt(2) / 4)


def test_the_error_is_honest_when_responses_to_a_prompt_agree() -> None:
    """Over seeds: the estimate is unbiased, and its own error is the spread that is seen."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(400, 50, 1, generator=generator)  # what a prompt's responses share
    rewards = 2 + prompts + 0.3 * torch.randn(400, 50, 4, generator=generator)
    found = [clustered_mean(each) for each in rewards]
    means = torch.tensor([each.mean for each in found])
    spread, claimed = means.std().item(), sum(each.stderr for each in found) / len(found)
    assert abs(means.mean().item() - 2) < 3 * spread / 20
    assert claimed == pytest.approx(spread, rel=0.12)
    quarter = sum(clustered_mean(each[:12]).stderr for each in rewards) / 400
    assert quarter == pytest.approx(claimed * math.sqrt(50 / 12), rel=0.05)


def test_a_worked_win_rate() -> None:
    # prompt 1: 2 > 1, 2 = 2, 0 < 1, 0 < 2; prompt 2: four wins
    ours, theirs = torch.tensor([[2.0, 0.0], [5.0, 5.0]]), torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    found = win_rate(ours, theirs, tie=0.0, seed=0)
    assert (found.win, found.tie, found.loss) == pytest.approx((0.625, 0.125, 0.25))
    assert found.score == pytest.approx(0.6875)
    back = win_rate(theirs, ours, tie=0.0, seed=0)
    assert (back.win, back.tie, back.loss) == pytest.approx((0.25, 0.125, 0.625))
    assert (back.low, back.high) == pytest.approx((1 - found.high, 1 - found.low))
    assert win_rate(ours, theirs, tie=9.0, seed=0).tie == 1


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(1)
    truth = 0.5 * (1 + math.erf(0.5 / math.sqrt(2) / math.sqrt(2)))  # P(N(.5, 1) > N(0, 1))
    covered = 0
    for seed in range(200):
        ours = torch.randn(60, 2, generator=generator) + 0.5
        theirs = torch.randn(60, 2, generator=generator)
        found = win_rate(ours, theirs, tie=0.0, seed=seed, resamples=300)
        covered += found.low <= truth <= found.high
    assert 180 <= covered <= 199
