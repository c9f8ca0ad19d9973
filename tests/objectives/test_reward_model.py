"""Losses of scores: worked numbers, gradients against formulas, and what ties and padding change.

That they recover the rewards behind the data is shown in test_optimum.py.
"""

import math
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor

from rlhf_cli.objectives.reward_model import (
    bradley_terry_loss,
    centring_penalty,
    kwise_loss,
    logistic_loss,
    plackett_luce_loss,
    regression_loss,
)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
LISTWISE: tuple[Loss, ...] = (kwise_loss, plackett_luce_loss)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), of)[0]


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


# --------------------------------------------------------------------------- pairs


def test_a_worked_bradley_terry_pair() -> None:
    # d = 2 - .5 = 1.5; loss = log(1 + e^-1.5) = log 1.22313 = .201413
    found = bradley_terry_loss(doubles(2.0), doubles(0.5)).item()
    assert found == pytest.approx(0.201413, abs=1e-6)
    equal = bradley_terry_loss(doubles(7.0), doubles(7.0)).item()
    assert equal == pytest.approx(math.log(2), abs=1e-15)
    far = bradley_terry_loss(doubles(-400.0), doubles(400.0)).item()
    assert far == pytest.approx(800.0)  # no overflow


def test_bradley_terry_gradients_follow_the_formula() -> None:
    chosen, rejected = doubles(1.5, -0.3, 4.0), doubles(0.5, 0.9, 4.0)
    chosen.requires_grad_(), rejected.requires_grad_()
    bradley_terry_loss(chosen, rejected).sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    close(chosen.grad, -(1 - torch.sigmoid(chosen - rejected)).detach())
    close(chosen.grad + rejected.grad, doubles(0, 0, 0))
    close(bradley_terry_loss(chosen + 5, rejected + 5), bradley_terry_loss(chosen, rejected))


def test_a_margin_asks_for_more_and_smoothing_for_less() -> None:
    chosen, rejected, margin = doubles(2.0), doubles(0.5), doubles(1.0)
    # d = 1.5 - 1 = .5
    found = bradley_terry_loss(chosen, rejected, margin).item()
    assert found == pytest.approx(math.log(1 + math.exp(-0.5)), abs=1e-12)
    both = 0.8 * math.log(1 + math.exp(-0.5)) + 0.2 * math.log(1 + math.exp(0.5))
    found = bradley_terry_loss(chosen, rejected, margin, 0.2).item()
    assert found == pytest.approx(both, abs=1e-12)
    # together they are least at m + logit(1 - e)
    best = (1 + torch.logit(doubles(0.8))).requires_grad_()
    close(gradient(bradley_terry_loss(best, doubles(0.0), margin, 0.2), best), doubles(0.0))


def test_a_soft_label_is_a_target_of_its_own() -> None:
    """-p log s(d) - (1 - p) log s(-d), at d = ln 3 with s(d) = 3/4: by hand for p = 1, 3/4, 1/4."""
    chosen, rejected = doubles(*[math.log(3)] * 3), doubles(0.0, 0.0, 0.0)
    p = doubles(1.0, 0.75, 0.25)
    found = bradley_terry_loss(chosen, rejected, None, 1 - p).tolist()
    log4, log43 = math.log(4), math.log(4 / 3)
    assert found == pytest.approx([log43, 0.75 * log43 + 0.25 * log4, 0.25 * log43 + 0.75 * log4])
    close(
        bradley_terry_loss(chosen, rejected, None, 1 - p)[0],
        bradley_terry_loss(chosen, rejected)[0],
    )
    best = torch.logit(doubles(0.75)).requires_grad_()  # least where the scores say p
    slope = gradient(bradley_terry_loss(best, doubles(0.0), None, doubles(0.25)), best)
    close(slope, doubles(0.0))


