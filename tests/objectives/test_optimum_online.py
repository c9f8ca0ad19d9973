"""Where online methods come to rest: at pi* = pi_ref exp(r / beta) / Z, or where theory says.

Every method is followed in exact expectation, without noise, and the main ones on samples, too.
With y a response, s a context, u = log(pi / pi_ref) and G the size of a group:

| KL                   | advantages               | rests at                                      |
|----------------------|--------------------------|-----------------------------------------------|
| k1, reward           | critic, mean, RLOO, none | pi*                                           |
| k1, reward           | centred, or over std     | pi*, where all shaped rewards are equal       |
| k2, w k3, full, loss | critic, mean, RLOO       | pi* of one token; of more, each context's own |
|                      |                          | pi(a|s) ~ pi_ref exp(Q(s, a) / beta), where Q |
|                      |                          | leaves out the KL of later tokens             |
| same, loss           | centred                  | the same with beta G / (G - 1)                |
| same, loss           | over std                 | the same with the expected advantages that pi |
|                      |                          | itself has, in place of r                     |
| k3, loss             | critic, mean, RLOO       | pi(a|s) = beta pi_ref / (lambda - Q(s, a))    |
| k1, loss             | any                      | the best response: it ties to nothing         |
| k2, k3, reward       | any                      | no mixture: what is rarer than under pi_ref   |
|                      |                          | is pushed away further                        |
| full, reward + loss  | critic, mean, RLOO       | pi*: the two halves of one gradient           |
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rlhf_cli.objectives.advantages import (
    gae,
    group_advantages,
    group_centred,
    leave_one_out,
    returns_to_go,
)
from rlhf_cli.objectives.kl import full_kl, k1, k2, k3, schulman_kl_coef, weighted_k3
from rlhf_cli.objectives.likelihood import masked_mean, masked_whiten, nll_sum
from rlhf_cli.objectives.policy_gradient import (
    cispo_loss,
    clipped_policy_loss,
    clipped_value_loss,
    penalised_policy_loss,
    policy_gradient_loss,
    sequence_log_ratio,
)
from tests.objectives.online import (
    PPO,
    Method,
    Now,
    Rollouts,
    average,
    collect,
    expected,
    gradient,
    learn,
    rescore,
    settle,
)
from tests.objectives.spaces import ENDING, ONE, TWO, Space, Tables, drawn
from tests.pace import fast

SPACES = {"one": ONE, "two": TWO, "ending": ENDING}
SEEDS = fast([0], [0, 1])
Advantages = Callable[[Rollouts], Tensor]
Losses = Callable[[Now, Rollouts, Tensor], Tensor]
Tie = Callable[[Now, Rollouts], Tensor]

# --------------------------------------------------------------------------- advantages


def alone(rollouts: Rollouts) -> Tensor:
    return rollouts.totals[:, None]


def mean_baseline(rollouts: Rollouts) -> Tensor:
    return (rollouts.totals - (rollouts.weights * rollouts.totals).sum())[:, None]


def to_go(rollouts: Rollouts) -> Tensor:
    return returns_to_go(rollouts.rewards, rollouts.mask, 1.0)


def critic(rollouts: Rollouts) -> Tensor:
    return gae(rollouts.rewards, rollouts.values, rollouts.mask, 1.0, 0.95)[0]


def groups(of: Callable[[Tensor], Tensor]) -> Advantages:
    return lambda rollouts: of(rollouts.totals.view(-1, rollouts.group)).reshape(-1, 1)


def whitened(of: Advantages) -> Advantages:
    return lambda rollouts: masked_whiten(of(rollouts), rollouts.mask)


# --------------------------------------------------------------------------- losses


def plain(now: Now, rollouts: Rollouts, gains: Tensor) -> Tensor:
    return policy_gradient_loss(now.logprobs, gains)


def clipped(now: Now, rollouts: Rollouts, gains: Tensor) -> Tensor:
    return clipped_policy_loss(now.logprobs - rollouts.old, gains, 0.2)


def wider(now: Now, rollouts: Rollouts, gains: Tensor) -> Tensor:
    return clipped_policy_loss(now.logprobs - rollouts.old, gains, 0.2, 0.28, 3.0)


def of_sequence(now: Now, rollouts: Rollouts, gains: Tensor) -> Tensor:
    log_ratio = sequence_log_ratio(now.logprobs, rollouts.old, rollouts.mask)
    return clipped_policy_loss(log_ratio, gains, 0.2)


def cispo(now: Now, rollouts: Rollouts, gains: Tensor) -> Tensor:
    return cispo_loss(now.logprobs, rollouts.old, gains, None, 0.2)


class Penalised:
    """The penalty to the policy that sampled, with its coefficient under the 1.5 / 2 rule."""

    def __init__(self, target: float) -> None:
        self.target, self.trace = target, [1.0]

    def loss(self, now: Now, rollouts: Rollouts, gains: Tensor) -> Tensor:
        return penalised_policy_loss(now.logprobs, rollouts.old, gains, self.trace[-1])

    def after(self, now: Now, rollouts: Rollouts) -> None:
        kl = masked_mean(k3(rollouts.old, now.logprobs.detach()), rollouts.mask).item()
        self.trace.append(schulman_kl_coef(self.trace[-1], kl, self.target))


def tied_by_k1(now: Now, rollouts: Rollouts) -> Tensor:
    return k1(now.logprobs, rollouts.reference)


def tied_by_k2(now: Now, rollouts: Rollouts) -> Tensor:
    return k2(now.logprobs, rollouts.reference)


def tied_by_k3(now: Now, rollouts: Rollouts) -> Tensor:
    return k3(now.logprobs, rollouts.reference)


def tied_by_weighted_k3(now: Now, rollouts: Rollouts) -> Tensor:
    return weighted_k3(now.logprobs, rollouts.old, rollouts.reference)


def tied_by_full(now: Now, rollouts: Rollouts) -> Tensor:
    ours, theirs = now.logits.flatten(0, 1), rollouts.reference_logits.flatten(0, 1)
    return full_kl(ours, theirs).view_as(now.logprobs)


def tied(loss: Losses, tie: Tie) -> Losses:
    """The tie to the reference in the loss."""
    return lambda now, rollouts, gains: (
        loss(now, rollouts, gains) + rollouts.beta * tie(now, rollouts)
    )


SOUND = {"k2": tied_by_k2, "weighted k3": tied_by_weighted_k3, "full": tied_by_full}

# --------------------------------------------------------------------------- KL in the reward

IN_REWARD = {
    "reinforce": Method(alone, plain),
    "reinforce to go": Method(to_go, plain),
    "reinforce with a baseline": Method(mean_baseline, plain),
    "a2c": Method(critic, plain),
    "ppo": Method(critic, clipped, inner=4),
    "ppo over tokens": Method(critic, clipped, inner=4, how="token_mean"),
    "wide and dual clip": Method(critic, wider, inner=4),
    "klpen": Method(critic, Penalised(0.01).loss, inner=4),
    "rloo": Method(groups(leave_one_out), plain, group=2),
    "rloo over lengths": Method(groups(leave_one_out), plain, group=2, how="response_mean"),
    "grpo without std": Method(groups(group_centred), clipped, group=2, inner=4),
    "gspo": Method(mean_baseline, of_sequence, inner=4, how="response_mean"),
    "cispo": Method(mean_baseline, cispo, inner=4),
}


@pytest.mark.parametrize("name", IN_REWARD)
@pytest.mark.slow
def test_with_the_tie_in_the_reward_expected_steps_lead_to_the_optimum(name: str) -> None:
    """grad E[r - beta u] is the true gradient; centring in a group scales it by (G - 1) / G.

    Weights 1 / len do not move the optimum where a baseline centres the advantages A: at rest
    A(y) / len(y) is the same for all y, and as A has mean zero, it is zero.
    """
    for space in SPACES.values():
        assert space.distance(space.reference) > 0.3
        assert space.distance(settle(space, IN_REWARD[name])) < 1e-6


@pytest.mark.parametrize("group", [2, 3])
def test_the_std_of_a_group_does_not_move_the_optimum_of_a_tie_in_the_reward(group: int) -> None:
    """Of two shaped rewards the higher has the higher E[A | y], so rest needs equal ones.

    Near rest the std vanishes, too, and the advantages do not shrink: it is the falling rate that
    ends the walk, hence the looser bound.
    """
    method = Method(groups(group_advantages), clipped, group=group)
    for space in (ONE, TWO):
        assert space.distance(settle(space, method, steps=400)) < 1e-4


def test_without_a_baseline_a_mean_over_tokens_tilts_towards_a_length() -> None:
    """At rest (r - beta u) / len is one constant c: pi ~ pi_ref exp((r - c len) / beta).

    The total of the probabilities fixes c.
    """
    found = settle(ENDING, Method(alone, plain, how="response_mean"))
    lengths = ENDING.mask.sum(-1).double()
    reference = ENDING.logprobs(ENDING.reference).sum(-1)
    low, high = torch.tensor([-10.0, 10.0]).double()
    for _ in range(100):
        c = (low + high) / 2
        theory = (reference + (ENDING.reward - c * lengths) / ENDING.beta).exp()
        low, high = (c, high) if theory.sum() > 1 else (low, c)
    assert ENDING.distance(found, theory) < 1e-6
    assert ENDING.distance(found) > 0.1


SAMPLED = {
    "whitened ppo": replace(PPO, advantages=whitened(critic)),
    "a2c": Method(critic, plain),
    "reinforce": Method(alone, plain),
    "reinforce with a baseline": Method(mean_baseline, plain),
    "reinforce++": Method(whitened(to_go), clipped, inner=2, how="token_mean"),
    "rloo": Method(groups(leave_one_out), plain, group=4),
    "grpo without std": Method(groups(group_centred), clipped, group=4, inner=2),
    "grpo": Method(groups(group_advantages), clipped, group=4, inner=2),
}


FEW = ("whitened ppo", "rloo")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", fast(FEW, SAMPLED))
def test_with_the_tie_in_the_reward_samples_lead_to_the_optimum(name: str, seed: int) -> None:
    assert TWO.distance(learn(TWO, SAMPLED[name], seed)) < 0.02


@pytest.mark.parametrize("seed", SEEDS)
def test_the_penalty_of_ppo_leads_to_the_optimum_under_its_rule(seed: int) -> None:
    """The tie to the old policy limits steps; where it rests is not its affair."""
    penalty = Penalised(target=1e-5)
    method = Method(critic, penalty.loss, inner=4, after=penalty.after)
    assert TWO.distance(learn(TWO, method, seed)) < 0.02
    assert max(penalty.trace) > 10  # it was at work
    assert min(penalty.trace) < 1e-3


# --------------------------------------------------------------------------- KL in the loss

Choice = Callable[[Tensor, Tensor], Tensor]
"""What a context does with the reference's probabilities and its Q, both (..., V)."""


