"""Rewards of tokens, returns and groups: worked numbers and the truths that must hold."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_cli.objectives.advantages import (
    at_last,
    gae,
    group_advantages,
    group_centred,
    kl_shaped_rewards,
    last_index,
    leave_one_out,
    process_advantages,
    returns_to_go,
    soft_overlong,
)
from rlhf_cli.objectives.rounding import differ

LENGTHS = torch.tensor([6, 1, 4, 3])
MASK = torch.arange(6) < LENGTHS[:, None]
NAN = math.nan


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


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


def test_a_response_without_tokens_has_no_place_for_its_score() -> None:
    mask = torch.tensor([[False, False], [True, False]])
    assert at_last(torch.tensor([NAN, 3.0]), mask).tolist() == [[0.0, 0.0], [3.0, 0.0]]


def test_a_reward_of_a_step_stays_at_its_token() -> None:
    # the grid may hold rewards anywhere: .2 after the first token, 1 at the last
    rewards = torch.tensor([[0.2, 0.0, 1.0]])
    logprobs, reference = torch.tensor([[-1.0, -2.0, -3.0]]), torch.full((1, 3), -2.0)
    mask = torch.ones(1, 3, dtype=torch.bool)
    shaped = kl_shaped_rewards(rewards, logprobs, reference, mask, 0.1)
    torch.testing.assert_close(shaped, torch.tensor([[0.1, 0.0, 1.1]]))


def test_no_value_outside_the_mask_reaches_the_rewards() -> None:
    dirty = torch.where(MASK, normal(4, 6), math.inf)
    shaped = kl_shaped_rewards(dirty, dirty, normal(4, 6, seed=1), MASK, 0.1)
    assert (shaped[~MASK] == 0).all()
    assert shaped[MASK].isfinite().all()


def test_worked_penalties_of_length() -> None:
    # longest 10, soft 4: free up to 6, then a quarter a token, and never more than 1
    lengths = torch.tensor([1, 6, 7, 8, 10, 11, 50])
    expected = [0.0, 0.0, -0.25, -0.5, -1.0, -1.0, -1.0]
    assert soft_overlong(lengths, 10, 4).tolist() == expected


# --------------------------------------------------------------------------- returns


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


def test_worked_returns() -> None:
    # gamma .5: 2, then 1 + .5 * 2 = 2; the third token does not count
    rewards, mask = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]])
    assert returns_to_go(rewards, mask, 0.5).tolist() == [[2.0, 2.0, 0.0]]


def test_without_a_critic_the_score_reaches_every_token() -> None:
    scores = normal(4)
    returns = returns_to_go(at_last(scores, MASK), MASK, 1.0)
    torch.testing.assert_close(returns, scores[:, None] * MASK, rtol=0, atol=1e-12)


# --------------------------------------------------------------------------- groups


def test_worked_group_advantages() -> None:
    # rewards 0, 1, 2, 3: mean 1.5, std (ddof 1) sqrt(5 / 3) = 1.290994
    ours = group_advantages(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), eps=0.0)
    expected = torch.tensor([[-1.5, -0.5, 0.5, 1.5]]) / 1.290994
    torch.testing.assert_close(ours, expected)


def test_worked_baselines() -> None:
    # mean 1.5; the others of 0 have mean 2, those of 1 have 5 / 3
    rewards = doubles(0, 1, 2, 3)[None]
    torch.testing.assert_close(group_centred(rewards), doubles(-1.5, -0.5, 0.5, 1.5)[None])
    expected = doubles(-2, 1 - 5 / 3, 2 - 4 / 3, 3 - 1)[None]
    torch.testing.assert_close(leave_one_out(rewards), expected, rtol=0, atol=1e-12)


def test_group_advantages_ignore_scale_and_shift() -> None:
    rewards = normal(5, 8)
    ours = group_advantages(rewards)
    assert ours.sum(-1).abs().max().item() < 1e-6
    torch.testing.assert_close(ours.std(-1), torch.ones(5).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(group_advantages(3 * rewards + 7), ours, rtol=1e-3, atol=0)
    torch.testing.assert_close(group_advantages(-3 * rewards), -ours, rtol=1e-3, atol=0)
    repeated = group_advantages(torch.cat([rewards, rewards]))
    torch.testing.assert_close(repeated, torch.cat([ours, ours]), rtol=0, atol=1e-9)


EVERY_GROUP = [group_centred, leave_one_out, group_advantages]


@pytest.mark.parametrize("advantages", EVERY_GROUP)
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, -7e5])
def test_a_group_of_equal_rewards_is_worth_exactly_nothing(
    advantages: Callable[[Tensor], Tensor], reward: float
) -> None:
    equal = torch.full((3, 7), reward)  # 7 * .1 / 7 is not .1 in float32
    equal[1, 2:4] = NAN
    assert (advantages(equal) == 0).all()
    assert (advantages(torch.tensor([[reward]])) == 0).all()
    assert (group_advantages(equal, eps=0.0) == 0).all()


@pytest.mark.parametrize("advantages", EVERY_GROUP)
@pytest.mark.parametrize("reward", [0.0, 0.37, -41.5])
def test_what_rounding_tells_apart_is_equal(
    advantages: Callable[[Tensor], Tensor], reward: float
) -> None:
    """A float32 score moves by a few 1e-6 of its size with the padding of its micro-batch."""
    noise = torch.tensor([[0.0, 3e-6, -4e-6, 1e-6]])
    moved = reward + noise * max(1.0, abs(reward))
    assert not differ(moved).any() and (advantages(moved) == 0).all()
    apart = torch.tensor([[reward, reward, reward + 1e-3, reward]])
    assert differ(apart).all() and (advantages(apart) != 0).all()


@pytest.mark.parametrize("advantages", EVERY_GROUP)
def test_fewer_than_two_rewards_are_worth_nothing(
    advantages: Callable[[Tensor], Tensor],
) -> None:
    rewards = torch.tensor([[NAN, 5.0, NAN], [NAN, NAN, NAN]])
    assert (advantages(rewards) == 0).all()
    assert advantages(torch.zeros(0, 4)).shape == (0, 4)


GROUP = st.lists(st.integers(-1000, 1000).map(lambda i: i / 8), min_size=2, max_size=9)


@given(GROUP, st.data())
def test_groups_hold_their_truths(rewards: list[float], data: st.DataObject) -> None:
    """Sum 0, no order, no offset, a response without a reward left out; RLOO by both formulas."""
    ours = doubles(*rewards)[None]
    count = len(rewards)
    order = data.draw(st.permutations(range(count)))
    place = data.draw(st.integers(0, count))
    holed = torch.cat([ours[:, :place], doubles(NAN)[None], ours[:, place:]], -1)
    for advantages in EVERY_GROUP:
        found = advantages(ours)
        assert abs(found.sum().item()) < 1e-6
        torch.testing.assert_close(advantages(ours[:, order]), found[:, order], rtol=0, atol=1e-9)
        torch.testing.assert_close(advantages(ours + 3.5), found, rtol=0, atol=1e-9)
        torch.testing.assert_close(advantages(-ours), -found, rtol=0, atol=1e-9)
        expected = torch.cat([found[:, :place], doubles(0.0)[None], found[:, place:]], -1)
        torch.testing.assert_close(advantages(holed), expected, rtol=0, atol=1e-9)
    others = (ours.sum() - ours) / (count - 1)
    torch.testing.assert_close(leave_one_out(ours), ours - others, rtol=0, atol=1e-11)
    scaled = count / (count - 1) * group_centred(ours)
    torch.testing.assert_close(leave_one_out(ours), scaled, rtol=0, atol=1e-12)


def test_expected_gradients_of_groups_by_enumeration() -> None:
    """Over all groups of three of four responses: RLOO is unbiased, the mean takes a third away.

    Divided by the standard deviation it is the gradient of something else.
    """
    logits, rewards = normal(4).requires_grad_(), normal(4, seed=1)
    logprobs = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((logprobs.exp() * rewards).sum(), logits, retain_graph=True)
    four = torch.arange(4)
    groups = torch.cartesian_prod(four, four, four)  # (64, 3)
    chance = logprobs[groups].sum(-1).exp().detach()

    def expected(gains: Tensor) -> Tensor:
        surrogate = (chance * (gains * logprobs[groups]).mean(-1)).sum()
        return torch.autograd.grad(surrogate, logits, retain_graph=True)[0]

    unbiased = expected(leave_one_out(rewards[groups]))
    torch.testing.assert_close(unbiased, exact, rtol=0, atol=1e-12)
    shrunk = expected(group_centred(rewards[groups]))
    torch.testing.assert_close(shrunk, 2 / 3 * exact, rtol=0, atol=1e-12)
    other = expected(group_advantages(rewards[groups]))
    assert 0.5 < torch.cosine_similarity(other, exact, dim=0).item() < 0.999


# --------------------------------------------------------------------------- steps


def test_worked_advantages_of_steps() -> None:
    """Rewards 1, 3 | none | 2: mean 2, std 1, so that the steps are worth -1, 1 | | 0."""
    rewards = [doubles(1, 3), doubles(), doubles(2)]
    ends = [[1, 3], [], [0]]
    centred = process_advantages(rewards, ends, [5, 2, 3], normalise=False)
    assert [each.tolist() for each in centred] == [[0, 0, 1, 1, 0], [0, 0], [0, 0, 0]]
    # divided by std + eps = 2
    scaled = process_advantages(rewards, ends, [5, 2, 3], normalise=True, eps=1.0)
    assert [each.tolist() for each in scaled] == [[0, 0, 0.5, 0.5, 0], [0, 0], [0, 0, 0]]


def test_one_step_at_the_end_is_outcome_supervision() -> None:
    rewards, lengths = normal(4), LENGTHS.tolist()
    ends = [[length - 1] for length in lengths]
    for normalise, outcome in ((True, group_advantages), (False, group_centred)):
        steps = process_advantages(list(rewards.split(1)), ends, lengths, normalise)
        for found, gain, length in zip(steps, outcome(rewards[None])[0], lengths, strict=True):
            torch.testing.assert_close(found, gain.expand(length), rtol=0, atol=1e-12)


def test_tokens_after_the_last_step_are_worth_nothing() -> None:
    found = process_advantages([doubles(1, 4), doubles(2)], [[0, 2], [1]], [6, 2], normalise=True)
    assert found[0][3:].tolist() == [0, 0, 0]
    assert (found[0][:3] != 0).all()


def test_steps_of_equal_or_no_rewards_are_worth_exactly_nothing() -> None:
    equal = [torch.full((n,), 0.1) for n in (3, 4)]
    ends = [[0, 1, 2], [0, 1, 2, 3]]
    for normalise in (True, False):
        found = process_advantages(equal, ends, [4, 4], normalise)
        assert all((each == 0).all() for each in found)
        none = process_advantages([doubles(), doubles()], [[], []], [2, 3], normalise)
        assert [each.tolist() for each in none] == [[0, 0], [0, 0, 0]]
    missing = process_advantages([doubles(1, NAN, 3)], [[0, 1, 2]], [3], normalise=False)
    assert missing[0].tolist() == [0, 1, 1]


def test_a_step_that_ends_outside_its_response_is_an_error() -> None:
    with pytest.raises(IndexError):
        process_advantages([doubles(1, 2)], [[0, 2]], [2], normalise=False)
