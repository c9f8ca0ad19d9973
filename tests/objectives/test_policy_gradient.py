"""Losses of tokens and their averages: worked numbers and the truths that must hold."""

import math

import pytest
import torch
from torch import Tensor

from rlhf_cli.objectives.advantages import group_advantages
from rlhf_cli.objectives.policy_gradient import (
    cispo_loss,
    clipped_policy_loss,
    clipped_value_loss,
    penalised_policy_loss,
    policy_gradient_loss,
    sequence_log_ratio,
    token_weights,
)

LENGTHS = torch.tensor([6, 1, 4, 3])
MASK = torch.arange(6) < LENGTHS[:, None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slope(loss: Tensor, of: Tensor) -> Tensor:
    """d loss / d of."""
    return torch.autograd.grad(loss, of, retain_graph=True)[0]


# --------------------------------------------------------------------------- clipped losses

TABLE = [  # advantage, ratio, clip_high, dual_clip -> d loss / d log-prob, at clip .2
    (2.0, 1.1, None, None, -2.0 * 1.1),
    (2.0, 1.3, None, None, 0.0),
    (2.0, 0.5, None, None, -2.0 * 0.5),
    (-2.0, 0.9, None, None, 2.0 * 0.9),
    (-2.0, 0.5, None, None, 0.0),
    (-2.0, 1.3, None, None, 2.0 * 1.3),
    # more room above, as much below
    (2.0, 1.25, 0.28, None, -2.0 * 1.25),
    (2.0, 1.3, 0.28, None, 0.0),
    (-2.0, 0.75, 0.28, None, 0.0),
    # the loss of a bad token stops at dual_clip times its advantage, that of a good one does not
    (-2.0, 2.9, None, 3.0, 2.0 * 2.9),
    (-2.0, 3.1, None, 3.0, 0.0),
    (2.0, 0.5, None, 3.0, -2.0 * 0.5),
    (2.0, 9.0, None, 3.0, 0.0),
]


@pytest.mark.parametrize(("advantage", "ratio", "clip_high", "dual_clip", "expected"), TABLE)
def test_the_clip_table(
    advantage: float,
    ratio: float,
    clip_high: float | None,
    dual_clip: float | None,
    expected: float,
) -> None:
    new = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_()
    gain = torch.tensor([[advantage]], dtype=torch.float64)
    loss = clipped_policy_loss(new, gain, 0.2, clip_high, dual_clip).sum()
    assert slope(loss, new).item() == pytest.approx(expected, abs=1e-12)


def test_worked_dual_clip_and_clip_higher() -> None:
    # A = -2: w = 5 would cost 10, but no more than 3 * 2; w = .5 costs .8 * 2; A = 2 is untouched
    log_ratio = torch.tensor([5.0, 0.5, 5.0]).log()
    losses = clipped_policy_loss(log_ratio, torch.tensor([-2.0, -2.0, 2.0]), 0.2, 0.28, 3.0)
    torch.testing.assert_close(losses, torch.tensor([6.0, 1.6, -2.56]))


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


# --------------------------------------------------------------------------- other losses


def test_the_gradient_of_the_policy_gradient() -> None:
    logprobs, gains = normal(4, 6).requires_grad_(), normal(4, 6, seed=1)
    loss = policy_gradient_loss(logprobs, gains)
    torch.testing.assert_close(slope(loss.sum(), logprobs), -gains)
    on_policy = clipped_policy_loss(logprobs - logprobs.detach(), gains, 0.2)
    torch.testing.assert_close(slope(on_policy.sum(), logprobs), -gains, rtol=0, atol=1e-10)


def test_cispo_keeps_a_gradient_where_ppo_has_none() -> None:
    # w = 3, 1.1, .1 and A = 2: weights 1.28, 1.1 and .8, or .1 without a bound below
    ratio, old = torch.tensor([3.0, 1.1, 0.1]).double(), torch.full((3,), -2.0).double()
    logprobs = (old + ratio.log()).requires_grad_()
    gains = torch.full((3,), 2.0).double()
    for clip, least in ((0.2, 0.8), (None, 0.1)):
        weights = torch.tensor([1.28, 1.1, least]).double()
        losses = cispo_loss(logprobs, old, gains, clip, 0.28)
        torch.testing.assert_close(losses.detach(), -weights * 2 * logprobs.detach())
        torch.testing.assert_close(slope(losses.sum(), logprobs), -weights * 2)
    ppo = clipped_policy_loss(logprobs - old, gains, 0.2, 0.28)
    assert slope(ppo.sum(), logprobs)[0].item() == 0


def test_a_worked_penalised_loss() -> None:
    # w = 2, A = 3: -6 + .5 (2 - 1 - ln 2); slope in log pi: -6 + .5 (2 - 1)
    logprobs = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    old = logprobs.detach() - math.log(2)
    loss = penalised_policy_loss(logprobs, old, torch.tensor([3.0]), 0.5)
    assert loss.item() == pytest.approx(-6 + 0.5 * (1 - math.log(2)), abs=1e-12)
    assert slope(loss.sum(), logprobs).item() == pytest.approx(-5.5, abs=1e-12)


def test_the_penalty_is_the_divergence_from_the_old_policy() -> None:
    """Value and gradient over all seven outcomes, at a policy that is not the old one."""
    logits, old = normal(7).requires_grad_(), normal(7, seed=1).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    found = (old.exp() * penalised_policy_loss(logprobs, old, torch.zeros(7), 1.0)).sum()
    exact = (old.exp() * (old - logprobs)).sum()
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(slope(found, logits), slope(exact, logits), rtol=0, atol=1e-12)


# --------------------------------------------------------------------------- sequence ratios


def test_a_worked_sequence_ratio() -> None:
    # log-ratios .4 and .2: exp(.3) at both tokens; the third does not count
    new, old = torch.tensor([[-1.0, -2.0, math.nan]]), torch.tensor([[-1.4, -2.2, 5.0]])
    found = sequence_log_ratio(new, old, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(found, torch.tensor([[0.3, 0.3, 0.0]]))


def test_a_sequence_ratio_starts_at_one() -> None:
    logprobs = normal(4, 6)
    assert (sequence_log_ratio(logprobs, logprobs, MASK).exp() == 1).all()


def test_for_single_tokens_gspo_is_grpo() -> None:
    new, old, gains = normal(8, 1).requires_grad_(), normal(8, 1, seed=1), normal(8, 1, seed=2)
    mask = torch.ones(8, 1, dtype=torch.bool)
    gspo = clipped_policy_loss(sequence_log_ratio(new, old, mask), gains, 0.2)
    grpo = clipped_policy_loss(new - old, gains, 0.2)
    torch.testing.assert_close(gspo, grpo, rtol=0, atol=1e-12)
    torch.testing.assert_close(slope(gspo.sum(), new), slope(grpo.sum(), new), rtol=0, atol=1e-12)


def test_the_token_form_has_the_gradient_of_the_sequence_ratio() -> None:
    new, gains = normal(4, 6).requires_grad_(), normal(4, 1, seed=2)
    old = new.detach() + 0.3 * normal(4, 6, seed=1)
    tokens = clipped_policy_loss(sequence_log_ratio(new, old, MASK), gains, 0.05)
    by_token = (tokens * token_weights(MASK.double(), "response_mean", 6)).sum() / 4
    mean = ((new - old) * MASK).sum(-1) / LENGTHS  # the gradient flows through it here
    by_sequence = clipped_policy_loss(mean, gains[:, 0], 0.05).mean()
    torch.testing.assert_close(by_token, by_sequence, rtol=0, atol=1e-12)
    ours = slope(by_token, new)
    torch.testing.assert_close(ours, slope(by_sequence, new), rtol=0, atol=1e-12)
    clipped = (ours == 0).all(-1)
    assert clipped.any() and not clipped.all()


# --------------------------------------------------------------------------- averages

DIVIDED_BY = {
    "response_mean": "responses",
    "response_sum": "responses",
    "max_tokens": "responses",
    "token_mean": "tokens",
}


def average(losses: Tensor, mask: Tensor, how: str, longest: int = 6) -> Tensor:
    """As a stage does it: the weighted sum over the count."""
    count = mask.sum() if DIVIDED_BY[how] == "tokens" else len(mask)
    return (losses * token_weights(mask.double(), how, longest)).sum() / count


def test_worked_weights() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    assert token_weights(mask, "response_mean", 8).tolist() == [[0.5, 0.5, 0], [1, 0, 0], [0, 0, 0]]
    assert token_weights(mask, "max_tokens", 8)[0].tolist() == [0.125, 0.125, 0]
    assert token_weights(mask, "response_sum", 8).tolist() == mask.float().tolist()
    assert token_weights(mask, "token_mean", 8).tolist() == mask.float().tolist()


def test_averages_agree_where_lengths_are_equal() -> None:
    losses, mask = normal(4, 6), torch.ones(4, 6, dtype=torch.bool)
    expected = losses.mean()
    for how in ("response_mean", "max_tokens", "token_mean"):
        torch.testing.assert_close(average(losses, mask, how), expected, rtol=0, atol=1e-10)
    summed = average(losses, mask, "response_sum")
    torch.testing.assert_close(summed, 6 * expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("how", DIVIDED_BY)
def test_only_a_mean_over_tokens_sees_how_long_the_others_are(how: str) -> None:
    """Dr. GRPO: what a response weighs depends neither on its length nor on that of the others."""
    longer = MASK.clone()
    longer[1] = True
    losses = normal(4, 6).requires_grad_()
    here, there = (slope(average(losses, mask, how), losses)[0] for mask in (MASK, longer))
    assert torch.equal(here, there) == (how != "token_mean")
    own = slope(average(losses, MASK, how, 9), losses)
    assert (own[0, 0] == own[2, 0]).item() == (how != "response_mean")


@pytest.mark.parametrize("how", DIVIDED_BY)
def test_the_same_groups_twice_change_nothing(how: str) -> None:
    rewards, table = normal(2, 2, seed=4), normal(4, 6).requires_grad_()
    old = table.detach() + 0.2 * normal(4, 6, seed=1)
    found = []
    for times in (1, 2):
        gains = group_advantages(rewards.repeat(times, 1)).flatten()[:, None]
        losses = clipped_policy_loss((table - old).repeat(times, 1), gains, 0.2)
        loss = average(losses, MASK.repeat(times, 1), how)
        found.append((loss, slope(loss, table)))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-9)


def test_on_policy_the_grpo_loss_is_zero_and_its_gradient_is_not() -> None:
    """1/G sum_i 1/len_i sum_t: the mean over all tokens would not be zero."""
    gains = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]).double()).flatten()
    logprobs = normal(4, 6).requires_grad_()
    losses = clipped_policy_loss(logprobs - logprobs.detach(), gains[:, None], 0.2)
    loss = average(losses, MASK, "response_mean")
    loss.backward()
    assert abs(loss.item()) < 1e-7
    expected = -gains[:, None] / (4 * LENGTHS[:, None]) * MASK
    torch.testing.assert_close(logprobs.grad, expected.double())
    assert abs(average(losses, MASK, "token_mean").item()) > 0.1


@pytest.mark.parametrize("log_ratio", [100.0, 800.0, -800.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_out_of_all_bounds_keeps_a_finite_gradient(
    log_ratio: float, advantage: float
) -> None:
    given = torch.tensor([log_ratio], requires_grad=True)
    loss = clipped_policy_loss(given, torch.tensor([advantage]), 0.2)
    loss.sum().backward()
    assert loss.isfinite().all() and given.grad is not None and given.grad.isfinite().all()