def reverse(beta: float) -> Choice:
    """The best E[Q] - beta KL(pi || ref): pi ~ ref exp(Q / beta)."""
    return lambda reference, q: torch.softmax(reference.log() + q / beta, -1)


def forward(beta: float) -> Choice:
    """The best E[Q] - beta KL(ref || pi): pi = beta ref / (lambda - Q), of total 1.

    From pi (Q - E[Q]) = beta (pi - ref), with lambda = E[Q] + beta, between max Q and max Q + beta.
    """

    def choose(reference: Tensor, q: Tensor) -> Tensor:
        low = q.amax(-1, keepdim=True)
        high = low + beta
        for _ in range(100):
            middle = (low + high) / 2
            total = (beta * reference / (middle - q)).sum(-1, keepdim=True)
            low, high = torch.where(total > 1, middle, low), torch.where(total > 1, high, middle)
        return beta * reference / (high - q)

    return choose


def context_by_context(space: Space, gains: Tensor, choose: Choice) -> Tensor:
    """(N,) where each context chooses for itself, knowing what later ones choose.

    Q(s, a) is the mean gain of the responses that go on with a. A tie that stands in the loss of
    each token has no part in it, so nobody is asked to spare later tokens their KL.
    """
    lengths, tables, later = space.mask.sum(-1), list[Tensor](), None
    for t in reversed(range(len(space.reference))):
        reference = torch.softmax(space.reference[t], -1)
        q = torch.zeros_like(reference) if later is None else later.clone()
        ends = lengths == t + 1
        q[tuple(space.responses[ends, : t + 1].T)] = gains[ends]
        policy = choose(reference, q)
        tables.insert(0, policy.log())
        later = (policy * q).sum(-1)
    return space.probabilities(tuple(tables))


