"""The load-balancing loss: a number worked by hand, and what transformers computes."""

import importlib

import pytest
import torch

from rlhf_cli.objectives.routing import (
    expert_counts,
    load_balancing_loss,
    loads,
    probability_sums,
)

# three tokens and a pad, of which the first three have probabilities that are easy to add up
PROBABILITIES = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.1, 0.2, 0.7], [0.0, 1.0, 0.0]])
SCORES = (PROBABILITIES + 1e-30).log()
WEIGHTS = torch.tensor([1, 1, 1, 0])


def test_one_expert_a_token_by_hand() -> None:
    counts = expert_counts(SCORES, WEIGHTS, k=1)
    assert counts.tolist() == [2, 0, 1]
    sums = probability_sums(SCORES, WEIGHTS)
    torch.testing.assert_close(sums, torch.tensor([1.2, 0.6, 1.2]))
    # 3 (2/3 * 0.4 + 0 * 0.2 + 1/3 * 0.4)
    assert load_balancing_loss(counts, sums, 3).item() == pytest.approx(1.2)
    assert loads(counts).tolist() == pytest.approx([2, 0, 1])


def test_two_experts_a_token_and_a_token_of_two_sequences_by_hand() -> None:
    counts = expert_counts(SCORES, torch.tensor([1, 1, 2, 0]), k=2)
    assert counts.tolist() == [2, 3, 3]  # the third token goes to 2 and 1, twice
    sums = probability_sums(SCORES, torch.tensor([1, 1, 2, 0]))
    # 3 (2/4 * 1.3/4 + 3/4 * 0.8/4 + 3/4 * 1.9/4)
    assert load_balancing_loss(counts, sums, 4).item() == pytest.approx(2.00625)


def test_even_experts_cost_k() -> None:
    scores = torch.eye(4) * 20
    counts = expert_counts(scores, torch.ones(4), k=1)
    assert load_balancing_loss(counts, probability_sums(scores, torch.ones(4)), 4) == 1.0


def test_the_gradient_goes_through_probabilities_alone() -> None:
    scores = SCORES[:3].clone().requires_grad_()
    weights = torch.ones(3)
    counts = expert_counts(scores, weights, k=1)
    load_balancing_loss(counts, probability_sums(scores, weights), 3).backward()
    assert scores.grad is not None
    # of the first token: E / N p_i (f_i - sum_j f_j p_j)
    mean = 2 / 3 * 0.5 + 1 / 3 * 0.2
    wanted = [0.5 * (2 / 3 - mean), 0.3 * (0 - mean), 0.2 * (1 / 3 - mean)]
    torch.testing.assert_close(scores.grad[0], torch.tensor(wanted))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"])
def test_it_is_the_loss_of_transformers(family: str) -> None:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    torch.manual_seed(0)
    layers = tuple(torch.randn(2 * 7, 6) for _ in range(3))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    theirs = module.load_balancing_loss_func(layers, 6, 2, mask)
    weights = mask.flatten()
    counts = torch.stack([expert_counts(each, weights, 2) for each in layers]).sum(0)
    sums = torch.stack([probability_sums(each, weights) for each in layers]).sum(0)
    assert load_balancing_loss(counts, sums, 3 * 11).item() == pytest.approx(theirs.item())
