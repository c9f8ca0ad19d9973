"""Policies against each other: who wins, by how much, and who cannot be told apart."""

import math

import pytest
import torch

from rlhf_cli.evaluation.contest import Contest, played

NAN = math.nan


def contest(**scores: list[list[float]]) -> Contest:
    return Contest(0.0, {name: torch.tensor(each) for name, each in scores.items()})


def test_a_worked_head_to_head() -> None:
    # on the third prompt one response has no score, and it is left out
    found = contest(a=[[2.0], [1.0], [NAN]], b=[[1.0], [1.0], [0.0]]).win_rates("a", ["b"])
    assert (found["b"]["win"], found["b"]["tie"], found["b"]["loss"]) == (0.5, 0.5, 0)
    assert found["b"]["p"] == found["b"]["p_holm"]


def test_swapping_sides_swaps_wins_and_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.randint(3, (30, 4), generator=generator).double() for name in "ab"}
    ours = Contest(0.0, scores).win_rates("a", ["b"])["b"]
    theirs = Contest(0.0, scores).win_rates("b", ["a"])["a"]
    assert (ours["win"], ours["tie"], ours["loss"]) == pytest.approx(
        (theirs["loss"], theirs["tie"], theirs["win"])
    )
    assert ours["win"] + ours["tie"] + ours["loss"] == pytest.approx(1)
    assert ours["p"] == pytest.approx(theirs["p"])


def test_several_comparisons_are_corrected_together() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = {name: torch.randn(40, 2, generator=generator) for name in "abcd"}
    found = Contest(0.0, scores).win_rates("a", ["b", "c", "d"])
    chances = sorted(each["p"] for each in found.values())
    corrected = sorted(each["p_holm"] for each in found.values())
    assert corrected[0] == pytest.approx(min(1, 3 * chances[0]))
    assert all(each["p_holm"] >= each["p"] for each in found.values())
    against = Contest(0.0, scores).against("a", list("abcd"))
    assert list(against) == ["b", "c", "d"]
    assert against["b"]["win"] == pytest.approx(found["b"]["loss"])


def test_gains_are_paired_and_the_base_has_none_to_correct() -> None:
    hard = 10 * torch.randn(50, 1, generator=torch.Generator().manual_seed(2))
    scores = {"base": hard, "better": hard + 1 + 0.1 * hard.sin(), "same": hard.clone()}
    found = Contest(0.0, scores).gains("base")
    assert found["better"] and found["base"] and found["same"]
    assert found["better"]["mean"] == pytest.approx(1, abs=0.1)
    assert found["better"]["stderr"] < 0.05  # that of either mean is 1.4
    assert found["better"]["p_holm"] == pytest.approx(2 * found["better"]["p"])
    assert found["same"] == {"mean": 0.0, "stderr": 0.0, "p": 1.0, "p_holm": 1.0}
    assert "p_holm" not in found["base"]
    assert contest(a=[[1.0]], b=[[NAN]]).gains("b")["a"] is None


def test_points_of_each_prompt_add_up_to_its_games() -> None:
    points = played([torch.tensor([[1.0], [NAN]]), torch.tensor([[0.0], [0.0]])], 0.0)
    assert points.tolist() == [[[0, 1], [0, 0]], [[0, 0], [0, 0]]]  # they did not meet on it


def test_ratings_name_who_cannot_be_told_apart() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = {
        "weak": torch.randn(80, 2, generator=generator),
        "strong": 2 + torch.randn(80, 2, generator=generator),
        "as_weak": torch.randn(80, 2, generator=generator),
    }
    found = Contest(0.0, scores).rated("weak", seed=0)
    assert list(found)[0] == "strong" and found["weak"]["rating"] == 0
    assert found["strong"]["not_separable"] == [] and found["strong"]["low"] > 100
    assert found["weak"]["not_separable"] == ["as_weak"]
    moved = Contest(0.0, scores).rated("strong", seed=0)
    assert moved["weak"]["rating"] == pytest.approx(-found["strong"]["rating"])
    assert contest(a=[[1.0], [2.0]]).rated("a", seed=0) == {}