def normalised(space: Space, policy: Tensor, size: int) -> Tensor:
    """(N,) expected (r - mean) / (std + 1e-4) of a response, the others drawn from `policy`."""
    others = torch.cartesian_prod(*[torch.arange(len(policy))] * (size - 1)).view(-1, size - 1)
    own = space.reward[:, None].expand(-1, len(others))  # (N, O)
    group = torch.cat([own[..., None], space.reward[others].expand(len(own), -1, -1)], -1)
    return (own - group.mean(-1)) / (group.std(-1) + 1e-4) @ policy[others].prod(-1)


def consistent(space: Space, size: int, choose: Choice) -> Tensor:
    """(N,) the policy that answers to the normalised advantages which it has itself."""
    policy = space.probabilities(space.reference)
    for _ in range(200):
        answer = context_by_context(space, normalised(space, policy, size), choose)
        policy = 0.7 * policy + 0.3 * answer
    torch.testing.assert_close(answer, policy)
    return policy


@pytest.mark.parametrize("tie", SOUND)
@pytest.mark.parametrize("advantages", [critic, groups(leave_one_out)], ids=["critic", "rloo"])
def test_a_sound_tie_in_the_loss_is_each_contexts_own(advantages: Advantages, tie: str) -> None:
    """One token: pi*. More: Q from rewards only, pi(a|s) ~ ref exp(Q(s, a) / beta)."""
    size = 1 if advantages is critic else 2
    method = Method(advantages, tied(plain, SOUND[tie]), kl_in_reward=False, group=size)
    assert ONE.distance(settle(ONE, method)) < 1e-6
    for space, apart in ((TWO, 0.04), (ENDING, 0.4)):
        found = settle(space, method)
        theory = context_by_context(space, space.reward, reverse(space.beta))
        assert space.distance(found, theory) < 1e-6
        assert space.distance(found) > apart


