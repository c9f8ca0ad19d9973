"""Paired differences, Holm's correction and ratings, by hand and against known truths."""

import math

import pytest
import torch

from rlhf_cli.objectives.comparisons import (
    ELO,
    bradley_terry,
    holm,
    length_controlled,
    mean_difference,
    paired_difference,
    ratings,
    student_p,
)


def test_a_worked_difference() -> None:
    # 3 - 1, 1 - 1, 5 - 1 on three prompts: mean 2, std 2, error 2 / sqrt 3, t sqrt 3
    ours = torch.tensor([[2.0, 4.0], [1.0, 1.0], [5.0, 5.0]])
    found = paired_difference(ours, torch.ones(3, 1))
    assert (found.mean, found.stderr) == pytest.approx((2, 2 / math.sqrt(3)))
    assert found.p == pytest.approx(student_p(math.sqrt(3), 2))
    assert mean_difference(torch.zeros(4)).p == 1
    for sign in (1, -1):  # four coins that fall alike, of 16 ways 2
        assert mean_difference(sign * torch.ones(4)).p == 1 / 8
    assert math.isnan(mean_difference(torch.ones(1)).p)


def test_worked_chances_of_students_t() -> None:
    # one degree is Cauchy's: 1 - 2/pi atan t; two: 1 - t / sqrt(2 + t^2)
    assert student_p(1.0, 1) == pytest.approx(0.5)
    assert student_p(-3.0, 1) == pytest.approx(1 - 2 / math.pi * math.atan(3))
    assert student_p(1.0, 2) == pytest.approx(1 - 1 / math.sqrt(3))
    # many are a normal's, also far out
    for t in (0.0, 0.5, 1.96, 4.0):
        assert student_p(t, 10**8) == pytest.approx(math.erfc(t / math.sqrt(2)), rel=1e-5)
    assert student_p(2.228, 10) == pytest.approx(0.05, abs=1e-4)  # of any table
    assert student_p(2.601, 199) == pytest.approx(0.01, abs=1e-4)


def test_pairing_takes_out_how_hard_a_prompt_is() -> None:
    generator = torch.Generator().manual_seed(0)
    hard = 5 * torch.randn(200, 1, generator=generator)
    ours = hard + 0.3 + torch.randn(200, 4, generator=generator)
    theirs = hard + torch.randn(200, 4, generator=generator)
    found = paired_difference(ours, theirs)
    assert found.stderr == pytest.approx(math.sqrt(0.5 / 200), rel=0.2) and found.p < 1e-3


def test_a_test_is_wrong_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(1)
    chances = [mean_difference(torch.randn(8, generator=generator)).p for _ in range(2000)]
    assert sum(p < 0.05 for p in chances) / 2000 == pytest.approx(0.05, abs=0.015)


def test_a_worked_correction() -> None:
    # .01 * 4, .02 * 3, .03 * 2, .5; the third is no less than the second
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.7]) == [0.7] and holm([0.8, 0.9]) == [1, 1]
    found = holm([0.01, math.nan])
    assert found[0] == pytest.approx(0.02) and math.isnan(found[1])


def test_ratings_of_the_true_win_rates_are_the_true_ones() -> None:
    truth = torch.tensor([0.0, 0.7, -0.4, 2.5], dtype=torch.double)
    chances = (truth[:, None] - truth).sigmoid() * 30
    chances.fill_diagonal_(0)
    assert bradley_terry(chances).tolist() == pytest.approx(truth.tolist(), abs=1e-6)
    moved = bradley_terry(chances, anchor=2)
    assert (moved - moved[0]).tolist() == pytest.approx(truth.tolist(), abs=1e-6)


def test_two_players_differ_by_the_log_odds() -> None:
    points = torch.tensor([[0.0, 3.0], [1.0, 0.0]])
    assert bradley_terry(points)[1].item() == pytest.approx(-math.log(3))
    assert ELO * math.log(10) == pytest.approx(400)  # 400 points: 10 to 1


def test_players_who_never_met_are_rated_through_others() -> None:
    # 1 beats 0 by 3 to 1, 2 beats 1 by 3 to 1: 2 is 2 ln 3 above 0
    points = torch.tensor([[0.0, 1, 0], [3, 0, 1], [0, 3, 0]])
    assert bradley_terry(points).tolist() == pytest.approx([0, math.log(3), 2 * math.log(3)])


def games(truth: torch.Tensor, prompts: int, seed: int) -> torch.Tensor:
    """(N, P, P) a game of each pair on each prompt."""
    generator = torch.Generator().manual_seed(seed)
    chances = (truth[:, None] - truth).sigmoid()
    wins = (torch.rand(prompts, len(truth), len(truth), generator=generator) < chances).double()
    upper = wins.triu(1)
    return upper + (1 - upper).triu(1).mT


def test_intervals_of_ratings_hold_the_truth_and_say_what_is_not_separable() -> None:
    truth = torch.tensor([0.0, 0.05, 0.6], dtype=torch.double)
    covered, apart = 0, torch.zeros(3, 3)
    for seed in range(60):
        found = ratings(games(truth, 100, seed), anchor=0, seed=seed, resamples=200)
        covered += int(((found.low <= ELO * truth) & (ELO * truth <= found.high))[1:].sum())
        apart += found.apart
        assert found.points[0] == found.low[0] == found.high[0] == 0
    assert 105 <= covered <= 120
    assert apart[2, 0] > 50 and apart[1, 0] < 10 and apart[0, 2] == 0


def test_who_wins_every_game_has_a_finite_rating() -> None:
    points = torch.zeros(10, 2, 2)
    points[:, 1, 0] = 1
    found = ratings(points, anchor=0, seed=0, resamples=50)
    # ten wins and a tie: log(10.5 / 0.5)
    assert found.points[1].item() == pytest.approx(ELO * math.log(21))
    assert found.apart[1, 0] and not found.apart[0, 1]
    assert found.low[1].isnan() and found.high[1].isnan()  # they say nothing of how far it is known
    assert ratings(points[:1], anchor=0, seed=0).low.isnan().tolist() == [False, True]
    points[0] = points[0].mT.clone()
    found = ratings(points, anchor=0, seed=0)
    assert 0 < found.low[1] < found.points[1] < found.high[1]


def test_a_win_rate_at_equal_length_leaves_length_out() -> None:
    """Ours wins by length alone: half at equal length, though it is longer and wins more."""
    generator = torch.Generator().manual_seed(4)
    longer = 20 * torch.randn(2000, generator=generator) + 20
    chances = (2.0 * (longer / longer.square().mean().sqrt()).tanh()).sigmoid()
    wins = (torch.rand(2000, generator=generator) < chances).double()
    found = length_controlled(wins, longer)
    assert wins.mean() > 0.6
    assert abs(found.mean - 0.5) < 2 * found.stderr < 0.06 and found.p > 0.05
    # the plain win rate where all are of one length
    plain = length_controlled(wins, torch.zeros(2000))
    assert plain.mean == pytest.approx(wins.mean().item(), abs=1e-4)
    assert plain.stderr == pytest.approx(
        (wins.mean() * (1 - wins.mean()) / 2000).sqrt().item(), 1e-3
    )
    won = length_controlled(torch.ones(10), torch.ones(10))
    one = length_controlled(torch.tensor([1.0, 0.5]), torch.tensor([1, 0]), ["p", "p"])
    assert won.mean < 1 and one.mean < 1  # finite, and how far they are known is not known
    assert all(math.isnan(each) for each in (won.stderr, won.p, one.stderr, one.p))