def test_centring_pulls_the_sum_of_a_pair_to_zero() -> None:
    chosen, rejected = doubles(1.5, -2.0).requires_grad_(), doubles(0.5, 2.0)
    found = centring_penalty(chosen, rejected)
    assert found.tolist() == [4.0, 0.0]
    assert gradient(found, chosen).tolist() == [4.0, 0.0]  # 2 (r_w + r_l)


# --------------------------------------------------------------------------- rankings


def every(scores: Tensor) -> Tensor:
    return torch.ones_like(scores, dtype=torch.bool)


def test_a_worked_ranking() -> None:
    # scores log 4, log 2, log 1, the second best first: ranks 2, 1, 3
    scores = doubles(4, 2, 1).log()[None]
    ranks = torch.tensor([[2, 1, 3]])
    # pairs: 2 over 4, 2 over 1, 4 over 1
    pairs = -math.log(2 / 6) - math.log(2 / 3) - math.log(4 / 5)
    assert kwise_loss(scores, ranks, every(scores)).item() == pytest.approx(pairs / 3, abs=1e-12)
    # picks: 2 of (4, 2, 1), then 4 of (4, 1), then the last
    picks = -math.log(2 / 7) - math.log(4 / 5)
    found = plackett_luce_loss(scores, ranks, every(scores)).item()
    assert found == pytest.approx(picks, abs=1e-12)


@pytest.mark.parametrize("loss", LISTWISE)
def test_two_responses_are_a_bradley_terry_pair(loss: Loss) -> None:
    scores = random(4, 2).requires_grad_()
    ranks = torch.tensor([[1, 2], [2, 1], [1, 5], [7, 6]])
    best_first = scores.gather(1, ranks.argsort(-1))
    expected = bradley_terry_loss(best_first[:, 0], best_first[:, 1])
    found = loss(scores, ranks, every(scores))
    close(found, expected)
    close(gradient(found, scores), gradient(expected, scores))


def test_four_responses_are_the_mean_of_their_six_pairs() -> None:
    scores, ranks = random(1, 4), torch.tensor([[3.0, 1.0, 4.0, 2.0]])
    order = ranks[0].argsort().tolist()
    losses = [bradley_terry_loss(scores[0, i], scores[0, j]) for i, j in combinations(order, 2)]
    assert len(losses) == 6
    close(kwise_loss(scores, ranks, every(scores))[0], torch.stack(losses).mean())


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_equal_scores(k: int) -> None:
    scores, ranks = torch.full((1, k), 3.0).double(), torch.arange(k)[None]
    found = plackett_luce_loss(scores, ranks, every(scores)).item()
    assert found == pytest.approx(math.log(math.factorial(k)), abs=1e-12)
    found = kwise_loss(scores, ranks, every(scores)).item()
    assert found == pytest.approx(math.log(2) if k > 1 else 0, abs=1e-12)


@pytest.mark.parametrize("loss", LISTWISE)
def test_rankings_know_neither_order_nor_level(loss: Loss) -> None:
    scores = random(3, 5).requires_grad_()
    ranks = torch.tensor([[1, 2, 3, 4, 5], [2, 2, 1, 4, 3], [5, 5, 1, 5, 2]])
    mask = torch.tensor([[True] * 5, [True] * 5, [True, False, True, True, True]])
    found = loss(scores, ranks, mask)
    slope = gradient(found, scores)
    close(slope.sum(-1), doubles(0, 0, 0))
    moved = scores.detach() + doubles(1, -2, 40)[:, None]
    close(loss(moved, ranks, mask), loss(scores, ranks, mask).detach())
    close(loss(scores, 10.0 * ranks - 3, mask), loss(scores, ranks, mask))
    shuffle = torch.tensor([3, 1, 4, 0, 2])
    mixed = scores.detach()[:, shuffle].requires_grad_()
    again = loss(mixed, ranks[:, shuffle], mask[:, shuffle])
    close(again, loss(scores, ranks, mask))
    close(gradient(again, mixed), slope[:, shuffle])