def test_plain_k3_in_the_loss_ties_by_the_forward_divergence() -> None:
    """On samples of pi its gradient is that of KL(ref || pi): pi = beta ref / (lambda - Q)."""
    method = Method(critic, tied(plain, tied_by_k3), kl_in_reward=False)
    for space in SPACES.values():
        found = settle(space, method)
        theory = context_by_context(space, space.reward, forward(space.beta))
        assert space.distance(found, theory) < 1e-6
        assert space.distance(found) > 0.05


def test_k1_in_the_loss_ties_to_nothing() -> None:
    """Its expected gradient is zero, so the best response takes all, as with beta = 0."""
    method = Method(critic, tied(plain, tied_by_k1), kl_in_reward=False)
    for space in SPACES.values():
        best = nn.functional.one_hot(space.reward.argmax(), len(space.reward))
        assert space.distance(settle(space, method), best) < 1e-3
        assert space.distance(space.reference, best) > 0.4


@pytest.mark.parametrize("size", [2, 3])
def test_centred_groups_feel_a_stronger_tie_in_the_loss(size: int) -> None:
    """The gradient of the reward is (G - 1) / G of the true one: beta becomes beta G / (G - 1)."""
    loss = tied(clipped, tied_by_weighted_k3)
    method = Method(groups(group_centred), loss, kl_in_reward=False, group=size)
    for space in SPACES.values():
        found = settle(space, method)
        choose = reverse(space.beta * size / (size - 1))
        assert space.distance(found, context_by_context(space, space.reward, choose)) < 1e-6
        assert space.distance(found) > 0.1


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.slow
def test_grpo_rests_where_its_own_normalised_advantages_hold_it(size: int) -> None:
    """pi ~ ref exp(A(y; pi) / beta), A the expected (r - mean) / std over groups drawn from pi.

    A group of two knows only which is better: A = (P(worse) - P(better)) / sqrt(2), and any rewards
    in the same order give the same policy. The scale of rewards plays no part, so beta has another
    meaning. With plain k3, as GRPO was published, it is the forward tie that holds.
    """
    for tie, choice in ((tied_by_weighted_k3, reverse), (tied_by_k3, forward)):
        loss = tied(clipped, tie)
        method = Method(groups(group_advantages), loss, kl_in_reward=False, group=size)
        for space in (ONE, TWO):
            found = settle(space, method)
            theory = consistent(space, size, choice(space.beta))
            assert space.distance(found, theory) < 1e-6
            assert space.distance(found) > 0.09
    if size == 2:
        ranks = ONE.reward.argsort().argsort().double()
        alike = settle(replace(ONE, reward=ranks), method)
        assert ONE.distance(alike, ONE.probabilities(settle(ONE, method))) < 1e-3  # eps = 1e-4


