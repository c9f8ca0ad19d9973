"""The optimum pi_ref exp(r / beta) / Z on small spaces, reached by every route.

Two tokens of three symbols, nine responses; the reference, the rewards and beta are arbitrary.
IPO has another optimum, and reward models have the rewards themselves.
"""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from rlhf_cli.objectives.advantages import at_last, gae, kl_shaped_rewards
from rlhf_cli.objectives.kl import k1, weighted_k3
from rlhf_cli.objectives.likelihood import masked_mean, masked_whiten, sequence_logprob
from rlhf_cli.objectives.policy_gradient import (
    clipped_policy_loss,
    clipped_value_loss,
)
from rlhf_cli.objectives.preference import dpo_loss, ipo_loss, robust_dpo_loss
from rlhf_cli.objectives.reward_model import bradley_terry_loss, kwise_loss, plackett_luce_loss

BETA = 0.5
FIRST, SECOND = torch.cartesian_prod(torch.arange(3), torch.arange(3)).unbind(-1)  # 9 responses
RESPONSES = torch.stack([FIRST, SECOND], -1)
EVERY = torch.ones(9, 2, dtype=torch.bool)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


REFERENCE = (drawn(3, seed=1), drawn(3, 3, seed=2))
REWARD = drawn(9, seed=3)
Tables = tuple[Tensor, Tensor]
"""Logits of the first token, and of the second after each first."""


def start() -> Tables:
    first, second = (table.clone().requires_grad_() for table in REFERENCE)
    return first, second


def logprobs(policy: Tables, responses: Tensor) -> Tensor:
    """(B, 2) log-probs of the tokens of responses."""
    first, second = torch.log_softmax(policy[0], -1), torch.log_softmax(policy[1], -1)
    a, b = responses.unbind(-1)
    return torch.stack([first[a], second[a, b]], -1)


def distribution(policy: Tables) -> Tensor:
    """(9,) probabilities."""
    return sequence_logprob(logprobs(policy, RESPONSES), EVERY).exp().detach()


OPTIMUM = torch.softmax(distribution(REFERENCE).log() + REWARD / BETA, -1)
LOG_Z = torch.logsumexp(distribution(REFERENCE).log() + REWARD / BETA, -1)


def distance(policy: Tables, optimum: Tensor = OPTIMUM) -> float:
    """Total variation to the optimum."""
    return (distribution(policy) - optimum).abs().sum().item() / 2


def objective(policy: Tables) -> Tensor:
    """E[r] - beta KL(pi || ref), exactly."""
    ours, theirs = logprobs(policy, RESPONSES), logprobs(REFERENCE, RESPONSES)
    shaped = REWARD - BETA * k1(ours, theirs).sum(-1)
    return (ours.sum(-1).exp() * shaped).sum()


def minimise(policy: Iterable[Tensor], loss: Callable[[], Tensor]) -> None:
    """Exact gradients, to convergence."""
    optimizer = torch.optim.LBFGS(
        list(policy),
        max_iter=2000,
        tolerance_grad=1e-13,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def test_exact_ascent_reaches_the_optimum() -> None:
    policy = start()
    assert distance(policy) > 0.3
    minimise(policy, lambda: -objective(policy))
    assert distance(policy) < 1e-6
    assert objective(policy).item() == pytest.approx(BETA * LOG_Z.item(), abs=1e-10)


def test_the_gap_to_the_optimum_is_the_divergence_from_it() -> None:
    for seed in range(5):
        policy = drawn(3, seed=10 + seed), drawn(3, 3, seed=20 + seed)
        ours = distribution(policy)
        gap = BETA * LOG_Z - objective(policy)
        assert gap.item() == pytest.approx(BETA * (ours * (ours / OPTIMUM).log()).sum().item())


def test_at_the_optimum_nothing_is_left_to_gain() -> None:
    """With the soft values as critic every advantage vanishes, so sampled PPO stands still."""
    second = REFERENCE[1] + REWARD.view(3, 3) / BETA
    value = BETA * (torch.logsumexp(second, -1) - torch.logsumexp(REFERENCE[1], -1))  # of token 1
    best: Tables = (REFERENCE[0] + value / BETA, second)
    assert distance(best) < 1e-12
    ours, theirs = logprobs(best, RESPONSES), logprobs(REFERENCE, RESPONSES)
    rewards = kl_shaped_rewards(at_last(REWARD, EVERY), ours, theirs, EVERY, BETA)
    torch.testing.assert_close(rewards.sum(-1), (BETA * LOG_Z).expand(9), rtol=0, atol=1e-10)
    values = torch.stack([(BETA * LOG_Z).expand(9), value[FIRST]], -1)
    for lam in (0.0, 0.5, 1.0):
        advantages, _ = gae(rewards, values, EVERY, 1.0, lam)
        torch.testing.assert_close(advantages, torch.zeros_like(advantages), rtol=0, atol=1e-10)


def test_the_losses_of_ppo_and_grpo_climb_the_true_gradient() -> None:
    """In expectation over all responses, at the policy that sampled them."""
    policy = drawn(3, seed=5).requires_grad_(), drawn(3, 3, seed=6).requires_grad_()
    exact = torch.autograd.grad(-objective(policy), policy)
    ours, theirs = logprobs(policy, RESPONSES), logprobs(REFERENCE, RESPONSES)
    old = ours.detach()
    weights = distribution(policy)[:, None]

    rewards = kl_shaped_rewards(at_last(REWARD, EVERY), old, theirs, EVERY, BETA)
    values = drawn(9, 2, seed=7)  # any baseline that does not see the token
    values = torch.stack([values[:1, 0].expand(9), values[:3, 1][FIRST]], -1)
    advantages, _ = gae(rewards, values, EVERY, 1.0, 1.0)
    ppo = (weights * clipped_policy_loss(ours - old, advantages, 0.2)).sum()
    found = torch.autograd.grad(ppo, policy, retain_graph=True)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)

    # GRPO's KL term sits in the loss, token by token: the gradient of each token's own KL, whose
    # effect on what comes later it leaves out, so only the last token's table must agree
    gains = (REWARD - (weights[:, 0] * REWARD).sum())[:, None]
    tokens = clipped_policy_loss(ours - old, gains, 0.2) + BETA * weighted_k3(ours, old, theirs)
    found = torch.autograd.grad((weights * tokens).sum(), policy)
    torch.testing.assert_close(found[1], exact[1], rtol=0, atol=1e-12)


