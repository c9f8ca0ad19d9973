"""Comparisons: worked numbers, gradients against formulas, and what the losses leave unchanged."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_cli.objectives.preference import (
    dpo_gradient_weight,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_baseline,
    kto_loss,
    kto_weights,
    log1mexp,
    log_odds,
    odds_ratio_loss,
    robust_dpo_loss,
    simpo_loss,
    unlikelihood_loss,
)
from rlhf_cli.objectives.reward_model import bradley_terry_loss, plackett_luce_loss

BETA = 0.3


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), of)[0]


def slope(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """d loss / d h at each point."""
    h = at.detach().clone().requires_grad_()
    return gradient(loss(h), h)


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


POINTS = doubles(-30.0, -4.0, -0.1, 0.0, 0.7, 4.0, 30.0)


# --------------------------------------------------------------------------- DPO


def test_a_worked_dpo_pair() -> None:
    # rho_w = -10 + 12 = 2, rho_l = -9 + 8 = -1, h = 3, beta h = .9; loss = log(1 + e^-.9)
    right, wrong = math.log(1 + math.exp(-0.9)), math.log(1 + math.exp(0.9))
    assert dpo_loss(doubles(3.0), 0.3).item() == pytest.approx(right, abs=1e-12)
    # with e = .1
    smoothed, robust = 0.9 * right + 0.1 * wrong, (0.9 * right - 0.1 * wrong) / 0.8
    assert dpo_loss(doubles(3.0), 0.3, 0.1).item() == pytest.approx(smoothed, abs=1e-12)
    assert robust_dpo_loss(doubles(3.0), 0.3, 0.1).item() == pytest.approx(robust, abs=1e-12)
    assert dpo_loss(doubles(-1e5), 0.3).item() == pytest.approx(3e4)  # no overflow


def test_dpo_starts_at_ln_2_with_half_the_weight() -> None:
    start = torch.zeros(1)
    assert dpo_loss(start, BETA).item() == pytest.approx(math.log(2), abs=1e-6)
    assert dpo_loss(start, BETA, 0.2).item() == pytest.approx(math.log(2), abs=1e-6)
    assert robust_dpo_loss(start, BETA, 0.2).item() == pytest.approx(math.log(2), abs=1e-6)
    assert dpo_gradient_weight(start, BETA).item() == 0.5
    assert slope(lambda h: dpo_loss(h, BETA), start).item() == pytest.approx(-BETA / 2)


def test_dpo_gradients_follow_the_formula() -> None:
    weight = dpo_gradient_weight(POINTS.clone().requires_grad_(), BETA)
    assert not weight.requires_grad
    close(weight, 1 / (1 + torch.exp(BETA * POINTS)))
    close(slope(lambda h: dpo_loss(h, BETA), POINTS), -BETA * weight)
    rejected = slope(lambda rho: dpo_loss(POINTS - rho, BETA), torch.zeros_like(POINTS))
    close(rejected, BETA * weight)


def test_token_gradients_are_the_weight_times_those_of_the_log_probs() -> None:
    logits = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    ids = torch.tensor([[0, 3, 1, 4], [2, 2, 0, 1]])
    sums = torch.log_softmax(logits, -1).gather(-1, ids[..., None]).sum((1, 2))  # of y_w and y_l
    h = sums[0] - sums[1] - doubles(0.4)
    found = torch.autograd.grad(dpo_loss(h, BETA).sum(), logits, retain_graph=True)[0]
    expected = -BETA * dpo_gradient_weight(h, BETA) * gradient(sums[0] - sums[1], logits)
    close(found, expected)


def test_a_swap_of_labels() -> None:
    close(dpo_loss(POINTS, BETA) - dpo_loss(-POINTS, BETA), -BETA * POINTS)


def test_half_the_labels_flipped_leave_nothing_to_learn() -> None:
    close(dpo_loss(POINTS, BETA, 0.5), dpo_loss(-POINTS, BETA, 0.5))
    assert slope(lambda h: dpo_loss(h, BETA, 0.5), doubles(0.0)).item() == 0


@pytest.mark.parametrize("e", [0.05, 0.1, 0.3, 0.499])
def test_label_smoothing_is_stationary_where_the_model_believes_it(e: float) -> None:
    best = torch.logit(doubles(1 - e)) / BETA
    close(slope(lambda h: dpo_loss(h, BETA, e), best), doubles(0.0))
    assert slope(lambda h: dpo_loss(h, BETA, e), best + 1).item() > 0  # pulled back


@pytest.mark.parametrize("e", [0.0, 0.1, 0.4])
def test_the_robust_loss_expects_the_clean_one(e: float) -> None:
    """Over flips with probability e, in value and in gradient."""
    flipped = (1 - e) * robust_dpo_loss(POINTS, BETA, e) + e * robust_dpo_loss(-POINTS, BETA, e)
    close(flipped, dpo_loss(POINTS, BETA))
    close(
        (1 - e) * slope(lambda h: robust_dpo_loss(h, BETA, e), POINTS)
        + e * slope(lambda h: robust_dpo_loss(-h, BETA, e), POINTS),
        slope(lambda h: dpo_loss(h, BETA), POINTS),
    )


@pytest.mark.parametrize("e", [0.0, 0.1, 0.5, 0.8])
def test_the_weight_of_a_pair_in_the_gradient_is_its_distance_from_the_label(e: float) -> None:
    weight = dpo_gradient_weight(POINTS, BETA, torch.full_like(POINTS, e))
    close(slope(lambda h: dpo_loss(h, BETA, e), POINTS).abs(), BETA * weight)


# --------------------------------------------------------------------------- soft labels

SOFT = doubles(1.0, 0.9, 0.75, 0.5, 0.3, 0.1, 0.0)  # p for each of POINTS
SOFTENED: dict[str, Callable[[Tensor, Tensor | float], Tensor]] = {
    "dpo": lambda h, e: dpo_loss(h, BETA, e),
    "ipo": lambda h, e: ipo_loss(h, BETA, e),
}


def test_worked_pairs_with_soft_labels() -> None:
    # beta h = ln 3, so sigmoid is 3/4: -(3/4) ln (3/4) - (1/4) ln (1/4), and with p = 1/4 the sides
    # change places
    h = doubles(math.log(3), math.log(3), math.log(3)) / 0.5
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    other = -0.25 * math.log(0.75) - 0.75 * math.log(0.25)
    found = dpo_loss(h, 0.5, 1 - doubles(0.75, 0.25, 1.0))
    close(found, doubles(entropy, other, -math.log(0.75)))
    # tau = .25: the target is 2 (2p - 1): 2, 1, 0 and -2
    found = ipo_loss(doubles(3.0, 3.0, 3.0, 3.0), 0.25, 1 - doubles(1.0, 0.75, 0.5, 0.0))
    close(found, doubles(1.0, 4.0, 9.0, 25.0))


@pytest.mark.parametrize("name", SOFTENED)
def test_a_certain_soft_label_is_the_hard_one_to_the_bit(name: str) -> None:
    loss = SOFTENED[name]
    for points in (POINTS, POINTS.float()):
        sure = 1 - torch.ones_like(points)
        assert torch.equal(loss(points, sure), loss(points, 0.0))
        hard = slope(lambda h: loss(h, 0.0), points)
        assert torch.equal(slope(lambda h: loss(h, 1 - torch.ones_like(h)), points), hard)


@pytest.mark.parametrize("name", SOFTENED)
def test_sides_that_change_places_with_their_chances_are_the_same_pair(name: str) -> None:
    loss = SOFTENED[name]
    close(loss(POINTS, 1 - SOFT), loss(-POINTS, SOFT))
    close(slope(lambda h: loss(h, 1 - SOFT), POINTS), slope(lambda h: loss(-h, SOFT), POINTS))


@pytest.mark.parametrize("name", SOFTENED)
def test_a_soft_label_teaches_what_as_many_hard_ones_do(name: str) -> None:
    """p of them for one side, 1 - p for the other: the gradients are the same."""
    loss = SOFTENED[name]
    drawn = SOFT * slope(lambda h: loss(h, 0.0), POINTS)
    drawn += (1 - SOFT) * slope(lambda h: loss(-h, 0.0), POINTS)
    close(slope(lambda h: loss(h, 1 - SOFT), POINTS), drawn)


# --------------------------------------------------------------------------- IPO and hinge


def test_a_worked_ipo_pair_and_its_optimum() -> None:
    # tau = .25: the target is 2
    assert ipo_loss(doubles(-1.0), 0.25).item() == 9.0
    assert ipo_loss(doubles(0.0), 0.25).item() == 1 / (4 * 0.25**2)
    assert slope(lambda h: ipo_loss(h, 0.25), doubles(2.0)).item() == 0
    close(slope(lambda h: ipo_loss(h, 0.25), POINTS), 2 * (POINTS - 2))


def test_certain_labels_drive_dpo_without_end_and_ipo_to_its_target() -> None:
    """Gradient descent on one pair that is always labelled the same."""
    ends: dict[str, list[float]] = {}
    losses = {"dpo": lambda h: dpo_loss(h, BETA), "ipo": lambda h: ipo_loss(h, BETA)}
    for name, loss in losses.items():
        h, ends[name] = doubles(0.0), []
        for step in range(1, 4001):
            h = h - 0.2 * slope(loss, h)
            if step in (1000, 2000, 4000):
                ends[name].append(h.item())
    first, second, third = ends["dpo"]
    # h ~ log(t) / beta: each doubling of the time adds the same
    assert second - first == pytest.approx(math.log(2) / BETA, rel=0.05)
    assert third - second == pytest.approx(math.log(2) / BETA, rel=0.05)
    assert ends["ipo"] == pytest.approx([1 / (2 * BETA)] * 3, abs=1e-12)
    assert (slope(losses["dpo"], doubles(10.0, 100.0, 700.0)) < 0).all()


def test_the_hinge_stops_at_its_margin() -> None:
    # beta h = .5, 1, 3 and -1
    h = doubles(1.0, 2.0, 6.0, -2.0)
    assert hinge_loss(h, 0.5).tolist() == [0.5, 0.0, 0.0, 2.0]
    assert hinge_loss(doubles(0.0), 0.5).item() == 1
    assert slope(lambda h: hinge_loss(h, 0.5), doubles(1.0, 6.0, -2.0)).tolist() == [-0.5, 0, -0.5]


@pytest.mark.parametrize(
    "loss",
    [
        lambda w, r: dpo_loss(w - r, BETA, 0.1),
        lambda w, r: robust_dpo_loss(w - r, BETA, 0.1),
        lambda w, r: ipo_loss(w - r, BETA),
        lambda w, r: hinge_loss(w - r, BETA),
        lambda w, r: simpo_loss(w, r, 2.0, 0.5),
    ],
)
def test_only_differences_count(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    w, r = torch.randn(2, 6, dtype=torch.float64, generator=generator)
    close(loss(w + 3, r + 3), loss(w, r))
    chosen, rejected = w.requires_grad_(), r.requires_grad_()
    found = torch.autograd.grad(loss(chosen, rejected).sum(), (chosen, rejected))
    close(found[0] + found[1], torch.zeros_like(w))


# --------------------------------------------------------------------------- Plackett-Luce DPO


def test_rankings_of_log_ratios() -> None:
    """The listwise form of DPO: two responses are a pair, and a constant cancels."""
    rho = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ranks, mask = torch.tensor([[1, 2]] * 4), torch.ones(4, 2, dtype=torch.bool)
    pair = dpo_loss(rho[:, 0] - rho[:, 1], BETA)
    close(plackett_luce_loss(BETA * rho, ranks, mask), pair)
    close(bradley_terry_loss(BETA * rho[:, 0], BETA * rho[:, 1]), pair)
    close(plackett_luce_loss(BETA * (rho + 7), ranks, mask), pair)
    start = plackett_luce_loss(torch.zeros(1, 4), torch.arange(4)[None], torch.ones(1, 4).bool())
    assert start.item() == pytest.approx(math.log(24), abs=1e-6)


# --------------------------------------------------------------------------- KTO


def kto(rho: Tensor, z0: Tensor | float, weights: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Half of the responses desirable, then half not."""
    half = len(rho) // 2
    return kto_loss(rho, torch.tensor([True] * half + [False] * half), z0, BETA, *weights)


