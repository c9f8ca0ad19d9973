"""What n of K samples give, against all subsets."""

import math
from itertools import combinations

import pytest
import torch

from rlhf_cli.objectives.optimum import best_of_n_probabilities
from rlhf_cli.objectives.subsets import (
    best_of,
    best_of_n_kl_bound,
    majority_at,
    pass_at,
)


def test_a_worked_pass_at_n() -> None:
    # 2 of 4 right: 1 - C(2, 2) / C(4, 2) = 5/6; 1 of 4: 1 - 3/6
    correct = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    assert pass_at(correct, 2).tolist() == pytest.approx([5 / 6, 1 / 2])
    assert pass_at(correct, 1).tolist() == pytest.approx([1 / 2, 1 / 4])
    assert pass_at(correct, 4).tolist() == [1, 1]


def test_a_worked_best_of_n() -> None:
    # pairs of 1 2 4: best 2, 4, 4; of what they are worth, 20 40 40
    scores, values = torch.tensor([[4.0, 1.0, 2.0]]), torch.tensor([[40.0, 10.0, 20.0]])
    assert best_of(scores, values, 2).item() == pytest.approx(100 / 3)
    assert best_of(scores, scores, 1).item() == pytest.approx(7 / 3)
    # a tie at the top is broken by lot
    assert best_of(torch.tensor([[1.0, 1.0, 0.0]]), values, 3).item() == pytest.approx(25)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_each_formula_is_the_mean_over_all_subsets(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    scores = torch.randint(4, (6, 5), generator=generator).double()  # with ties
    values = torch.randn(6, 5, generator=generator).double()
    answers = torch.randint(3, (6, 5), generator=generator)
    best, passed, voted = best_of(scores, values, n), pass_at(answers == 0, n), []
    for row in range(6):
        subsets = [list(each) for each in combinations(range(5), n)]
        expected = []
        for subset in subsets:
            top = scores[row, subset] == scores[row, subset].max()
            expected.append(values[row, subset][top].mean().item())
        assert best[row].item() == pytest.approx(sum(expected) / len(subsets), abs=1e-12)
        hits = [float((answers[row, subset] == 0).any()) for subset in subsets]
        assert passed[row].item() == pytest.approx(sum(hits) / len(subsets), abs=1e-12)
        shares = []
        for subset in subsets:
            counts = answers[row, subset].bincount(minlength=3)
            shares.append(float(counts[0] == counts.max()) / int((counts == counts.max()).sum()))
        own = answers[row].tolist()
        found = majority_at(own, [float(each == 0) for each in own], n)
        assert found == pytest.approx(sum(shares) / len(subsets), abs=1e-12)
        voted.append(found)
    assert voted  # of each row


def test_the_kl_of_best_of_n_is_at_most_its_bound_and_close_on_a_fine_space() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 8, 64):
        rough = torch.rand(5, generator=generator).double()
        rough /= rough.sum()
        scores = torch.tensor([0.0, 1.0, 1.0, 2.0, 3.0])
        best = best_of_n_probabilities(rough, scores, n)
        assert best.sum().item() == pytest.approx(1)
        assert (best * (best / rough).log()).sum().item() <= best_of_n_kl_bound(n) + 1e-12
        fine = torch.full((200_000,), 1 / 200_000, dtype=torch.double)
        best = best_of_n_probabilities(fine, torch.arange(200_000.0), n).clamp(min=1e-300)
        kl = (best * (best / fine).log()).sum().item()
        assert kl == pytest.approx(best_of_n_kl_bound(n), abs=1e-3)
    assert best_of_n_kl_bound(2) == pytest.approx(math.log(2) - 0.5)


def test_the_mean_of_what_is_chosen_by_does_not_fall_with_n() -> None:
    scores = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    means = [best_of(scores, scores, n).mean().item() for n in range(1, 17)]
    assert means == sorted(means)
    assert means[-1] == pytest.approx(scores.amax(-1).mean().item(), abs=1e-6)
