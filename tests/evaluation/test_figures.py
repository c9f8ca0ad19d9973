"""The figures of one policy, from samples made by hand."""

import math

import pytest
import torch

from rlhf_cli.data.items import Tokens
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.evaluation.figures import Sampled, entropy_of, figures_of, sizes
from rlhf_cli.objectives.estimates import clustered_mean, ratio_mean
from rlhf_cli.objectives.subsets import best_of_n_kl_bound
from rlhf_cli.rewards.reward import Scores
from rlhf_cli.rollout.rollouts import Rollout


def sampled(scores: dict[str, list[float]], texts: list[str], samples: int) -> Sampled:
    rollouts = [
        Rollout(Prompt("p"), Tokens([1], [2] * (1 + i)), [-1.0] * (1 + i), "eos", text)
        for i, text in enumerate(texts)
    ]
    said = {name: Scores(torch.tensor(values), {}, {}) for name, values in scores.items()}
    return Sampled(rollouts, said, samples)


def test_the_best_of_n_is_chosen_by_reward_and_measured_by_each_judge() -> None:
    scores = {"reward": [1.0, 3.0, 0.0, 2.0], "gold": [5.0, 0.0, 1.0, 1.0]}
    found = figures_of(sampled(scores, list("abcd"), 2), {})["best_of"]
    assert found["1"]["reward"]["mean"] == 1.5 and found["2"]["reward"]["mean"] == 2.5
    assert found["1"]["gold"]["mean"] == 1.75 and found["2"]["gold"]["mean"] == 0.5
    assert found["2"]["kl_bound"] == best_of_n_kl_bound(2) and found["1"]["kl_bound"] == 0
    assert "best_of" not in figures_of(sampled({"gold": [1.0] * 4}, list("abcd"), 2), {})


def test_a_prompt_without_a_score_is_no_part_of_best_of_n() -> None:
    scores = {"reward": [1.0, 3.0, math.nan, 9.0]}
    found = figures_of(sampled(scores, list("abcd"), 2), {})
    assert found["best_of"]["2"]["reward"]["mean"] == 3
    assert found["reward_none"] == 0.25
    assert "best_of" not in figures_of(sampled({"reward": [math.nan] * 2}, ["a", "b"], 2), {})


def test_verifiers_have_pass_and_majority_at_n() -> None:
    # answers 4 4 5 of which 4 is right; then 1 2 3 of which 3 is: of all three a tie, by lot
    texts = ["#### 4", "it is 4.", "5", "1", "2", "3"]
    found = figures_of(
        sampled({"gold": [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]}, texts, 3), {"gold": "exact_answer"}
    )
    assert found["gold_pass_at"]["1"]["mean"] == found["gold"]["mean"] == 0.5
    assert found["gold_pass_at"]["2"]["mean"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["gold_pass_at"]["3"]["mean"] == 1
    # of 4 4 5: one pair of three is right, two are ties: 2/3; of three 4 has the most
    assert found["gold_maj_at"]["2"]["mean"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert found["gold_maj_at"]["3"]["mean"] == pytest.approx((1 + 1 / 3) / 2)
    plain = figures_of(sampled({"gold": [1.0, 0.0]}, ["a", "b"], 2), {"gold": "regex:a"})
    assert "gold_pass_at" in plain and "gold_maj_at" not in plain
    graded = figures_of(sampled({"gold": [0.5, 0.0]}, ["a", "b"], 2), {"gold": "f.py:f"})
    assert "gold_pass_at" not in graded


def test_sizes_are_powers_of_two_and_the_number_itself() -> None:
    assert [sizes(n) for n in (1, 2, 3, 4, 6)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 6]]


def test_errors_of_lengths_are_those_of_prompts() -> None:
    found = figures_of(sampled({}, ["a"] * 4, 2), {})
    assert found["length"] == 2.5  # 1 2, 3 4
    assert found["length_stderr"] == pytest.approx(1.0)
    assert (found["ended"], found["ended_stderr"]) == (1, 0)


def test_a_worked_mean_over_tokens() -> None:
    # 3 tokens of 2 and 1 of 6: mean 3, deviations -3 and 3, error sqrt(18 * 2) / 4
    found = ratio_mean(torch.tensor([6.0, 6.0]), torch.tensor([3.0, 1.0]))
    assert (found.mean, found.stderr) == pytest.approx((3, 1.5))
    even = torch.tensor([[1.0, 2.0], [5.0, 2.0], [0.0, 3.0]])
    same, alike = clustered_mean(even), ratio_mean(even.sum(-1), torch.full((3,), 2.0))
    assert (alike.mean, alike.stderr) == pytest.approx((same.mean, same.stderr))
    assert entropy_of(sampled({}, ["a", "b"], 1).rollouts, 1)["mean"] == pytest.approx(1)