def test_worked_kto_responses() -> None:
    # beta (rho - z0) = .3 * (5 - 1) = 1.2 on the good side, .3 * (1 + 3) = 1.2 on the bad one
    gone = 1 - 1 / (1 + math.exp(-1.2))
    close(kto(doubles(5.0, -3.0), 1.0, (1.25, 0.5)), doubles(1.25 * gone, 0.5 * gone))
    # at the start it is half the weight
    close(kto(doubles(0.0, 0.0), 0.0, (4 / 3, 1.0)), doubles(2 / 3, 0.5))


def test_kto_gradients_follow_the_formula_and_fade_at_both_ends() -> None:
    rho = torch.cat([POINTS, POINTS]).requires_grad_()
    s = torch.sigmoid(BETA * (rho.detach() - 0.5))
    bump = BETA * s * (1 - s)
    expected = torch.cat([-1.5 * bump[:7], 0.75 * bump[7:]])
    found = gradient(kto(rho, 0.5, (1.5, 0.75)), rho)
    close(found, expected)
    assert found[[0, 6]].abs().max().item() < 1e-3


def test_the_baseline_is_a_kl_and_carries_no_gradient() -> None:
    mismatched = doubles(1.5, -0.5, 1.25, 2.0).requires_grad_()
    z0 = kto_baseline(mismatched)
    assert z0.item() == 1.0625
    assert not z0.requires_grad
    assert kto_baseline(-mismatched).item() == 0
    free, rho = doubles(0.7).requires_grad_(), doubles(0.2, 0.3).requires_grad_()
    losses = kto(rho, free)
    losses.sum().backward()
    assert free.grad is None and rho.grad is not None
    close(losses, kto(rho, 0.7))


