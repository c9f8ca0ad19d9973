"""Estimators of the KL divergence: values, and the gradients that they have as losses."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_cli.objectives.kl import k1, k3, schulman_kl_coef, weighted_k3, ziegler_kl_coef


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
    of_k3 = gradient(lambda logs: (weights * k3(logs, reference)).sum(), policy)
    ours = gradient(lambda logs: (weights * weighted_k3(logs, policy, reference)).sum(), policy)
    torch.testing.assert_close(of_k1, torch.zeros_like(of_k1), rtol=0, atol=1e-12)
    torch.testing.assert_close(of_k3, forward, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours, reverse, rtol=0, atol=1e-12)
    assert not torch.allclose(forward, reverse, atol=1e-2)  # the wrong direction is another one


def test_the_gradient_is_right_off_policy_too() -> None:
    policy, reference, old = distributions(0, 1, 2)
    ours = gradient(lambda logs: (old.exp() * weighted_k3(logs, old, reference)).sum(), policy)
    reverse = gradient(lambda logs: divergence(logs, reference), policy)
    torch.testing.assert_close(ours, reverse, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("shift", "divergence", "k1_spread", "k3_spread"), [(0.1, 0.005, 20, 1.42), (1.0, 0.5, 2, 1.7)]
)
def test_schulmans_table(
    shift: float, divergence: float, k1_spread: float, k3_spread: float
) -> None:
    """q = N(0, 1), p = N(shift, 1), samples of q; spreads in units of the true KL."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4_000_000, dtype=torch.float64, generator=generator)
    own, other = -(x**2) / 2, -((x - shift) ** 2) / 2
    for estimator, spread in ((k1, k1_spread), (k3, k3_spread)):
        values = estimator(own, other)
        assert values.std().item() / divergence == pytest.approx(spread, rel=0.015)
        error = spread * divergence / math.sqrt(len(x))
        assert abs(values.mean().item() - divergence) < max(4 * error, 0.01 * divergence)


def test_the_proportional_controller() -> None:
    rollouts, horizon = 100, 1000
    same = ziegler_kl_coef(0.2, 6.0, 6.0, rollouts, horizon)
    assert same == 0.2
    # 10% above the target: 1 + .1 * 100 / 1000
    assert ziegler_kl_coef(0.2, 6.6, 6.0, rollouts, horizon) == pytest.approx(0.2 * 1.01)
    assert ziegler_kl_coef(0.2, 600.0, 6.0, rollouts, horizon) == pytest.approx(0.2 * 1.02)
    assert ziegler_kl_coef(0.2, -3.0, 6.0, rollouts, horizon) == pytest.approx(0.2 * 0.98)


def test_the_doubling_controller() -> None:
    coef, trace = 1.0, []
    for kl in (3.0, 3.9, 4.1, 8.9, 9.1, 100.0, 0.0, 6.0):  # the band is 4 to 9
        coef = schulman_kl_coef(coef, kl, 6.0)
        trace.append(coef)
    assert trace == [0.5, 0.25, 0.25, 0.25, 0.5, 1.0, 0.5, 0.5]
