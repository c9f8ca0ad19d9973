"""How good a scorer is: worked reports, invariances, perfect scorers and scorers that guess."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.evaluation.judging import (
    JudgedPairs,
    JudgedRanking,
    accuracy,
    calibration_of,
    figures,
    label_report,
    pair_report,
    pairs_of_rankings,
    ranking_report,
    regression_report,
)
from rlhf_cli.runs.summary import of_scores

PAIRS = JudgedPairs(
    chosen=torch.tensor([2.0, 1.0, 0.0, 3.0]),
    rejected=torch.tensor([1.0, 1.0, 3.0, 1.0]),
    chosen_lengths=[5, 3, 2, 4],
    rejected_lengths=[2, 4, 6, 4],
    margins=[1, None, 2, 1],
    groups=["chat", "code", "code", ""],
    clusters=["a", "a", "b", "c"],
)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def random_pairs(seed: int, prompts: int = 80) -> JudgedPairs:
    """Two pairs of each prompt, scored by chance."""
    generator = torch.Generator().manual_seed(seed)
    count = 2 * prompts
    chosen, rejected = torch.randn(2, count, generator=generator)
    ours, theirs = torch.randint(1, 50, (2, count), generator=generator).tolist()
    clusters = [i // 2 for i in range(count)]
    return JudgedPairs(chosen, rejected, ours, theirs, [None] * count, [""] * count, clusters)


def test_a_worked_report_on_pairs() -> None:
    found = pair_report(PAIRS)
    assert (found["pairs"], found["prompts"]) == (4, 3)
    assert found["accuracy"] == pytest.approx(2.5 / 4)  # right, tie, wrong, right
    # deviations .375 - .125 of a, -.625 of b, .375 of c
    expected = math.sqrt(0.25**2 + 0.625**2 + 0.375**2) / 4
    assert found["accuracy_stderr"] == pytest.approx(expected)
    differences = (1, 0, -3, 2)
    assert found["loss"] == pytest.approx(-sum(math.log(sigmoid(d)) for d in differences) / 4)
    # one pair a bin: a tie is confident and right by half
    error = (1 - sigmoid(1)) + 0 + sigmoid(3) + (1 - sigmoid(2))
    assert found["calibration_error"] == pytest.approx(error / 4)
    assert [each["count"] for each in found["calibration_bins"]] == [1, 1, 1, 1]
    assert found["calibration_bins"][0]["low"] == 0.5


def test_length_as_a_rule_to_beat() -> None:
    found = pair_report(PAIRS)
    # lengths 5-2, 3-4, 2-6, 4-4: chosen is longer once of three; the scorer prefers the longer of
    # the first and third pair and half of the second
    assert found["longer_chosen"] == pytest.approx(1 / 3)
    assert found["longer_preferred"] == pytest.approx(2.5 / 3)
    assert found["longer_accuracy"] == pytest.approx(1.5 / 4)
    # scores 2 1 0 3 1 1 3 1 (mean 1.5), lengths 5 3 2 4 2 4 6 4 (mean 3.75)
    assert found["length_correlation"] == pytest.approx(8 / math.sqrt(8 * 13.5))
    even = pair_report(replace(PAIRS, chosen_lengths=[4] * 4, rejected_lengths=[4] * 4))
    assert even["longer_chosen"] is even["longer_preferred"] is even["length_correlation"] is None
    assert even["longer_accuracy"] == 0.5


def test_accuracy_by_margin_and_group() -> None:
    found = pair_report(PAIRS)
    by_score = [(each["low"], each["pairs"], each["accuracy"]) for each in found["by_score_margin"]]
    assert by_score == [(0, 1, 0.5), (1, 1, 1), (2, 1, 1), (3, 1, 0)]
    by_row = [(each["low"], each["pairs"], each["accuracy"]) for each in found["by_row_margin"]]
    assert by_row == [(1, 2, 1), (2, 1, 0)]  # the row without a margin is in none
    by_group = [(each["group"], each["pairs"], each["accuracy"]) for each in found["by_group"]]
    assert by_group == [("chat", 1, 1), ("code", 2, 0.25)]
    chosen = pair_report(replace(PAIRS, selected=["random", "gap", "", "gap"]))["by_selected"]
    assert [(each["selected"], each["pairs"]) for each in chosen] == [("gap", 2), ("random", 1)]
    for each in found["by_score_margin"] + found["by_row_margin"] + found["by_group"] + chosen:
        assert 0 <= each["accuracy_low"] <= each["accuracy"] <= each["accuracy_high"] <= 1
    silent = replace(PAIRS, margins=[None] * 4, groups=["chat", "", "", "chat"])
    assert pair_report(silent)["by_row_margin"] == pair_report(silent)["by_group"] == []


def test_buckets_are_quartiles_that_never_part_equal_margins() -> None:
    judged = random_pairs(0, 50)
    quarters = pair_report(judged)["by_score_margin"]
    assert [each["pairs"] for each in quarters] == [25] * 4
    ends = [end for each in quarters for end in (each["low"], each["high"])]
    assert ends == sorted(ends)
    # mostly ones: three of four quartiles are cut at 1, and the bucket below it is empty
    margins = [1.0] * 80 + [2.0, 3.0, 4.0, 5.0] * 5
    found = pair_report(replace(judged, margins=margins))["by_row_margin"]
    assert sum(each["pairs"] for each in found) == 100
    assert (found[0]["low"], found[0]["pairs"] >= 80) == (1, True)


def test_a_constant_moves_nothing_and_swapped_sides_are_the_complement() -> None:
    judged = random_pairs(1)
    before = pair_report(judged)
    moved = pair_report(replace(judged, chosen=judged.chosen + 8, rejected=judged.rejected + 8))
    for name in ("accuracy", "accuracy_stderr", "loss", "calibration_error", "longer_preferred"):
        assert moved[name] == pytest.approx(before[name], abs=1e-5)
    swapped = JudgedPairs(
        judged.rejected,
        judged.chosen,
        judged.rejected_lengths,
        judged.chosen_lengths,
        judged.margins,
        judged.groups,
        judged.clusters,
    )
    after = pair_report(swapped)
    for name in ("accuracy", "longer_accuracy", "longer_chosen"):
        assert after[name] == pytest.approx(1 - before[name])
    assert after["accuracy_low"] == pytest.approx(1 - before["accuracy_high"])
    for name in ("accuracy_stderr", "length_correlation", "longer_preferred"):
        assert after[name] == pytest.approx(before[name])
    assert torch.equal(
        accuracy(PAIRS.chosen, PAIRS.rejected), 1 - accuracy(PAIRS.rejected, PAIRS.chosen)
    )


def test_a_perfect_scorer_of_pairs() -> None:
    judged = random_pairs(2)
    found = pair_report(replace(judged, chosen=judged.rejected + 40))
    assert (found["accuracy"], found["accuracy_stderr"], found["accuracy_high"]) == (1, 0, 1)
    assert found["accuracy_low"] == pytest.approx(80 / (80 + 1.96**2))  # 80 prompts, not 160 pairs
    assert found["loss"] == pytest.approx(0, abs=1e-12)
    assert found["calibration_error"] == pytest.approx(0, abs=1e-12)


def test_a_scorer_that_guesses_is_at_chance_as_often_as_its_interval_says() -> None:
    found = [pair_report(random_pairs(seed)) for seed in range(200)]
    assert 181 <= sum(each["accuracy_low"] <= 0.5 <= each["accuracy_high"] for each in found) <= 199
    spread = torch.tensor([each["accuracy"] for each in found]).std().item()
    claimed = sum(each["accuracy_stderr"] for each in found) / 200
    assert claimed == pytest.approx(spread, rel=0.15)
    # confident guesses: two normal scores give the preferred side 0.74 on average
    assert sum(each["calibration_error"] for each in found) / 200 == pytest.approx(0.24, abs=0.04)


def ranking(scores: list[float], ranks: list[float], cluster: str = "a") -> JudgedRanking:
    lengths = [len(scores) - i for i in range(len(scores))]
    return JudgedRanking(torch.tensor(scores), ranks, lengths, cluster)


def test_a_worked_report_on_rankings() -> None:
    rankings = [
        ranking([3, 2, 2, 1], [1, 1, 2, 3], "a"),  # tau 0.8
        ranking([2, 3, 1], [1, 2, 3], "b"),  # tau 1/3
        ranking([1, 1], [1, 2], "c"),  # all scores alike
        ranking([1, 2], [1, 1], "d"),  # all ranks alike
    ]
    found = ranking_report(rankings)
    assert (found["rankings"], found["prompts"]) == (3, 3)
    assert found["kendall_tau"] == pytest.approx((0.8 + 1 / 3 + 0) / 3)
    mean = found["kendall_tau"]
    spread = math.sqrt((0.8 - mean) ** 2 + (1 / 3 - mean) ** 2 + mean**2) / 3
    assert found["kendall_tau_stderr"] == pytest.approx(spread)
    assert found["top1"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["top1_chance"] == pytest.approx((2 / 4 + 1 / 3 + 1 / 2) / 3)
    # untied in ranks: five pairs, one of equal scores; three, one wrong; one, equal
    assert found["pairs"] == 9
    assert found["accuracy"] == pytest.approx((4.5 + 2 + 0.5) / 9)
    assert [(each["low"], each["pairs"]) for each in found["by_row_margin"]] == [(1, 6), (2, 3)]


def test_pairs_of_rankings_keep_sides_lengths_and_prompts() -> None:
    found = pairs_of_rankings([ranking([0.1, 0.2, 0.3], [2, 1, 2], "p")])
    assert found.chosen.tolist() == pytest.approx([0.2, 0.2])
    assert found.rejected.tolist() == pytest.approx([0.1, 0.3])
    assert (found.chosen_lengths, found.rejected_lengths) == ([2, 2], [3, 1])
    assert (found.margins, found.clusters) == ([1, 1], ["p", "p"])


def test_perfect_and_guessing_scorers_of_rankings() -> None:
    generator = torch.Generator().manual_seed(4)
    ranks: list[float] = [1, 2, 2, 4]
    perfect = ranking_report([ranking([4, 2, 2, 1], ranks, str(i)) for i in range(5)])
    assert (perfect["kendall_tau"], perfect["top1"], perfect["accuracy"]) == pytest.approx(
        (1, 1, 1)
    )
    guesses = [
        ranking_report(
            [
                ranking(torch.randn(4, generator=generator).tolist(), ranks, str(i))
                for i in range(60)
            ]
        )
        for _ in range(100)
    ]
    inside = sum(abs(each["kendall_tau"]) <= 1.96 * each["kendall_tau_stderr"] for each in guesses)
    assert inside >= 88
    assert sum(each["accuracy_low"] <= 0.5 <= each["accuracy_high"] for each in guesses) >= 88
    assert sum(each["top1"] for each in guesses) / 100 == pytest.approx(0.25, abs=0.02)


def test_rankings_that_ask_nothing() -> None:
    assert ranking_report([ranking([1, 2], [1, 1])]) == ranking_report([]) == {"rankings": 0}


def test_a_worked_report_on_labels() -> None:
    scores, labels = torch.tensor([1.0, 2.0, -3.0, 0.0]), torch.tensor([1, 0, 0, 0])
    found = label_report(scores, labels, "aabc")
    assert (found["labels"], found["prompts"]) == (4, 3)
    assert found["accuracy"] == pytest.approx(2.5 / 4)  # right, wrong, right, on the fence
    assert found["base_rate"] == 0.75
    assert found["auc"] == pytest.approx(2 / 3)
    losses = [sigmoid(1), 1 - sigmoid(2), 1 - sigmoid(-3), 0.5]
    assert found["loss"] == pytest.approx(-sum(map(math.log, losses)) / 4)
    error = (1 - sigmoid(1)) + sigmoid(2) + sigmoid(-3) + 0.5
    assert found["calibration_error"] == pytest.approx(error / 4)


def test_shares_of_votes_count_as_shares() -> None:
    found = label_report(torch.tensor([5.0, -5.0]), torch.tensor([0.75, 0.5]), "ab")
    assert found["accuracy"] == pytest.approx((0.75 + 0.5) / 2)
    assert found["base_rate"] == pytest.approx(0.625)


def test_perfect_and_constant_scorers_of_labels() -> None:
    labels = torch.tensor([1, 0, 1, 1, 0])
    perfect = label_report(80 * labels - 40, labels, range(5))
    assert (perfect["accuracy"], perfect["auc"]) == (1, 1)
    assert perfect["loss"] == pytest.approx(0, abs=1e-12)
    constant = label_report(torch.full((5,), 3.0), labels, range(5))
    assert constant["accuracy"] == constant["base_rate"] == pytest.approx(0.6)
    assert constant["auc"] == 0.5
    assert label_report(torch.ones(2), torch.ones(2), range(2))["auc"] is None


def test_a_worked_report_on_numbers() -> None:
    # errors 1 0 -2: squares 1 0 4; targets 1 2 6 (mean 3) vary by 4 1 9
    scores, targets = torch.tensor([2.0, 2.0, 4.0]), torch.tensor([1, 2, 6])
    found = regression_report(scores, targets, "abc")
    assert found["mse"] == pytest.approx(5 / 3)
    deviations = (1 - 5 / 3, -5 / 3, 4 - 5 / 3)
    assert found["mse_stderr"] == pytest.approx(math.sqrt(sum(d**2 for d in deviations)) / 3)
    assert found["r2"] == pytest.approx(1 - 5 / 14)
    # scores deviate by -2/3 -2/3 4/3, targets by -2 -1 3
    assert found["correlation"] == pytest.approx(6 / math.sqrt(8 / 3 * 14))
    perfect = regression_report(targets, targets, "abc")
    assert (perfect["mse"], perfect["r2"], perfect["correlation"]) == pytest.approx((0, 1, 1))
    constant = regression_report(scores, torch.ones(3), "abc")
    assert constant["r2"] is constant["correlation"] is None


def broken(scores: Tensor) -> Tensor:
    return scores * float("nan")


REPORTS = {
    "pairs": pair_report(PAIRS),
    "no numbers": pair_report(replace(PAIRS, chosen=broken(PAIRS.chosen))),
    "rankings": ranking_report([ranking([3, 2, 2], [1, 2, 3])]),
    "nothing ranked": ranking_report([]),
    "labels": label_report(PAIRS.chosen, torch.tensor([1, 0, 1, 0]), "abcd"),
    "numbers": regression_report(PAIRS.chosen, torch.zeros(4), "abcd"),
}


@pytest.mark.parametrize("name", REPORTS)
def test_reports_are_json_and_can_be_said(name: str) -> None:
    report: dict[str, Any] = REPORTS[name]
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert of_scores(figures(report), "scores").startswith("scores " * (name != "nothing ranked"))


def test_what_is_undefined_is_no_number() -> None:
    found = figures(REPORTS["no numbers"])
    assert math.isnan(found["eval/loss"]) and "eval/by_group" not in found


def test_a_calibration_is_read_back_to_be_drawn() -> None:
    for report in (REPORTS["pairs"], REPORTS["labels"]):
        found = calibration_of(report)
        assert found.error == report["calibration_error"]
        assert [each.count for each in found.bins] == [1, 1, 1, 1]
    nothing = REPORTS["no numbers"]
    assert nothing["loss"] is nothing["calibration_error"] is None
    assert math.isnan(calibration_of(nothing).error)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pairs", "right on 0.62 ± 0.19 of 4 held-out pairs, a coin on 0.5: too few rows"),
        ("rankings", "order 1 held-out rankings with a Kendall tau of "),
        ("labels", "right on 0.38 ± 0.21 of 4 held-out labels, the more frequent label on 0.5"),
        ("numbers", "miss 4 held-out targets by a squared error of "),
    ],
)
def test_what_is_said_of_scores(name: str, said: str) -> None:
    assert said in of_scores(figures(REPORTS[name]), "scores")
