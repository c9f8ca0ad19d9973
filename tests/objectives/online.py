"""Online reinforcement learning on a `Space`: rollouts, advantages, losses, steps.

The rollouts are all groups of responses with their probabilities, so that a step follows the exact
expectation, or they are samples. Either way rewards, advantages and losses are those of
objectives/; this file only takes averages and steps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_cli.objectives.advantages import at_last, gae, kl_shaped_rewards
from rlhf_cli.objectives.policy_gradient import (
    clipped_policy_loss,
    clipped_value_loss,
    token_weights,
)
from tests.objectives.spaces import Space, Tables


@dataclass
class Rollouts:
    """P groups of G responses: M = P G rows."""

    rows: Tensor  # (M,) which of the space's responses
    group: int
    weights: Tensor  # (M,) probability or share, sums to 1
    mask: Tensor  # (M, T)
    rewards: Tensor  # (M, T) with the tie to the reference, if it belongs there
    values: Tensor  # (M, T) of the critic
    old: Tensor  # (M, T) log-probs of the policy that sampled
    reference: Tensor  # (M, T) its log-probs
    reference_logits: Tensor  # (M, T, V)
    beta: float

    @property
    def totals(self) -> Tensor:
        """(M,) reward of each response."""
        return self.rewards.sum(-1)


@dataclass
class Now:
    """The policy that is being updated, with gradient, at the rows of the rollouts."""

    logprobs: Tensor  # (M, T)
    logits: Tensor  # (M, T, V)


@dataclass(frozen=True)
class Method:
    """What an algorithm makes of rollouts."""

    advantages: Callable[[Rollouts], Tensor]  # (M, T) or (M, 1)
    loss: Callable[[Now, Rollouts, Tensor], Tensor]  # (M, T)
    kl_in_reward: bool = True
    group: int = 1
    inner: int = 1  # updates for each set of rollouts
    how: str = "response_sum"  # weights of tokens
    after: Callable[[Now, Rollouts], None] = lambda now, rollouts: None  # the updates


PPO = Method(
    lambda rollouts: gae(rollouts.rewards, rollouts.values, rollouts.mask, 1.0, 0.95)[0],
    lambda now, rollouts, gains: clipped_policy_loss(now.logprobs - rollouts.old, gains, 0.2),
    inner=2,
)


def collect(
    space: Space, policy: Tables, method: Method, picks: Tensor, weights: Tensor, values: Tensor
) -> Rollouts:
    """Rollouts of `policy`: picks (P, G) of the responses, weights (P,), values (N, T)."""
    rows, group = picks.flatten(), picks.shape[1]
    old, reference = space.logprobs(policy).detach(), space.logprobs(space.reference)
    rewards = at_last(space.reward, space.mask)
    beta = space.beta if method.kl_in_reward else 0.0
    return Rollouts(
        rows,
        group,
        weights.repeat_interleave(group) / group,
        space.mask[rows],
        kl_shaped_rewards(rewards, old, reference, space.mask, beta)[rows],
        values[rows],
        old[rows],
        reference[rows],
        space.logits(space.reference)[rows],
        space.beta,
    )


def rescore(space: Space, policy: Tables, rollouts: Rollouts) -> Now:
    """What `policy` gives the responses of rollouts that an older one may have sampled."""
    return Now(space.logprobs(policy)[rollouts.rows], space.logits(policy)[rollouts.rows])


def average(losses: Tensor, rollouts: Rollouts, how: str) -> Tensor:
    """The scalar that is differentiated, from (M, T) losses."""
    tokens = token_weights(rollouts.mask, how, rollouts.mask.shape[1])
    count = (rollouts.weights * rollouts.mask.sum(-1)).sum() if how == "token_mean" else 1.0
    return (rollouts.weights[:, None] * tokens * losses).sum() / count


def expected(space: Space, policy: Tables, method: Method) -> Rollouts:
    """All groups of responses, each with its probability, and the values of a perfect critic."""
    count = len(space.responses)
    own = space.probabilities(policy)
    nothing = torch.zeros(space.mask.shape, dtype=torch.float64)
    once = collect(space, policy, method, torch.arange(count)[:, None], own, nothing)
    to_go = once.rewards.flip(-1).cumsum(-1).flip(-1)
    values = []
    for t in range(space.mask.shape[1]):
        prefix = space.responses[:, :t]
        alike = (prefix[:, None] == prefix).all(-1) * own  # (N, N)
        values.append(alike @ to_go[:, t] / alike.sum(-1))
    picks = torch.cartesian_prod(*[torch.arange(count)] * method.group).view(-1, method.group)
    return collect(space, policy, method, picks, own[picks].prod(-1), torch.stack(values, -1))


def gradient(space: Space, policy: Tables, method: Method) -> tuple[Tensor, ...]:
    """The expected gradient of a method's loss on samples of `policy` itself."""
    rollouts = expected(space, policy, method)
    losses = method.loss(rescore(space, policy, rollouts), rollouts, method.advantages(rollouts))
    return torch.autograd.grad(average(losses, rollouts, method.how), policy)