def test_weights_make_up_for_unequal_numbers() -> None:
    assert kto_weights(30, 30) == (1.0, 1.0)
    assert kto_weights(60, 15) == (1.0, 4.0)
    assert kto_weights(10, 25) == (2.5, 1.0)
    for desirable, undesirable in ((3, 7), (1000, 1), (13, 11)):
        good, bad = kto_weights(desirable, undesirable)
        assert min(good, bad) == 1
        assert good * desirable == pytest.approx(bad * undesirable)
    for none in ((0, 4), (4, 0), (0, 0)):
        with pytest.raises(ValueError, match="desirable and undesirable"):
            kto_weights(*none)


# --------------------------------------------------------------------------- without a reference


def test_a_worked_odds_ratio() -> None:
    # p = .8 and .5: odds 4 and 1, ratio 4; -log(4 / 5)
    chosen, rejected = doubles(0.8).log().requires_grad_(), doubles(0.5).log()
    close(log_odds(chosen), doubles(4).log())
    found = odds_ratio_loss(chosen, rejected)
    assert found.item() == pytest.approx(-math.log(0.8), abs=1e-12)
    # ORPO 2403.07691 sec. 4.3: -(1 - s(log ratio)) / (1 - p)
    assert gradient(found, chosen).item() == pytest.approx(-0.2 / 0.2, abs=1e-12)
    close(odds_ratio_loss(rejected, rejected), doubles(2).log())


