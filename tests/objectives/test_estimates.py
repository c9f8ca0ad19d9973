"""Means and shares with clustered errors, win rates, and agreement of scores with judgements."""

import math

import pytest
import torch

from rlhf_cli.objectives.estimates import (
    area_under_curve,
    calibration_error,
    clustered_mean,
    clustered_share,
    clustered_stderr,
    correlation,
    kendall_tau,
    wilson_interval,
    win_rate,
)


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
    found = win_rate(ours, theirs, tie=0.0)
    assert (found.win, found.tie, found.loss) == pytest.approx((0.625, 0.125, 0.25))
    assert found.score == pytest.approx(0.6875)
    back = win_rate(theirs, ours, tie=0.0)
    assert (back.win, back.tie, back.loss) == pytest.approx((0.25, 0.125, 0.625))
    assert (back.low, back.high) == pytest.approx((1 - found.high, 1 - found.low))
    assert win_rate(ours, theirs, tie=9.0).tie == 1


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(1)
    truth = 0.5 * (1 + math.erf(0.5 / math.sqrt(2) / math.sqrt(2)))  # P(N(.5, 1) > N(0, 1))
    covered = 0
    for _ in range(200):
        ours = torch.randn(60, 2, generator=generator) + 0.5
        theirs = torch.randn(60, 2, generator=generator)
        found = win_rate(ours, theirs, tie=0.0)
        covered += found.low <= truth <= found.high
    assert 180 <= covered <= 199


@pytest.mark.parametrize("prompts", [20, 60, 200])
@pytest.mark.parametrize("truth", [0.03, 0.97, 0.99])
@pytest.mark.parametrize("samples", [1, 3])
def test_the_interval_of_wins_covers_a_truth_near_its_ends(
    prompts: int, truth: float, samples: int
) -> None:
    """A bootstrap covers 0.97 of 20 prompts in half of the cases."""
    generator = torch.Generator().manual_seed(3)
    covered = 0
    for _ in range(200):
        wins = (torch.rand(prompts, samples, generator=generator) < truth).float()
        found = win_rate(wins, torch.full((prompts, 1), 0.5), tie=0.0)
        covered += found.low <= truth <= found.high
    assert covered >= 176


def test_all_won_is_no_certainty() -> None:
    found = win_rate(torch.ones(20, 4), torch.zeros(20, 4), tie=0.0)
    assert (found.win, found.high) == (1, 1)
    assert found.low == pytest.approx(wilson_interval(20, 20)[0])
    lost = win_rate(torch.zeros(20, 4), torch.ones(20, 4), tie=0.0)
    assert (lost.low, lost.high) == pytest.approx((0, 1 - found.low))


def test_scores_that_rounding_tells_apart_are_ties() -> None:
    ours = torch.tensor([[1.0], [-30.0]])
    assert win_rate(ours, ours * (1 + 3e-6), tie=0.0).tie == 1
    assert win_rate(ours, ours + 1e-3, tie=0.0).loss == 1


def test_worked_wilson_intervals() -> None:
    # z = 2: 2 of 8 is (2 * 2 + 4 -+ 2 sqrt(4 + 8 * 3/4)) / 24, 0 of 4 is (4 -+ 4) / 16
    assert wilson_interval(2, 8, z=2) == pytest.approx(
        ((8 - 2 * math.sqrt(10)) / 24, (8 + 2 * math.sqrt(10)) / 24)
    )
    assert wilson_interval(0, 4, z=2) == (0, 0.5)
    assert wilson_interval(4, 4, z=2) == (0.5, 1)


def test_a_share_of_equal_hits_or_of_one_prompt_counts_prompts() -> None:
    right, one_prompt = torch.ones(6), torch.tensor([1.0, 0.0, 1.0, 1.0])
    found = clustered_share(right, "aabbcc")
    assert (found.mean, found.stderr) == (1, 0)
    assert (found.low, found.high) == pytest.approx(wilson_interval(3, 3))
    found = clustered_share(one_prompt, "aaaa")
    assert (found.low, found.high) == pytest.approx(wilson_interval(0.75, 1))


def test_pairs_of_a_prompt_that_agree_count_once() -> None:
    hits = torch.tensor([1.0, 1.0, 1.0, 0.0])
    apart = clustered_share(hits, range(4))
    assert (apart.low, apart.high) == pytest.approx(wilson_interval(3, 4))
    double = clustered_share(hits.repeat(5), [*range(4)] * 5)
    assert (double.low, double.high) == pytest.approx((apart.low, apart.high))


