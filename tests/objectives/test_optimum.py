"""The optimum pi_ref exp(r / beta) / Z on a small space, reached by every route.

Two tokens of three symbols, nine responses; the reference, the rewards and beta are arbitrary.
IPO has another optimum, and reward models have the rewards themselves. What online methods settle
at is told in `test_optimum_online.py`.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_cli.objectives.advantages import at_last, gae, kl_shaped_rewards
from rlhf_cli.objectives.kl import k1
from rlhf_cli.objectives.likelihood import sequence_logprob
from rlhf_cli.objectives.optimum import best_of_n_probabilities, divergence, optimum
from rlhf_cli.objectives.preference import dpo_loss, ipo_loss, robust_dpo_loss
from rlhf_cli.objectives.reward_model import bradley_terry_loss, kwise_loss, plackett_luce_loss
from tests.objectives.online import PPO, learn
from tests.objectives.spaces import ONE, TWO, Space, Tables, drawn, minimise

BETA, REWARD = TWO.beta, TWO.reward


@pytest.mark.parametrize("space", [ONE, TWO])
def test_exact_ascent_reaches_the_optimum(space: Space) -> None:
    policy = space.start()
    assert space.distance(policy) > 0.3
    minimise(policy, lambda: -space.objective(policy))
    assert space.distance(policy) < 1e-6
    assert space.objective(policy).item() == pytest.approx(space.beta * space.log_z(), abs=1e-12)


def test_the_gap_to_the_optimum_is_the_divergence_from_it() -> None:
    for seed in range(5):
        policy = drawn(3, seed=10 + seed), drawn(3, 3, seed=20 + seed)
        ours = TWO.probabilities(policy)
        gap = BETA * TWO.log_z() - TWO.objective(policy).item()
        divergence = (ours * k1(ours.log(), TWO.optimum.log())).sum().item()
        assert gap == pytest.approx(BETA * divergence, abs=1e-12)


def test_at_the_optimum_nothing_is_left_to_gain() -> None:
    """With the soft values as critic every advantage vanishes, so sampled PPO stands still."""
    first, second = TWO.reference
    tilted = second + REWARD.view(3, 3) / BETA
    value = BETA * (torch.logsumexp(tilted, -1) - torch.logsumexp(second, -1))  # of token 1
    best: Tables = (first + value / BETA, tilted)
    assert TWO.distance(best) < 1e-12
    ours, theirs = TWO.logprobs(best), TWO.logprobs(TWO.reference)
    rewards = kl_shaped_rewards(at_last(REWARD, TWO.mask), ours, theirs, TWO.mask, BETA)
    whole = torch.full((9,), BETA * TWO.log_z(), dtype=torch.float64)
    torch.testing.assert_close(rewards.sum(-1), whole, rtol=0, atol=1e-10)
    values = torch.stack([whole, value[TWO.responses[:, 0]]], -1)
    for lam in (0.0, 0.5, 1.0):
        advantages, _ = gae(rewards, values, TWO.mask, 1.0, lam)
        torch.testing.assert_close(advantages, torch.zeros_like(advantages), rtol=0, atol=1e-10)


def log_ratios(policy: Tables) -> Tensor:
    """(9,) rho of each response."""
    return sequence_logprob(TWO.logprobs(policy) - TWO.logprobs(TWO.reference), TWO.mask)


def on_pairs(wins: Tensor, loss: Callable[[Tensor], Tensor]) -> Tables:
    """Least loss(h) on weighted pairs: wins[i, j] is how often i beats j."""
    policy = TWO.start()
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
    assert TWO.distance(dpo(PREFERRED)) < 1e-4


def test_sharper_preferences_and_a_stronger_tie_meet_at_the_same_optimum() -> None:
    wins = torch.sigmoid(2 * (REWARD[:, None] - REWARD)) * OFF_DIAGONAL
    assert TWO.distance(on_pairs(wins, lambda h: dpo_loss(h, 2 * BETA))) < 1e-4


def test_dpo_on_sampled_preferences_comes_near() -> None:
    generator = torch.Generator().manual_seed(0)
    picks = torch.multinomial(PREFERRED.flatten(), 20_000, True, generator=generator)
    wins = torch.bincount(picks, minlength=81).view(9, 9).double()
    assert TWO.distance(dpo(wins)) < 0.12


def test_robust_dpo_sees_through_flipped_labels() -> None:
    flipped = 0.8 * PREFERRED + 0.2 * PREFERRED.T
    assert TWO.distance(on_pairs(flipped, lambda h: robust_dpo_loss(h, BETA, 0.2))) < 1e-4
    assert TWO.distance(dpo(flipped)) > 0.05


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
    policy, weights = TWO.start(), ranked() / 84

    def loss() -> Tensor:
        return (weights * plackett_luce_loss(BETA * log_ratios(policy)[RANKINGS], *OF_THREE)).sum()

    minimise(policy, loss)
    assert TWO.distance(policy) < 1e-4


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
        best = torch.softmax(TWO.logprobs(TWO.reference).sum(-1) + better @ mu / tau, -1)
        assert TWO.distance(TWO.reference, best) > 0.1
        assert TWO.distance(found, best) < 1e-4


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
    found = learn(TWO, PPO, seed)
    assert TWO.distance(found) < 0.02
    assert TWO.distance(found, TWO.probabilities(dpo(PREFERRED))) < 0.05


def test_the_optimum_in_closed_form_and_best_of_n_below_it() -> None:
    """No policy that is nearer to the reference has more reward: not the best of n."""
    logprobs = TWO.logprobs(TWO.reference).sum(-1)
    assert (optimum(logprobs, REWARD, BETA) - TWO.optimum).abs().max() < 1e-12

    def place(probabilities: Tensor) -> tuple[float, float]:
        return divergence(probabilities, logprobs), (probabilities * REWARD).sum().item()

    curve = [place(optimum(logprobs, REWARD, 2.0**power)) for power in range(8, -12, -1)]
    assert curve == sorted(curve) and curve[0][0] < 1e-5
    for n in (2, 3, 8, 64):
        kl, reward = place(best_of_n_probabilities(logprobs.exp(), REWARD, n))
        nearest = max(each for of, each in curve if of <= kl)
        beyond = min(each for of, each in curve if of >= kl)
        assert nearest - 0.1 < reward <= beyond
    # all of it on one response of probability p is log 1/p away
    alone = torch.zeros(9, dtype=torch.double)
    alone[4] = 1
    assert divergence(alone, logprobs) == pytest.approx(-logprobs[4].item())