def test_log1mexp_is_exact_at_both_ends() -> None:
    x = doubles(-1e-300, -1e-18, -1e-8, -0.5, -0.69, -0.7, -3.0, -40.0, -800.0)
    expected = [
        math.log(-math.expm1(each)) if each > -1 else math.log1p(-math.exp(each))
        for each in x.tolist()
    ]
    torch.testing.assert_close(log1mexp(x), doubles(*expected), rtol=1e-14, atol=0)
    # -e^x / (1 - e^x) = 1 / (1 - e^-x)
    steep = [-math.exp(each) / -math.expm1(each) for each in x.tolist()]
    torch.testing.assert_close(slope(log1mexp, x), doubles(*steep), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_odds_of_near_certainty_are_finite(dtype: torch.dtype) -> None:
    certain = torch.tensor([-1e-8, -1e-8, -0.7, 0.0, 0.0, -1e4, -1e4], dtype=dtype)
    other = torch.tensor([-0.7, -1e-8, -1e-8, -0.7, 0.0, -1e-8, -2e4], dtype=dtype)
    chosen, rejected = certain.requires_grad_(), other.requires_grad_()
    found = odds_ratio_loss(chosen, rejected)
    assert found.isfinite().all()
    for side in torch.autograd.grad(found.sum(), (chosen, rejected)):
        assert side.isfinite().all()


def test_a_saturated_model_takes_finite_gradients_from_the_odds() -> None:
    """Through the softmax, whose own slope vanishes as that of the odds explodes."""
    logits = torch.tensor([[40.0, 0.0], [12.0, 0.0]], requires_grad=True)  # y_w, y_l
    mean = torch.log_softmax(logits, -1)[:, 0]
    slopes = gradient(odds_ratio_loss(mean[:1], mean[1:]), logits)
    assert slopes.isfinite().all()
    assert slopes.abs().max().item() <= 1


def test_a_worked_simpo_pair() -> None:
    # 2 (-.5 + 1.25) - .5 = 1
    loss = simpo_loss(doubles(-0.5), doubles(-1.25), 2.0, 0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-12)
    equal = simpo_loss(doubles(-3.0), doubles(-3.0), 2.0, 0.5).item()
    assert equal == pytest.approx(math.log(1 + math.exp(0.5)), abs=1e-12)  # -log s(-gamma)
    weight = -2 * torch.sigmoid(0.5 - 2 * POINTS)
    close(slope(lambda a: simpo_loss(a, torch.zeros_like(a), 2.0, 0.5), POINTS), weight)
    close(simpo_loss(POINTS, doubles(0.0), BETA, 0.0), dpo_loss(POINTS, BETA))


def test_unlikelihood_has_no_weight_and_no_floor() -> None:
    chosen, rejected = doubles(-2.0, -2.0), doubles(-3.0, -3e6).requires_grad_()
    found = unlikelihood_loss(chosen, rejected, 0.5)
    close(found, doubles(0.5, 2.0 - 1.5e6))
    close(gradient(found, rejected), doubles(0.5, 0.5))  # however unlikely it is already
