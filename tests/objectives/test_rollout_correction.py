"""Weights of samples from another sampler: worked numbers, and the means that they give exactly.

q is the sampler, p the policy as it was when it sampled, w = min(p / q, cap).
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_cli.objectives.kl import kl_loss
from rlhf_cli.objectives.policy_gradient import (
    cispo_loss,
    clipped_policy_loss,
    penalised_policy_loss,
    policy_gradient_loss,
    rollout_weights,
    sequence_log_ratio,
    token_weights,
)
from tests.objectives.spaces import ENDING, ONE, TWO, Space, Tables, drawn

SPACES = {"one": ONE, "two": TWO, "ending": ENDING}
FREE = 1e6  # a cap that holds nothing back


def test_worked_weights_of_tokens_and_of_responses() -> None:
    # ratios 2, 1/4 and 3 of a response, 1/2 of another: products 1.5 and 1/2
    logs = torch.tensor([2.0, 0.25, 3.0, 0.5]).double().log().requires_grad_()
    by_token = rollout_weights(logs, [3, 1], "token", 2.5)
    torch.testing.assert_close(by_token, torch.tensor([2.0, 0.25, 2.5, 0.5]).double())
    by_response = rollout_weights(logs, [3, 1], "sequence", 2.5)
    torch.testing.assert_close(by_response, torch.tensor([1.5, 1.5, 1.5, 0.5]).double())
    held = rollout_weights(logs, [3, 1], "sequence", 1.2)
    assert held.tolist()[:3] == [1.2] * 3  # the cap itself, to the bit
    assert not (by_token.requires_grad or by_response.requires_grad)


def test_where_sampler_and_policy_agree_nothing_is_weighed() -> None:
    for level in ("token", "sequence"):
        assert (rollout_weights(torch.zeros(7), [3, 4], level, 1.0) == 1).all()


def test_weights_stay_finite_whatever_the_sampler_said() -> None:
    logs = torch.tensor([500.0, -500.0, math.inf, -math.inf])
    assert rollout_weights(logs, [1] * 4, "token", 2.0).tolist() == [2, 0, 2, 0]
    assert rollout_weights(logs[:2], [1, 1], "sequence", 1e30).isfinite().all()


# --------------------------------------------------------------------------- expectations


def moved(space: Space, seed: int, by: float = 0.5) -> Tables:
    """Other tables than the reference's."""
    return tuple(
        (table + by * drawn(*table.shape, seed=seed + i)).requires_grad_()
        for i, table in enumerate(space.reference)
    )


def weights_of(space: Space, policy: Tables, sampler: Tables, level: str, cap: float) -> Tensor:
    """(N, T) of all responses."""
    gap = (space.logprobs(policy) - space.logprobs(sampler))[space.mask]
    found = rollout_weights(gap, space.mask.sum(-1).tolist(), level, cap)
    return torch.zeros(space.mask.shape, dtype=gap.dtype).masked_scatter(space.mask, found)


def slopes(loss: Tensor, policy: Tables) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, policy, retain_graph=True)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "clip": lambda new, old, gains, mask: clipped_policy_loss(new - old, gains, 0.2, 0.28, 3.0),
    "klpen": lambda new, old, gains, mask: penalised_policy_loss(new, old, gains, 0.7),
    "policy_gradient": lambda new, old, gains, mask: policy_gradient_loss(new, gains),
    "cispo": lambda new, old, gains, mask: cispo_loss(new, old, gains, None, 0.2),
    "sequence_clip": lambda new, old, gains, mask: (
        clipped_policy_loss(sequence_log_ratio(new, old, mask), gains, 0.2)
        * token_weights(mask.double(), "response_mean", 2)
    ),
    "k2": lambda new, old, gains, mask: kl_loss("k2", new, old, gains, None),
    "weighted_k3": lambda new, old, gains, mask: kl_loss("weighted_k3", new, old, gains, None),
}
"""(N, T) from log-probs now and when it sampled, advantages (or a reference's log-probs), mask."""


@pytest.mark.parametrize("cap", [FREE, 1.3])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_weights_of_responses_give_the_mean_over_the_policy(
    space: Space, loss: str, cap: float
) -> None:
    """E_q[w L] = sum_y min(p, cap q) L(y), which without a cap is E_p[L]; value and gradient of
    each loss, at a policy that has moved since it sampled.
    """
    old, sampler, policy = moved(space, 10), moved(space, 20), moved(space, 30)
    gains = space.reward[:, None].expand(space.mask.shape)
    p, q = space.probabilities(old), space.probabilities(sampler)
    before = space.logprobs(old).detach()
    losses = LOSSES[loss](space.logprobs(policy), before, gains, space.mask) * space.mask
    weights = weights_of(space, old, sampler, "sequence", cap)
    found = (q[:, None] * weights * losses).sum()
    exact = (torch.minimum(p, cap * q)[:, None] * losses).sum()
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    ours, theirs = slopes(found, policy), slopes(exact, policy)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    unweighed = slopes((q[:, None] * losses).sum(), policy)
    assert max((a - b).abs().max().item() for a, b in zip(ours, unweighed, strict=True)) > 1e-2
    assert (cap * q < p).any() == (cap != FREE)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_weights_of_tokens_put_each_token_right_in_the_samplers_contexts(space: Space) -> None:
    """sum_s q(s) sum_a grad p(a|s) Q_q(s, a): contexts, and what comes after, are the sampler's.

    Of one token that is the true gradient.
    """
    policy, sampler = moved(space, 10), moved(space, 20)
    q = space.probabilities(sampler)
    new = space.logprobs(policy)
    losses = policy_gradient_loss(new, space.reward[:, None])
    weights = weights_of(space, policy, sampler, "token", FREE)
    found = slopes((q[:, None] * weights * losses * space.mask).sum(), policy)
    theirs = space.logprobs(sampler).detach()
    exact = torch.zeros((), dtype=torch.float64)
    for t in range(space.mask.shape[1]):
        others = theirs.sum(-1) - theirs[:, t]  # the token itself is drawn from the policy
        exact = exact - ((others + new[:, t]).exp() * space.reward * space.mask[:, t]).sum()
    torch.testing.assert_close(found, slopes(exact, policy), rtol=0, atol=1e-12)
    true = slopes(-(new.sum(-1).exp() * space.reward).sum(), policy)
    apart = max((a - b).abs().max().item() for a, b in zip(found, true, strict=True))
    assert (apart < 1e-12) == (space is ONE)
    unweighed = slopes((q[:, None] * losses * space.mask).sum(), policy)
    further = max((a - b).abs().max().item() for a, b in zip(unweighed, true, strict=True))
    assert further > apart


def test_the_exact_divergence_is_not_weighed() -> None:
    full, new = torch.tensor([0.5, 0.25]), torch.zeros(2)
    assert kl_loss("full", new, new, new, full, torch.tensor([2.0, 2.0])) is full
    found = kl_loss("k2", new, new, new - 1, None, torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.25]))
