"""Comparisons: worked numbers, gradients against formulas, and what the losses leave unchanged."""

import math

import pytest
import torch
from torch import Tensor

from rlhf_cli.objectives.preference import bradley_terry_loss, dpo_loss

BETA = 0.3


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def of_margin(h: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The DPO loss of h, put wholly on the chosen side of the policy."""
    none = torch.zeros_like(h)
    return dpo_loss(h, none, none, none, BETA, label_smoothing)[0]


def test_a_worked_bradley_terry_pair() -> None:
    # d = 2 - .5 = 1.5; loss = log(1 + e^-1.5) = log 1.22313 = .201413
    assert bradley_terry_loss(doubles(2.0), doubles(0.5)).item() == pytest.approx(
        0.201413, abs=1e-6
    )
    equal = bradley_terry_loss(doubles(7.0), doubles(7.0)).item()
    assert equal == pytest.approx(math.log(2), abs=1e-15)
    far = bradley_terry_loss(doubles(-400.0), doubles(400.0)).item()
    assert far == pytest.approx(800.0)  # no overflow


def test_bradley_terry_gradients_follow_the_formula() -> None:
    chosen, rejected = doubles(1.5, -0.3, 4.0), doubles(0.5, 0.9, 4.0)
    chosen.requires_grad_(), rejected.requires_grad_()
    bradley_terry_loss(chosen, rejected).sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    weight = 1 - torch.sigmoid(chosen - rejected)
    torch.testing.assert_close(chosen.grad, -weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(chosen.grad + rejected.grad, doubles(0, 0, 0), rtol=0, atol=1e-12)
    shifted = bradley_terry_loss(chosen + 5, rejected + 5)
    torch.testing.assert_close(shifted, bradley_terry_loss(chosen, rejected), rtol=0, atol=1e-12)


def test_bradley_terry_recovers_the_rewards_behind_infinite_data() -> None:
    truth = doubles(0.0, 1.0, -0.7, 2.5)
    wins = torch.sigmoid(truth[:, None] - truth)  # P(i beats j)
    scores = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=200, tolerance_grad=1e-10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        i, j = pairs(4)
        loss = (wins[i, j] * bradley_terry_loss(scores[i], scores[j])).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = scores.detach() - scores.detach()[0]
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-3)


def pairs(count: int) -> tuple[Tensor, Tensor]:
    """All ordered pairs of different items."""
    i, j = torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
    return i[i != j], j[i != j]


def test_a_worked_dpo_pair() -> None:
    # rho_w = -10 + 12 = 2, rho_l = -9 + 8 = -1, h = 3, beta h = .9; loss = log(1 + e^-.9)
    sides = (doubles(-10.0), doubles(-9.0), doubles(-12.0), doubles(-8.0))
    losses, chosen, rejected = dpo_loss(*sides, 0.3)
    assert losses.item() == pytest.approx(math.log(1 + math.exp(-0.9)), abs=1e-12)
    assert (chosen.item(), rejected.item()) == pytest.approx((0.6, -0.3))
    # with e = .1: .9 log(1 + e^-.9) + .1 log(1 + e^.9)
    smoothed = 0.9 * math.log(1 + math.exp(-0.9)) + 0.1 * math.log(1 + math.exp(0.9))
    assert dpo_loss(*sides, 0.3, 0.1)[0].item() == pytest.approx(smoothed, abs=1e-12)


def test_dpo_starts_at_ln_2_with_half_the_weight() -> None:
    policy = doubles(-5.0, -7.0).requires_grad_()
    (w, r), (ref_w, ref_r) = policy.split(1), policy.detach().split(1)
    losses, chosen, rejected = dpo_loss(w, r, ref_w, ref_r, BETA)
    losses.sum().backward()
    assert losses.item() == pytest.approx(math.log(2), abs=1e-12)
    assert chosen.item() == rejected.item() == 0
    torch.testing.assert_close(policy.grad, doubles(-BETA / 2, BETA / 2))


@pytest.mark.parametrize("h", [-4.0, -0.1, 0.0, 0.7, 30.0])
def test_dpo_gradients_follow_the_formula(h: float) -> None:
    chosen, rejected = doubles(h).requires_grad_(), doubles(0.0).requires_grad_()
    zero = doubles(0.0)
    dpo_loss(chosen, rejected, zero, zero, BETA)[0].sum().backward()
    weight = -BETA * torch.sigmoid(doubles(-BETA * h))
    torch.testing.assert_close(chosen.grad, weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(rejected.grad, -weight, rtol=0, atol=1e-12)


def test_what_dpo_leaves_unchanged_and_what_a_swap_does() -> None:
    torch.manual_seed(0)
    w, r, ref_w, ref_r = torch.randn(4, 6, dtype=torch.float64)
    loss = dpo_loss(w, r, ref_w, ref_r, BETA)[0]
    shifted = dpo_loss(w + 3, r + 3, ref_w, ref_r, BETA)[0]
    torch.testing.assert_close(shifted, loss, rtol=0, atol=1e-12)
    h = (w - ref_w) - (r - ref_r)
    swapped = dpo_loss(r, w, ref_r, ref_w, BETA)[0]
    torch.testing.assert_close(loss - swapped, -BETA * h, rtol=0, atol=1e-12)


@pytest.mark.parametrize("e", [0.05, 0.1, 0.3, 0.499])
def test_label_smoothing_is_stationary_where_the_model_believes_it(e: float) -> None:
    h = (torch.logit(doubles(1 - e)) / BETA).requires_grad_()
    of_margin(h, e).sum().backward()
    assert h.grad is not None
    assert abs(h.grad.item()) < 1e-12
    beyond = (h.detach() + 1).requires_grad_()
    of_margin(beyond, e).sum().backward()
    assert beyond.grad is not None and beyond.grad.item() > 0  # pulled back


def test_certain_labels_have_no_finite_optimum() -> None:
    h = doubles(0.0, 10.0, 100.0, 700.0).requires_grad_()
    of_margin(h).sum().backward()
    assert h.grad is not None and (h.grad < 0).all()


def test_implicit_rewards_carry_no_gradient() -> None:
    policy = doubles(1.0).requires_grad_()
    _, chosen, rejected = dpo_loss(policy, policy, policy.detach(), policy.detach(), BETA)
    assert not chosen.requires_grad and not rejected.requires_grad