IN_LOSS = {
    "a2c": (
        Method(critic, tied(plain, tied_by_weighted_k3), kl_in_reward=False),
        reverse(ENDING.beta),
    ),
    "a2c, full": (
        Method(critic, tied(plain, tied_by_full), kl_in_reward=False),
        reverse(ENDING.beta),
    ),
    "k3": (Method(critic, tied(plain, tied_by_k3), kl_in_reward=False), forward(ENDING.beta)),
    "grpo without std": (
        Method(
            groups(group_centred),
            tied(clipped, tied_by_weighted_k3),
            kl_in_reward=False,
            group=4,
            inner=2,
        ),
        reverse(ENDING.beta * 4 / 3),
    ),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", IN_LOSS)
def test_with_the_tie_in_the_loss_samples_lead_where_theory_says(name: str, seed: int) -> None:
    """Rewards do not become equal, so noise stays until the rate has fallen."""
    method, choose = IN_LOSS[name]
    theory = context_by_context(ENDING, ENDING.reward, choose)
    found = learn(ENDING, method, seed)
    assert ENDING.distance(found, theory) < 0.04
    assert ENDING.distance(found) > 0.15


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.slow
def test_sampled_grpo_leads_where_its_own_advantages_hold_it(seed: int) -> None:
    loss = tied(clipped, tied_by_weighted_k3)
    method = Method(groups(group_advantages), loss, kl_in_reward=False, group=4, inner=2)
    for space in (ONE, TWO):
        theory = consistent(space, 4, reverse(space.beta))
        found = learn(space, method, seed)
        assert space.distance(found, theory) < 0.02
        assert space.distance(found) > 0.15


# --------------------------------------------------------------------------- gradients


def somewhere(space: Space) -> Tables:
    """A policy that is neither the reference nor the optimum."""
    tables = (drawn(*table.shape, seed=5 + t) for t, table in enumerate(space.reference))
    return tuple(table.requires_grad_() for table in tables)


def close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_leaving_one_out_is_unbiased_and_centring_is_not(space: Space, size: int) -> None:
    """Over all groups: RLOO has the true gradient, the group's mean (G - 1) / G of it.

    What the std does to the gradient is no scale: it points elsewhere.
    """
    policy = somewhere(space)
    exact = torch.autograd.grad(-space.objective(policy), policy)
    close(gradient(space, policy, Method(groups(leave_one_out), plain, group=size)), exact)
    centred = gradient(space, policy, Method(groups(group_centred), clipped, group=size))
    close(centred, tuple((size - 1) / size * slope for slope in exact))
    scaled = gradient(space, policy, Method(groups(group_advantages), clipped, group=size))
    ours, true = (torch.cat([slope.flatten() for slope in all]) for all in (scaled, exact))
    assert 0.5 < torch.cosine_similarity(ours, true, 0).item() < 0.999


def test_leaving_one_out_is_a_scaled_mean() -> None:
    rewards = drawn(5, 4, seed=0)
    mean = rewards.mean(-1, keepdim=True)
    torch.testing.assert_close(leave_one_out(rewards), 4 / 3 * (rewards - mean), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, method in IN_REWARD.items() if method.group == 1])
