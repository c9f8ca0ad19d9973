"""Estimators of the KL divergence: values, and the gradients that they have as losses."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_cli.objectives.kl import (
    full_kl,
    k1,
    k2,
    k3,
    linear,
    schulman_kl_coef,
    weighted_k3,
    ziegler_kl_coef,
)


def distributions(*seeds: int) -> list[Tensor]:
    """Log-probs over 7 outcomes."""
    drawn = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(7, dtype=torch.float64, generator=generator)
        drawn.append(torch.log_softmax(logits, -1))
    return drawn


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q), exactly."""
    return (p.exp() * (p - q)).sum()


def test_expectations_by_enumeration() -> None:
    policy, reference, old = distributions(0, 1, 2)
    exact = divergence(policy, reference).item()
    weights = policy.exp()
    assert (weights * k1(policy, reference)).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (weights * k3(policy, reference)).sum().item() == pytest.approx(exact, abs=1e-12)
    off_policy = (old.exp() * weighted_k3(policy, old, reference)).sum()
    assert off_policy.item() == pytest.approx(exact, abs=1e-12)


def test_k3_is_never_negative_and_zero_at_equality_only() -> None:
    u = torch.linspace(-20, 20, 81, dtype=torch.float64)
    values = k3(u, torch.zeros_like(u))
    assert (values[u != 0] > 0).all()
    assert values[40].item() == 0
    assert (k1(u, torch.zeros_like(u)) < 0).any()
    tiny = k3(torch.tensor(1e-4), torch.tensor(0.0)).item()  # float32: u^2 / 2, not rounded away
    assert tiny == pytest.approx(5e-9, rel=1e-2)


def gradient(of: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """d of(log-probs) / d logits."""
    logits = logits.clone().requires_grad_()
    of(torch.log_softmax(logits, -1)).backward()
    assert logits.grad is not None
    return logits.grad


def test_gradients_as_losses_by_enumeration() -> None:
    """Samples come from pi itself, so the weights of the expectation carry no gradient."""
    policy, reference = distributions(0, 1)
    weights = policy.exp()
    reverse = gradient(lambda logs: divergence(logs, reference), policy)
    forward = gradient(lambda logs: divergence(reference, logs), policy)
    of_k1 = gradient(lambda logs: (weights * k1(logs, reference)).sum(), policy)
    of_k2 = gradient(lambda logs: (weights * k2(logs, reference)).sum(), policy)
    of_k3 = gradient(lambda logs: (weights * k3(logs, reference)).sum(), policy)
    ours = gradient(lambda logs: (weights * weighted_k3(logs, policy, reference)).sum(), policy)
    torch.testing.assert_close(of_k1, torch.zeros_like(of_k1), rtol=0, atol=1e-12)
    torch.testing.assert_close(of_k2, reverse, rtol=0, atol=1e-12)
    torch.testing.assert_close(of_k3, forward, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours, reverse, rtol=0, atol=1e-12)
    assert not torch.allclose(forward, reverse, atol=1e-2)  # the wrong direction is another one


def test_the_gradient_is_right_off_policy_too() -> None:
    policy, reference, old = distributions(0, 1, 2)
    ours = gradient(lambda logs: (old.exp() * weighted_k3(logs, old, reference)).sum(), policy)
    reverse = gradient(lambda logs: divergence(logs, reference), policy)
    torch.testing.assert_close(ours, reverse, rtol=0, atol=1e-12)
    of_k2 = gradient(lambda logs: (old.exp() * k2(logs, reference)).sum(), policy)
    assert not torch.allclose(of_k2, reverse, atol=1e-2)  # right on samples of pi alone


def test_a_worked_full_divergence() -> None:
    # p = 1/2, 1/2 and q = 1/4, 3/4: ln 2 - ln(3) / 2 = .143841
    ours, theirs = torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]).log() + 7  # logits may be shifted
    assert full_kl(ours, theirs).item() == pytest.approx(0.143841, abs=1e-6)