@pytest.mark.parametrize("loss", LISTWISE)
@pytest.mark.parametrize("junk", [0.0, -1e30, math.inf, math.nan])
def test_padding_changes_nothing_and_takes_no_gradient(loss: Loss, junk: float) -> None:
    scores, ranks = random(2, 3).requires_grad_(), torch.tensor([[2, 1, 3], [1, 1, 2]])
    expected = loss(scores, ranks, every(scores))
    wide = torch.full((2, 5), junk, dtype=torch.float64)
    wide[:, 1:4] = scores.detach()
    wide.requires_grad_()
    mask = torch.tensor([[False, True, True, True, False]] * 2)
    found = loss(wide, torch.cat([torch.zeros(2, 1), ranks, torch.full((2, 1), 9)], -1), mask)
    close(found, expected)
    slope = gradient(found, wide)
    close(slope[:, 1:4], gradient(expected, scores))
    assert slope[:, [0, 4]].abs().sum().item() == 0


@pytest.mark.parametrize("loss", LISTWISE)
def test_a_prompt_without_responses_is_worth_nothing(loss: Loss) -> None:
    scores = random(2, 3).requires_grad_()
    mask = torch.tensor([[False] * 3, [False, True, False]])
    found = loss(scores, torch.tensor([[1, 2, 3]] * 2), mask)
    assert found.tolist() == [0, 0]
    assert gradient(found, scores).abs().sum().item() == 0


def test_ties_are_no_comparison() -> None:
    a, b, c = 0.3, -0.5, 1.1
    scores = doubles(a, b, c)[None]
    two, mask = torch.tensor([[1, 1, 2]]), every(scores)
    over = [bradley_terry_loss(doubles(s), doubles(c)).item() for s in (a, b)]
    # two of three pairs, and still the weight of C(3, 2) = 3
    assert kwise_loss(scores, two, mask).item() == pytest.approx(sum(over) / 3, abs=1e-12)
    # a from (a, c), then b from (b, c)
    assert plackett_luce_loss(scores, two, mask).item() == pytest.approx(sum(over), abs=1e-12)
    for loss in LISTWISE:
        assert loss(scores, torch.full((1, 3), 4), mask).item() == 0


def test_a_top_k_ranking_has_its_exact_likelihood() -> None:
    """Two best of five, the rest tied: the sum over all orders of the rest."""
    scores, mask = random(1, 5, seed=3), torch.ones(1, 5, dtype=torch.bool)
    top = plackett_luce_loss(scores, torch.tensor([[9, 1, 9, 2, 9]]), mask)
    total = torch.zeros(1, dtype=torch.float64)
    for rest in ((3, 4, 5), (3, 5, 4), (4, 3, 5), (4, 5, 3), (5, 3, 4), (5, 4, 3)):
        whole = torch.tensor([[rest[0], 1, rest[1], 2, rest[2]]])
        total += (-plackett_luce_loss(scores, whole, mask)).exp()
    close((-top).exp(), total)


def test_large_scores_stay_finite() -> None:
    scores = torch.tensor([[-1e4, 0.0, 1e4]], requires_grad=True)
    for loss in LISTWISE:
        found = loss(scores, torch.tensor([[1, 2, 3]]), every(scores))
        assert found.isfinite().all()
        assert gradient(found, scores).isfinite().all()


# --------------------------------------------------------------------------- single responses


def test_labels_of_single_responses() -> None:
    scores, labels = doubles(0.0, 2.0, 2.0, -800.0).requires_grad_(), doubles(1.0, 0.0, 0.25, 1.0)
    found = logistic_loss(scores, labels)
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    close(found, doubles(math.log(2), wrong, 0.25 * right + 0.75 * wrong, 800.0))
    close(gradient(found, scores), (torch.sigmoid(scores) - labels).detach())


def test_ratings_are_met_in_least_squares() -> None:
    scores = doubles(1.0, -2.0).requires_grad_()
    found = regression_loss(scores, doubles(3.0, -2.0))
    assert found.tolist() == [4.0, 0.0]
    assert gradient(found, scores).tolist() == [-4.0, 0.0]