@pytest.mark.parametrize("share", [0.5, 0.85])
def test_the_interval_of_a_share_covers_the_truth_about_as_often_as_it_says(share: float) -> None:
    """Prompts with 1 to 5 pairs that agree with each other two times in three."""
    generator = torch.Generator().manual_seed(2)
    clusters = [prompt for prompt in range(60) for _ in range(prompt % 5 + 1)]
    of = torch.tensor(clusters)
    covered = 0
    for _ in range(400):
        shared = torch.rand(60, generator=generator)[of]
        own = torch.rand(len(of), generator=generator)
        follows = torch.rand(len(of), generator=generator) < 0.8
        hits = (torch.where(follows, shared, own) < share).double()
        found = clustered_share(hits, clusters)
        covered += found.low <= share <= found.high
    assert 368 <= covered <= 392  # 380 expected; for independent pairs it would be 315 or so


def test_a_worked_calibration_error() -> None:
    # [.2, .4): .2 .3 came true once of two, |.5 - .25| * 2/5; [.8, 1]: .9 1 1 always but for one
    # tie, |2.5/3 - 2.9/3| * 3/5
    found = calibration_error(
        torch.tensor([0.3, 0.9, 1.0, 0.2, 1.0]).double(),
        torch.tensor([0.0, 1.0, 0.5, 1.0, 1.0]),
        bins=5,
    )
    assert found.error == pytest.approx(0.1 + 0.08)
    low, high = found.bins
    assert (low.low, low.high, high.low, high.high) == (0.2, 0.4, 0.8, 1)
    assert (low.confidence, low.accuracy, low.count) == pytest.approx((0.25, 0.5, 2))
    assert (high.confidence, high.accuracy, high.count) == pytest.approx((2.9 / 3, 2.5 / 3, 3))


def test_an_honest_probability_is_calibrated_and_an_exaggerated_one_is_not() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(40_000, generator=generator)
    came_true = torch.rand(40_000, generator=generator) < logits.sigmoid()
    assert calibration_error(logits.sigmoid(), came_true).error < 0.012
    assert calibration_error((4 * logits).sigmoid(), came_true).error > 0.15


def test_a_worked_tau_with_ties_in_both() -> None:
    # scores 3 2 2 1, ranks 1 1 2 3. Of six pairs (0,1) is tied in ranks and (1,2) in scores; the
    # other four are concordant: 4 / sqrt(5 * 5)
    scores, ranks = torch.tensor([3.0, 2.0, 2.0, 1.0]), torch.tensor([1, 1, 2, 3])
    assert kendall_tau(scores, ranks) == pytest.approx(0.8)
    assert kendall_tau(-scores, ranks) == pytest.approx(-0.8)
    assert kendall_tau(7 * scores - 100, ranks) == pytest.approx(0.8)
    # one swap among three without ties: two pairs of three agree
    assert kendall_tau(torch.tensor([2.0, 3.0, 1.0]), torch.tensor([1, 2, 3])) == pytest.approx(
        1 / 3
    )
    # three pairs, of which one is tied in ranks only: 2 / sqrt(3 * 2)
    tied = kendall_tau(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1.0, 1.0, 2.0]))
    assert tied == pytest.approx(2 / math.sqrt(6))
    assert kendall_tau(torch.ones(3), torch.tensor([1, 2, 3])) is None
    assert kendall_tau(torch.arange(3), torch.ones(3)) is None


def test_a_worked_correlation() -> None:
    # deviations -1 0 1 and -2 1 1: covariance sum 3, squares 2 and 6
    x, y = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 3, 3])
    assert correlation(x, y) == pytest.approx(3 / math.sqrt(12))
    assert correlation(x, 5 - 2 * x) == pytest.approx(-1)
    assert correlation(x, torch.full((3,), 0.1)) is None
    assert correlation(x[:1], y[:1]) is None


def test_a_worked_area_under_the_curve() -> None:
    # positives 3 1, negatives 2 1 0: 3 beats all three, 1 beats one and ties one: 4.5 / 6
    scores, labels = torch.tensor([1.0, 2.0, 3.0, 1.0, 0.0]), torch.tensor([1, 0, 1, 0, 0])
    assert area_under_curve(scores, labels) == pytest.approx(0.75)
    assert area_under_curve(-scores, labels) == pytest.approx(0.25)
    assert area_under_curve(scores.exp(), labels) == pytest.approx(0.75)
    assert area_under_curve(torch.zeros(5), labels) == 0.5
    assert area_under_curve(scores, torch.ones(5)) is None