def test_the_first_step_is_along_the_true_gradient(name: str) -> None:
    """On policy every ratio is 1, so clip and penalty say nothing. Any baseline does."""
    method = replace(IN_REWARD[name], how="response_sum")
    if method.advantages is critic:  # lambda < 1 is unbiased with a perfect critic only

        def any_critic(rollouts: Rollouts) -> Tensor:
            values = drawn(len(rollouts.values), seed=7)[:, None] * 0 + 0.3
            return gae(rollouts.rewards, values.expand_as(rollouts.mask), rollouts.mask, 1.0, 1.0)[
                0
            ]

        method = replace(method, advantages=any_critic)
    for space in SPACES.values():
        policy = somewhere(space)
        exact = torch.autograd.grad(-space.objective(policy), policy)
        close(gradient(space, policy, method), exact)


def test_units_of_reward_and_tie_play_no_part() -> None:
    for scale in (1e-2, 7.0):
        scaled = replace(TWO, reward=scale * TWO.reward, beta=scale * TWO.beta)
        policy = somewhere(TWO)
        ours, theirs = gradient(TWO, policy, PPO), gradient(scaled, policy, PPO)
        close(tuple(slope / scale for slope in theirs), ours, 1e-10)


def gradient_of_tie(space: Space, policy: Tables, advantages: Advantages) -> tuple[Tensor, ...]:
    """Of a quantity that is paid for as a negative reward, without any other."""
    silent = replace(space, reward=torch.zeros_like(space.reward), beta=0.0)
    return gradient(silent, policy, Method(lambda rollouts: -advantages(rollouts), plain))


def paid(space: Space, policy: Tables, tie: Tie) -> Advantages:
    """The tie of each token and of all later ones."""

    def advantages(rollouts: Rollouts) -> Tensor:
        now = Now(rollouts.old, space.logits(policy).detach()[rollouts.rows])
        return returns_to_go(tie(now, rollouts), rollouts.mask, 1.0)

    return advantages


def slope_of(tie: Tie, space: Space, policy: Tables, rollouts: Rollouts) -> tuple[Tensor, ...]:
    """The expected gradient of a tie in the loss."""
    losses = tie(rescore(space, policy, rollouts), rollouts)
    return torch.autograd.grad(average(losses, rollouts, "response_sum"), policy)


def divergences(space: Space, policy: Tables) -> tuple[Tensor, Tensor]:
    """KL(pi || ref) and KL(ref || pi) of responses, with gradient."""
    ours, theirs = space.logprobs(policy).sum(-1), space.logprobs(space.reference).sum(-1)
    return (ours.exp() * (ours - theirs)).sum(), (theirs.exp() * (theirs - ours)).sum()