def test_the_full_divergence_and_its_gradient() -> None:
    """KL = sum p log(p / q), d KL / d logit_j = p_j (log(p_j / q_j) - KL); 0 at equality."""
    ours, theirs = (torch.stack(distributions(*seeds)) for seeds in ((0, 1, 2), (3, 4, 2)))
    logits = (ours + 2.5).requires_grad_()
    found = full_kl(logits, theirs)
    found.sum().backward()
    exact = torch.stack([divergence(*pair) for pair in zip(ours, theirs, strict=True)])
    torch.testing.assert_close(found.detach(), exact, rtol=0, atol=1e-12)
    expected = ours.exp() * (ours - theirs - exact[:, None])
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-12)
    assert found[2].item() == pytest.approx(0, abs=1e-15)
    entropy = math.log(7) - full_kl(ours, torch.zeros_like(ours))  # against a uniform one
    torch.testing.assert_close(entropy, -(ours.exp() * ours).sum(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("shift", "estimator", "bias", "spread"),
    [
        *((0.1, k1, 0, 20), (0.1, k2, 0.0025, 1.4177), (0.1, k3, 0, 1.4166)),
        *((1.0, k1, 0, 2), (1.0, k2, 0.25, 1.7321), (1.0, k3, 0, 1.6951)),
    ],
)
def test_schulmans_table(
    shift: float, estimator: Callable[[Tensor, Tensor], Tensor], bias: float, spread: float
) -> None:
    """pi = N(0, 1), ref = N(shift, 1): u = shift^2 / 2 - shift x, KL = shift^2 / 2.

    Bias and standard deviation in units of the KL, by the moments of u; the table has them rounded.
    """
    x = torch.randn(10_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    divergence = shift**2 / 2
    values = estimator(divergence - shift * x, torch.zeros(()).double()) / divergence
    assert values.std().item() == pytest.approx(spread, rel=0.01)
    noise = 4 * spread / math.sqrt(len(x))
    assert values.mean().item() - 1 == pytest.approx(bias, abs=max(0.01, noise))


def test_the_proportional_controller() -> None:
    rollouts, horizon = 100, 1000
    same = ziegler_kl_coef(0.2, 6.0, 6.0, rollouts, horizon)
    assert same == 0.2
    # 10% above the target: 1 + .1 * 100 / 1000
    assert ziegler_kl_coef(0.2, 6.6, 6.0, rollouts, horizon) == pytest.approx(0.2 * 1.01)
    assert ziegler_kl_coef(0.2, 600.0, 6.0, rollouts, horizon) == pytest.approx(0.2 * 1.02)
    assert ziegler_kl_coef(0.2, -3.0, 6.0, rollouts, horizon) == pytest.approx(0.2 * 0.98)


@pytest.mark.parametrize("rollouts", [1000, 5000, 50_000])
def test_a_batch_of_several_horizons_counts_as_one(rollouts: int) -> None:
    """Else a KL far below its target would make the coefficient negative."""
    assert ziegler_kl_coef(0.2, 0.0, 6.0, rollouts, 1000) == pytest.approx(0.16)
    assert ziegler_kl_coef(0.2, 60.0, 6.0, rollouts, 1000) == pytest.approx(0.24)


def test_the_doubling_controller() -> None:
    coef, trace = 1.0, []
    for kl in (3.0, 3.9, 4.1, 8.9, 9.1, 100.0, 0.0, 6.0):  # the band is 4 to 9
        coef = schulman_kl_coef(coef, kl, 6.0)
        trace.append(coef)
    assert trace == [0.5, 0.25, 0.25, 0.25, 0.5, 1.0, 0.5, 0.5]


def test_a_linear_schedule() -> None:
    assert [linear(0.3, 0.1, step, 5) for step in range(1, 6)] == pytest.approx(
        [0.3, 0.25, 0.2, 0.15, 0.1], abs=1e-12
    )
    assert (linear(0.3, 0.1, 1, 5), linear(0.3, 0.1, 5, 5)) == (0.3, 0.1)  # to the last bit
    assert linear(0.3, None, 4, 5) == 0.3
    assert linear(0.3, 0.1, 1, 1) == 0.3


@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_a_kl_that_was_not_measured_moves_no_controller(kl: float) -> None:
    assert ziegler_kl_coef(0.2, kl, 6.0, 100, 1000) == 0.2
    assert schulman_kl_coef(0.2, kl, 6.0) == 0.2