def ppo(seed: int, whiten: bool = False, iterations: int = 400) -> Tables:
    """Sampled PPO with a tabular critic: 512 responses an iteration, four clipped steps each."""
    generator = torch.Generator().manual_seed(seed)
    policy = start()
    critic = torch.zeros((), dtype=torch.float64).requires_grad_(), drawn(3, seed=0) * 0
    critic[1].requires_grad_()
    adam = torch.optim.Adam([*policy, *critic], 2e-2)
    decay = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, iterations)

    def values_of(responses: Tensor) -> Tensor:
        return torch.stack([critic[0].expand(len(responses)), critic[1][responses[:, 0]]], -1)

    for _ in range(iterations):
        picks = torch.multinomial(distribution(policy), 512, True, generator=generator)
        responses, mask = RESPONSES[picks], torch.ones(512, 2, dtype=torch.bool)
        with torch.no_grad():
            old, theirs = logprobs(policy, responses), logprobs(REFERENCE, responses)
            before = values_of(responses)
            rewards = kl_shaped_rewards(at_last(REWARD[picks], mask), old, theirs, mask, BETA)
            advantages, returns = gae(rewards, before, mask, 1.0, 0.95)
            if whiten:
                advantages = masked_whiten(advantages, mask)
        for _ in range(2):
            losses = clipped_policy_loss(logprobs(policy, responses) - old, advantages, 0.2)
            losses = losses + clipped_value_loss(values_of(responses), before, returns, 0.2)
            adam.zero_grad()
            masked_mean(losses, mask).backward()
            adam.step()
        decay.step()
    return policy


def log_ratios(policy: Tables) -> Tensor:
    """(9,) rho of each response."""
    ours, theirs = logprobs(policy, RESPONSES), logprobs(REFERENCE, RESPONSES)
    return sequence_logprob(ours - theirs, EVERY)


def on_pairs(wins: Tensor, loss: Callable[[Tensor], Tensor]) -> Tables:
    """Least loss(h) on weighted pairs: wins[i, j] is how often i beats j."""
    policy = start()
    i, j = wins.nonzero().unbind(-1)

    def total() -> Tensor:
        rho = log_ratios(policy)
        return (wins[i, j] * loss(rho[i] - rho[j])).sum() / wins.sum()

    minimise(policy, total)
    return policy


def dpo(wins: Tensor) -> Tables:
    return on_pairs(wins, lambda h: dpo_loss(h, BETA))


OFF_DIAGONAL = 1 - torch.eye(9, dtype=torch.float64)
PREFERRED = torch.sigmoid(REWARD[:, None] - REWARD) * OFF_DIAGONAL


def test_dpo_on_all_preferences_reaches_the_optimum() -> None:
    assert distance(dpo(PREFERRED)) < 1e-4


def test_sharper_preferences_and_a_stronger_tie_meet_at_the_same_optimum() -> None:
    wins = torch.sigmoid(2 * (REWARD[:, None] - REWARD)) * OFF_DIAGONAL
    assert distance(on_pairs(wins, lambda h: dpo_loss(h, 2 * BETA))) < 1e-4


def test_dpo_on_sampled_preferences_comes_near() -> None:
    generator = torch.Generator().manual_seed(0)
    picks = torch.multinomial(PREFERRED.flatten(), 20_000, True, generator=generator)
    wins = torch.bincount(picks, minlength=81).view(9, 9).double()
    assert distance(dpo(wins)) < 0.12


def test_robust_dpo_sees_through_flipped_labels() -> None:
    flipped = 0.8 * PREFERRED + 0.2 * PREFERRED.T
    assert distance(on_pairs(flipped, lambda h: robust_dpo_loss(h, BETA, 0.2))) < 1e-4
    assert distance(dpo(flipped)) > 0.05


