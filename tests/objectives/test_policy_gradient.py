"""Rewards, advantages and clipped losses: worked numbers and the truths that must hold."""

import pytest
import torch
from torch import Tensor

from rlhf_cli.objectives.advantages import (
    at_last,
    gae,
    group_advantages,
    kl_shaped_rewards,
    last_index,
)
from rlhf_cli.objectives.policy_gradient import clipped_policy_loss, clipped_value_loss

LENGTHS = torch.tensor([6, 1, 4, 3])
MASK = torch.arange(6) < LENGTHS[:, None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------- rewards


def test_worked_rewards() -> None:
    # two tokens of three: -.5 * (-1 - -2) = -.5, and -.5 * (-3 - -1) + 10 = 11
    logprobs, reference = torch.tensor([[-1.0, -3.0, 7.0]]), torch.tensor([[-2.0, -1.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    rewards = kl_shaped_rewards(at_last(torch.tensor([10.0]), mask), logprobs, reference, mask, 0.5)
    assert rewards.tolist() == [[-0.5, 11.0, 0.0]]


def test_rewards_sum_to_the_score_minus_the_kl() -> None:
    scores, logprobs, reference = normal(4), normal(4, 6, seed=1), normal(4, 6, seed=2)
    logprobs.requires_grad_()
    rewards = kl_shaped_rewards(at_last(scores, MASK), logprobs, reference, MASK, 0.3)
    kls = ((logprobs - reference) * MASK).sum(-1).detach()
    torch.testing.assert_close(rewards.sum(-1), scores - 0.3 * kls, rtol=0, atol=1e-10)
    assert (rewards[~MASK] == 0).all()
    assert not rewards.requires_grad
    unshaped = kl_shaped_rewards(at_last(scores, MASK), logprobs, reference, MASK, 0.0)
    assert unshaped.count_nonzero(-1).tolist() == [1, 1, 1, 1]
    assert unshaped[torch.arange(4), LENGTHS - 1].tolist() == scores.tolist()
    # reward and coefficient in other units: the same rewards in those units
    scaled = kl_shaped_rewards(at_last(7 * scores, MASK), logprobs, reference, MASK, 7 * 0.3)
    torch.testing.assert_close(scaled, 7 * rewards)


def test_the_last_index_is_the_last_true() -> None:
    assert last_index(MASK).tolist() == [5, 0, 3, 2]


# --------------------------------------------------------------------------- advantages


def test_worked_advantages() -> None:
    # gamma .5, lam .5, r = 1, 2 and V = 3, 4:
    # A_2 = 2 - 4 = -2; A_1 = (1 + .5 * 4 - 3) + .25 * -2 = -.5; returns A + V
    rewards, values = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[3.0, 4.0, 9.0]])
    mask = torch.tensor([[True, True, False]])
    advantages, returns = gae(rewards, values, mask, 0.5, 0.5)
    assert advantages.tolist() == [[-0.5, -2.0, 0.0]]
    assert returns.tolist() == [[2.5, 2.0, 0.0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.7, 1.0), (1.0, 0.0)])
def test_the_recursion_equals_the_direct_sum(gamma: float, lam: float) -> None:
    rewards, values = normal(4, 6), normal(4, 6, seed=1)
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    for row, length in enumerate(LENGTHS.tolist()):
        v = [*values[row, :length].tolist(), 0.0]
        deltas = [rewards[row, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            direct = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:]))
            assert advantages[row, t].item() == pytest.approx(direct, abs=1e-12)
    torch.testing.assert_close(returns, (advantages + values) * MASK, rtol=0, atol=1e-12)
    assert (advantages[~MASK] == 0).all()


def test_the_ends_of_lambda() -> None:
    rewards, values = normal(4, 6) * MASK, normal(4, 6, seed=1) * MASK
    later = torch.cat([values[:, 1:], torch.zeros(4, 1)], -1)
    one_step = gae(rewards, values, MASK, 0.9, 0.0)[0]
    torch.testing.assert_close(one_step, (rewards + 0.9 * later - values) * MASK)
    discounted = torch.zeros(4, dtype=torch.float64)
    for t in reversed(range(6)):
        discounted = rewards[:, t] + 0.9 * discounted
        whole = gae(rewards, values, MASK, 0.9, 1.0)[0]
        torch.testing.assert_close(whole[:, t], (discounted - values[:, t]) * MASK[:, t])


def test_constant_and_perfect_values() -> None:
    rewards = normal(4, 6) * MASK
    to_go = rewards.flip(-1).cumsum(-1).flip(-1)
    flat = gae(rewards, torch.full_like(rewards, 2.5), MASK, 1.0, 1.0)[0]
    torch.testing.assert_close(flat, (to_go - 2.5) * MASK)
    perfect = gae(rewards, to_go, MASK, 1.0, 0.7)[0]
    torch.testing.assert_close(perfect, torch.zeros_like(perfect), rtol=0, atol=1e-12)


def test_what_lies_outside_the_mask_is_not_seen() -> None:
    rewards, values = normal(4, 6), normal(4, 6, seed=1)
    clean = gae(rewards, values, MASK, 0.9, 0.8)
    dirty = gae(torch.where(MASK, rewards, 1e6), torch.where(MASK, values, -1e6), MASK, 0.9, 0.8)
    torch.testing.assert_close(clean, dirty)