def test_only_k1_may_stand_in_the_reward() -> None:
    """E[f(u) grad log pi] by enumeration, for a detached estimate f of the KL.

    k1: grad KL(pi || ref), on any space.
    k2: E[u^2 / 2 grad log pi], which is grad (E[u^2 / 2] - KL(pi || ref)).
    k3: grad KL(pi || ref) - grad KL(ref || pi), as E[(ref / pi - 1) grad log pi] is the latter's.
    full: nothing on one token, where it is the same for all responses.
    All but the first vanish to first order near the reference, where nothing is tied, and push a
    response away that has become rare: f grows for negative u, and a high price lowers pi further.
    """
    policy = somewhere(ONE)
    both = divergences(ONE, policy)
    kl = torch.autograd.grad(both[0], policy, retain_graph=True)
    other = torch.autograd.grad(both[1], policy)
    ours = ONE.logprobs(policy).sum(-1)
    u = ours - ONE.logprobs(ONE.reference).sum(-1)
    square = torch.autograd.grad((ours.exp() * u**2 / 2).sum(), policy)

    found = {
        tie: gradient_of_tie(ONE, policy, paid(ONE, policy, tie))
        for tie in (tied_by_k1, tied_by_k2, tied_by_k3, tied_by_weighted_k3, tied_by_full)
    }
    difference = tuple(a - b for a, b in zip(kl, other, strict=True))
    close(found[tied_by_k1], kl)
    close(found[tied_by_k2], tuple(a - b for a, b in zip(square, kl, strict=True)))
    close(found[tied_by_k3], difference)
    close(found[tied_by_weighted_k3], difference)
    close(found[tied_by_full], (torch.zeros(7).double(),))
    assert all((slopes[0] - kl[0]).abs().max() > 0.01 for slopes in list(found.values())[1:])

    for space in (TWO, ENDING):
        policy = somewhere(space)
        exact = torch.autograd.grad(divergences(space, policy)[0], policy)
        close(gradient_of_tie(space, policy, paid(space, policy, tied_by_k1)), exact)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_the_full_divergence_belongs_in_the_reward_and_in_the_loss(space: Space) -> None:
    """grad E[sum_t KL_t] = E[sum_t grad KL_t] + E[sum_t (KL_t+1 + ...) grad l_t]."""
    policy = somewhere(space)
    exact = torch.autograd.grad(divergences(space, policy)[0], policy)
    in_reward = gradient_of_tie(space, policy, paid(space, policy, tied_by_full))
    rollouts = expected(space, policy, PPO)
    in_loss = slope_of(tied_by_full, space, policy, rollouts)
    close(tuple(a + b for a, b in zip(in_reward, in_loss, strict=True)), exact)
    if space is not ONE:
        assert (in_loss[0] - exact[0]).abs().max() > 0.01
        close(in_loss[1:], exact[1:])  # the last token has nothing after it


@pytest.mark.parametrize("estimator", [tied_by_k2, tied_by_k3])
def test_k2_and_k3_in_the_reward_drive_rare_responses_out(estimator: Tie) -> None:
    def advantages(rollouts: Rollouts) -> Tensor:
        price = estimator(Now(rollouts.old, rollouts.reference_logits), rollouts)
        return rollouts.totals[:, None] - rollouts.beta * price

    found = ONE.probabilities(learn(ONE, Method(advantages, plain, kl_in_reward=False), 0))
    below = ONE.optimum < ONE.probabilities(ONE.reference)
    assert (found[below].sum() < 0.1 * ONE.optimum[below].sum()).item()


def test_on_old_samples_only_the_weighted_k3_keeps_its_direction() -> None:
    """Its gradient is that of KL(pi || ref) in the contexts that the old policy visited."""
    for space in SPACES.values():
        old = tuple(drawn(*table.shape, seed=40 + t) for t, table in enumerate(space.reference))
        policy, rollouts = somewhere(space), expected(space, old, PPO)
        exact = slope_of(tied_by_full, space, policy, rollouts)
        close(slope_of(tied_by_weighted_k3, space, policy, rollouts), exact)
        for tie in (tied_by_k1, tied_by_k2, tied_by_k3):
            assert (slope_of(tie, space, policy, rollouts)[0] - exact[0]).abs().max() > 0.01


# --------------------------------------------------------------------------- A2C, ptx, trade-off


def stepped(method: Method, clip: float | None) -> list[Tensor]:
    """Policy and critic after the updates of one batch of 64 samples."""
    policy, values = somewhere(ENDING), drawn(7, 2, seed=9).requires_grad_()
    adam = torch.optim.Adam([*policy, values], 1e-2)
    picks = torch.randint(7, (64, 1), generator=torch.Generator().manual_seed(0))
    weights = torch.full((64,), 1 / 64, dtype=torch.float64)
    batch = collect(ENDING, policy, method, picks, weights, values.detach())
    gains, returns = gae(batch.rewards, batch.values, batch.mask, 1.0, 0.95)
    for _ in range(method.inner):
        losses = method.loss(rescore(ENDING, policy, batch), batch, gains)
        losses = losses + clipped_value_loss(values[batch.rows], batch.values, returns, clip)
        adam.zero_grad()
        average(losses, batch, "token_mean").backward()
        adam.step()
    return [table.detach() for table in (*policy, values)]