RANKINGS = torch.cartesian_prod(*[torch.arange(9)] * 3)  # every ordered triple
RANKINGS = RANKINGS[(RANKINGS.sort(-1).values.diff(dim=-1) > 0).all(-1)]  # of different responses
OF_THREE = torch.arange(3).expand(len(RANKINGS), 3), torch.ones(len(RANKINGS), 3).bool()


def ranked() -> Tensor:
    """(504,) probability of each ranking of a triple: the best is picked first, and so on."""
    odds = REWARD.exp()[RANKINGS]
    return odds[:, 0] / odds.sum(-1) * odds[:, 1] / odds[:, 1:].sum(-1)


def test_there_is_a_ranking_for_every_triple() -> None:
    assert len(RANKINGS) == 9 * 8 * 7
    assert ranked().sum().item() == pytest.approx(84)  # C(9, 3), with six orders each


def test_dpo_on_all_rankings_reaches_the_optimum() -> None:
    policy, weights = start(), ranked() / 84

    def loss() -> Tensor:
        return (weights * plackett_luce_loss(BETA * log_ratios(policy)[RANKINGS], *OF_THREE)).sum()

    minimise(policy, loss)
    assert distance(policy) < 1e-4


def test_ipo_reaches_its_own_optimum() -> None:
    """pi = ref exp(p(y beats mu) / tau) / Z (2310.12036), whatever the preferences are.

    A pair of y, y' from mu adds (h - (2 p(y beats y') - 1) / (2 tau))^2 and a constant; the least
    squares rho(y) is the mean of the targets over y', p(y beats mu) / tau up to a constant.
    """
    tau, mu = 0.2, torch.softmax(drawn(9, seed=8), -1)
    for better in (
        torch.sigmoid(REWARD[:, None] - REWARD),
        (REWARD[:, None] > REWARD).double() + torch.eye(9) / 2,  # certain labels
        torch.sigmoid(drawn(9, 9, seed=9).triu() - drawn(9, 9, seed=9).triu().T),  # in circles
    ):
        torch.testing.assert_close(better + better.T, torch.ones_like(better))
        found = on_pairs(mu[:, None] * mu * better, lambda h: ipo_loss(h, tau))
        best = torch.softmax(distribution(REFERENCE).log() + better @ mu / tau, -1)
        assert distance(start(), best) > 0.1
        assert distance(found, best) < 1e-4


def test_ipo_on_two_responses_stays_short_of_certainty() -> None:
    """Uniform reference, the same one always preferred: pi = sigmoid(1 / (2 tau)), not 1."""
    for tau in (0.1, 0.5, 2.0):
        logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)

        def loss(logits: Tensor = logits, tau: float = tau) -> Tensor:
            return ipo_loss(logits[:1] - logits[1:], tau).sum()  # the reference cancels

        minimise([logits], loss)
        expected = torch.sigmoid(torch.tensor(1 / (2 * tau))).item()
        assert torch.softmax(logits, -1)[0].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("form", ["pairs", "kwise", "plackett_luce"])
def test_reward_models_recover_the_rewards_behind_all_comparisons(form: str) -> None:
    scores = torch.zeros(9, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        if form == "pairs":
            losses = bradley_terry_loss(scores[:, None], scores)
            return (PREFERRED * losses).sum() / PREFERRED.sum()
        listwise = kwise_loss if form == "kwise" else plackett_luce_loss
        return (ranked() * listwise(scores[RANKINGS], *OF_THREE)).sum() / 84

    minimise([scores], loss)
    found = (scores - scores.mean()).detach()
    torch.testing.assert_close(found, REWARD - REWARD.mean(), rtol=0, atol=1e-3)
    right = (PREFERRED * (found[:, None] > found)).sum() / PREFERRED.sum()
    bayes = torch.maximum(PREFERRED, PREFERRED.T).sum() / 2 / PREFERRED.sum()
    assert right.item() == pytest.approx(bayes.item(), abs=0.01)


@pytest.mark.parametrize("seed", range(4))
def test_sampled_ppo_reaches_the_optimum_and_meets_dpo(seed: int) -> None:
    found = ppo(seed)
    assert distance(found) < 0.02
    apart = (distribution(found) - distribution(dpo(PREFERRED))).abs().sum().item() / 2
    assert apart < 0.05


def test_whitened_advantages_lead_to_the_same_optimum() -> None:
    assert distance(ppo(0, whiten=True)) < 0.05


def test_a_stronger_tie_stays_closer() -> None:
    """The trade-off over beta: reward and KL both fall as beta grows."""
    found = []
    for beta in (1e-2, 0.1, 1.0, 1e3):
        best = torch.softmax(distribution(REFERENCE).log() + REWARD / beta, -1)
        kl = k1(best.log(), distribution(REFERENCE).log())
        found.append(((best * REWARD).sum().item(), torch.nan_to_num(best * kl).sum().item()))
    assert found == sorted(found, reverse=True)
    assert found[-1][1] < 1e-3