# --------------------------------------------------------------------------- clipped losses

TABLE = [  # advantage, ratio, clip -> d loss / d log-prob
    (2.0, 1.1, -2.0 * 1.1),
    (2.0, 1.3, 0.0),
    (2.0, 0.5, -2.0 * 0.5),
    (-2.0, 0.9, 2.0 * 0.9),
    (-2.0, 0.5, 0.0),
    (-2.0, 1.3, 2.0 * 1.3),
]


@pytest.mark.parametrize(("advantage", "ratio", "expected"), TABLE)
def test_the_clip_table(advantage: float, ratio: float, expected: float) -> None:
    new = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_()
    gain = torch.tensor([[advantage]], dtype=torch.float64)
    clipped_policy_loss(new, gain, 0.2).sum().backward()
    assert new.grad is not None
    assert new.grad.item() == pytest.approx(expected, abs=1e-12)


def test_a_worked_policy_loss() -> None:
    # w = 1.5, A = 2: max(-3, -1.2 * 2) = -2.4; A = -2: max(3, 2.4) = 3
    new, old = torch.tensor([[1.5, 1.5]]).log(), torch.zeros(1, 2)
    losses = clipped_policy_loss(new - old, torch.tensor([[2.0, -2.0]]), 0.2)
    torch.testing.assert_close(losses, torch.tensor([[-2.4, 3.0]]))


def test_on_policy_the_gradient_is_that_of_reinforce() -> None:
    logprobs, gains = normal(4, 6).requires_grad_(), normal(4, 6, seed=1)
    count = MASK.sum()
    loss = clipped_policy_loss(logprobs - logprobs.detach(), gains, 0.2)
    ((loss * MASK).sum() / count).backward()
    torch.testing.assert_close(logprobs.grad, -gains * MASK / count, rtol=0, atol=1e-10)


def test_a_huge_clip_clips_nothing() -> None:
    new, old, gains = normal(4, 6), normal(4, 6, seed=1), normal(4, 6, seed=2)
    loss = clipped_policy_loss(new - old, gains, 1e9)
    torch.testing.assert_close(loss, -torch.exp(new - old) * gains)


def test_worked_value_losses() -> None:
    # V = 3, V_old = 1, R = 2, clip .2: max((3 - 2)^2, (1.2 - 2)^2) / 2 = .5
    # V = 3, V_old = 1, R = 4, clip .2: max((3 - 4)^2, (1.2 - 4)^2) / 2 = 3.92
    values, old, returns = torch.full((2,), 3.0), torch.ones(2), torch.tensor([2.0, 4.0])
    losses = clipped_value_loss(values, old, returns, 0.2)
    torch.testing.assert_close(losses, torch.tensor([0.5, 3.92]))


def test_the_value_clip_is_inactive_near_the_old_value() -> None:
    old, returns = normal(4, 6), normal(4, 6, seed=1)
    values = old + 0.19 * torch.tanh(normal(4, 6, seed=2))
    free = 0.5 * (values - returns) ** 2
    torch.testing.assert_close(clipped_value_loss(values, old, returns, 0.2), free)
    torch.testing.assert_close(
        clipped_value_loss(values + 5, old, returns, None), 0.5 * (values + 5 - returns) ** 2
    )


# --------------------------------------------------------------------------- groups


def test_worked_group_advantages() -> None:
    # rewards 0, 1, 2, 3: mean 1.5, std (ddof 1) sqrt(5 / 3) = 1.290994
    ours = group_advantages(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), eps=0.0)
    expected = torch.tensor([[-1.5, -0.5, 0.5, 1.5]]) / 1.290994
    torch.testing.assert_close(ours, expected)


def test_group_advantages_ignore_scale_and_shift() -> None:
    rewards = normal(5, 8)
    ours = group_advantages(rewards)
    assert ours.sum(-1).abs().max().item() < 1e-6
    torch.testing.assert_close(ours.std(-1), torch.ones(5).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(group_advantages(3 * rewards + 7), ours, rtol=1e-3, atol=0)
    torch.testing.assert_close(group_advantages(-3 * rewards), -ours, rtol=1e-3, atol=0)
    repeated = group_advantages(torch.cat([rewards, rewards]))
    torch.testing.assert_close(repeated, torch.cat([ours, ours]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, -7e5])
def test_a_group_of_equal_rewards_is_worth_exactly_nothing(reward: float) -> None:
    equal = torch.full((3, 7), reward)  # 7 * .1 / 7 is not .1 in float32
    assert (group_advantages(equal) == 0).all()
    assert (group_advantages(torch.tensor([[reward]])) == 0).all()


def test_on_policy_the_grpo_loss_is_zero_and_its_gradient_is_not() -> None:
    """1/G sum_i 1/len_i sum_t: the mean over all tokens would not be zero."""
    gains = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]).double()).flatten()
    logprobs = normal(4, 6).requires_grad_()
    losses = clipped_policy_loss(logprobs - logprobs.detach(), gains[:, None], 0.2) * MASK
    loss = (losses.sum(-1) / LENGTHS).mean()
    loss.backward()
    assert abs(loss.item()) < 1e-7
    expected = -gains[:, None] / (4 * LENGTHS[:, None]) * MASK
    torch.testing.assert_close(logprobs.grad, expected.double())
    assert abs((losses.sum() / MASK.sum()).item()) > 0.1