def test_ppo_of_one_epoch_and_one_minibatch_is_a2c() -> None:
    """The same parameters after the step (2205.09123), clip or not; two epochs are not the same."""
    a2c = stepped(Method(critic, plain), clip=None)
    for loss in (clipped, wider, Penalised(0.01).loss):
        ppo = stepped(Method(critic, loss), clip=0.2)
        torch.testing.assert_close(ppo, a2c, rtol=0, atol=1e-10)
    a2c, ppo = stepped(Method(critic, plain, inner=2), None), stepped(PPO, 0.2)
    assert (a2c[0] - ppo[0]).abs().max() > 1e-6


TEXT = torch.softmax(drawn(9, seed=30), -1)
"""How often each response of TWO occurs in plain text."""


def text_loss(policy: Tables, coef: float) -> Tensor:
    return coef * nll_sum(TWO.logprobs(policy), TEXT[:, None] * TWO.mask)


def test_the_gradient_of_text_joins_that_of_ppo() -> None:
    policy = somewhere(TWO)
    ppo = gradient(TWO, policy, PPO)
    rollouts = expected(TWO, policy, PPO)

    def total(coef: float) -> tuple[Tensor, ...]:
        losses = PPO.loss(rescore(TWO, policy, rollouts), rollouts, PPO.advantages(rollouts))
        loss = average(losses, rollouts, PPO.how) + text_loss(policy, coef)
        return torch.autograd.grad(loss, policy)

    assert all(map(torch.equal, total(0.0), ppo))
    text = torch.autograd.grad(text_loss(policy, 1.0), policy)
    both = tuple(a + 27.8 * b for a, b in zip(ppo, text, strict=True))
    close(total(27.8), both, 1e-10)


@pytest.mark.parametrize("coef", [0.1, 0.4])
def test_ppo_ptx_rests_between_the_optimum_and_the_text(coef: float) -> None:
    """max E[r] - beta KL(pi || ref) + coef E_text[log pi] has, with D the text's distribution,

    pi (lambda - r + beta u) = coef D for each response. Its left side grows with pi where it is
    positive, and the total of the probabilities fixes lambda.
    """
    reference = TWO.logprobs(TWO.reference).sum(-1)

    def solved(multiplier: Tensor) -> Tensor:
        low, high = torch.full((9,), -60.0).double(), torch.full((9,), 20.0).double()  # log pi
        for _ in range(100):
            middle = (low + high) / 2
            price = multiplier - TWO.reward + TWO.beta * (middle - reference)
            more = price < coef * TEXT / middle.exp()
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        return high.exp()

    low, high = torch.tensor([-20.0, 20.0]).double()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if solved(middle).sum() > 1 else (low, middle)
    found = settle(TWO, replace(PPO, inner=1), also=lambda policy: text_loss(policy, coef))
    assert TWO.distance(found, solved(high)) < 1e-6
    assert TWO.distance(found) > 0.05
    assert text_loss(found, 1.0) < text_loss(settle(TWO, PPO), 1.0)


@pytest.mark.slow
def test_a_stronger_tie_stays_closer() -> None:
    """Sampled PPO over beta: reward and KL fall as it grows; no point is above the optimum's."""
    found = []
    for beta in (0.0, 0.01, 0.1, 1.0, 100.0):
        space = replace(TWO, beta=beta)
        policy = learn(space, PPO, seed=0)
        own = space.probabilities(policy)
        kl = divergences(space, policy)[0].item()
        found.append(((own * space.reward).sum().item(), kl))
        if beta:
            best = beta * space.log_z()
            assert best - 0.01 < space.objective(policy).item() < best + 1e-9
    assert found == sorted(found, reverse=True)
    assert [kl for _, kl in found] == sorted((kl for _, kl in found), reverse=True)
    assert found[0][0] > 0.99 * TWO.reward.max().item()
    assert found[-1][1] < 1e-3