def settle(
    space: Space,
    method: Method,
    steps: int = 200,
    also: Callable[[Tables], Tensor] = lambda policy: torch.zeros(()),
) -> Tables:
    """Follow the expected gradient of a method, and of another loss, from the reference on.

    Each entry's gradient is divided by the probability of coming there: the natural gradient of
    tables, zero where the gradient is, which does not crawl where the policy seldom goes. The rate
    falls to zero, so that advantages come to rest that do not shrink on the way.
    """
    policy = space.start()
    for step in range(steps):
        rollouts = expected(space, policy, method)
        advantages = method.advantages(rollouts)
        for _ in range(method.inner):
            losses = method.loss(rescore(space, policy, rollouts), rollouts, advantages)
            loss = average(losses, rollouts, method.how) + also(policy)
            gradients = torch.autograd.grad(loss, policy)
            with torch.no_grad():
                visited = torch.ones((), dtype=torch.float64)
                for table, slope in zip(policy, gradients, strict=True):
                    visited = visited[..., None] * torch.softmax(table, -1)
                    table -= 0.7 * (1 - step / steps) * slope / visited
        method.after(rescore(space, policy, rollouts), rollouts)
    return policy


def learn(
    space: Space, method: Method, seed: int, iterations: int = 400, samples: int = 512
) -> Tables:
    """Samples, a critic that learns along, and Adam at 2e-2, falling to zero."""
    generator = torch.Generator().manual_seed(seed)
    policy = space.start()
    critic = [torch.zeros(table.shape[1:]).double().requires_grad_() for table in space.reference]
    adam = torch.optim.Adam([*policy, *critic], 2e-2)
    decay = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, iterations)
    weights = torch.full((samples // method.group,), method.group / samples, dtype=torch.float64)

    def values() -> Tensor:  # (N, T)
        prefixes = [tuple(space.responses[:, :t].T) for t in range(len(critic))]
        own = [table[p].expand(len(space.mask)) for table, p in zip(critic, prefixes, strict=True)]
        return torch.stack(own, -1)

    for _ in range(iterations):
        drawn = torch.multinomial(space.probabilities(policy), samples, True, generator=generator)
        picks = drawn.view(-1, method.group)
        rollouts = collect(space, policy, method, picks, weights, values().detach())
        advantages = method.advantages(rollouts)
        returns = gae(rollouts.rewards, rollouts.values, rollouts.mask, 1.0, 0.95)[1]
        for _ in range(method.inner):
            losses = method.loss(rescore(space, policy, rollouts), rollouts, advantages)
            losses = losses + clipped_value_loss(
                values()[rollouts.rows], rollouts.values, returns, 0.2
            )
            adam.zero_grad()
            average(losses, rollouts, method.how).backward()
            adam.step()
        decay.step()
        method.after(rescore(space, policy, rollouts), rollouts)
    return policy
