"""Figures of labels against numbers worked by hand: agreement, belief, wins, the pull of length."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlhf_cli.labelling.agreement import agreement_of, between_people, calibration_of
from rlhf_cli.labelling.outcomes import Asked, Outcomes, outcomes_of, said_of
from rlhf_cli.labelling.policies import meetings_of, rated, win_rates
from rlhf_cli.labelling.report import with_reward
from rlhf_cli.labelling.summary import alpha_with_ends, table_of
from rlhf_cli.labelling.tasks import Sample, Task, task_of
from rlhf_cli.objectives.comparisons import length_controlled

FIRST, SECOND, TIE = [1, 2], [2, 1], [1, 1]
Answer = tuple[Task, dict[str, Any]]


def ranked(prompt: str, texts: tuple[str, ...], ranks: list[int], **origin: list[Any]) -> Answer:
    """An answer to a task; `origin` has a list of what is known of each response."""
    origins = [{name: each[i] for name, each in origin.items()} for i in range(len(texts))]
    samples = [Sample(prompt, text, "", own) for text, own in zip(texts, origins, strict=True)]
    return task_of(samples), {"kind": "rank", "ranks": ranks}


def test_several_tasks_of_a_prompt_are_one_cluster() -> None:
    """On p they agree in 0 of 2, on q in 1 of 1: both sums are 2/3 off their part of the mean."""
    keys = [Asked("p", "t1", 0, 1), Asked("p", "t2", 0, 1), Asked("q", "t3", 0, 1)]
    ours, theirs = dict.fromkeys(keys, 1.0), dict(zip(keys, (0.0, 0.0, 1.0), strict=True))
    found = agreement_of([(ours, theirs)])
    assert found is not None and found["agreement"] == pytest.approx(1 / 3)
    assert found["stderr"] == pytest.approx(math.sqrt(2 * (4 / 9 + 4 / 9)) / 3)
    assert (found["outcomes"], found["tasks"], found["prompts"]) == (3, 3, 2)
    assert found["decided_low"] < 1 / 3 < found["decided_high"]
    alone = agreement_of([(dict.fromkeys(keys[:2], 1.0), dict.fromkeys(keys[:2], 1.0))])
    assert alone is not None and "stderr" not in alone  # one prompt tells no error


def test_agreement_does_not_depend_on_which_response_a_task_names_first() -> None:
    answers = [FIRST, FIRST, FIRST, TIE], [FIRST, FIRST, SECOND, FIRST]
    turned = {1: SECOND, 2: FIRST}

    def said(turns: set[int]) -> list[Outcomes]:
        return [
            outcomes_of(
                ranked(f"p{i}", ("x", "y"), turned[r[0]] if i in turns and r != TIE else r)
                for i, r in enumerate(each)
            )
            for each in answers
        ]

    found = [between_people(said(turns), "rank", 0) for turns in (set(), {0}, {1, 3}, {0, 2, 3})]
    assert all(each == found[0] for each in found) and found[0] is not None
    assert found[0]["alpha_low"] <= found[0]["alpha"] <= found[0]["alpha_high"]
    assert alpha_with_ends(found[0]).startswith(f"{found[0]['alpha']:.2f}, ")
    agreed = between_people([said(set())[1]] * 2, "rank", 0)
    assert agreed is not None and (agreed["alpha"], agreed["alpha_low"]) == (1, None)
    assert alpha_with_ends(agreed) == "1.00"


def test_belief_by_hand() -> None:
    """Judged with p = 3/4 by one who agrees and one who does not, and with 1/10 by one who ties."""
    one, two = Asked("p", "t1", 0, 1), Asked("q", "t2", 0, 1)
    said = [{one: 1.0, two: 0.5}, {one: 0.0}]
    found = calibration_of(said, {one: math.log(3), two: -math.log(9)})
    assert found is not None and (found["pairs"], found["prompts"]) == (3, 2)
    assert found["brier"] == pytest.approx((0.25**2 + 0.75**2 + 0.4**2) / 3)
    assert found["calibration_error"] == pytest.approx(2 / 3 * 0.25 + 1 / 3 * 0.4)
    assert [each["count"] for each in found["calibration_bins"]] == [2, 1]
    other = calibration_of(
        [{one: 0.0, two: 0.5}, {one: 1.0}], {one: -math.log(3), two: math.log(9)}
    )
    assert other is not None and other["brier"] == pytest.approx(found["brier"])
    assert other["calibration_error"] == pytest.approx(found["calibration_error"])
    assert calibration_of(said, {}) is None
    coin = calibration_of(said, {one: 0.0})
    assert coin is not None and (coin["brier"], coin["calibration_error"]) == (0.25, 0.0)


def test_wins_by_hand() -> None:
    """a wins on p and once in two tasks of q, which count as one prompt; what both wrote ties."""
    tasks = [
        ranked("p", ("aa", "b"), FIRST, policy=["a", "b"]),
        ranked("q", ("bb", "a"), SECOND, policy=["b", "a"]),
        ranked("q", ("a2", "b"), SECOND, policy=["a", "b"]),
        ranked("r", ("c", "d"), FIRST, policy=["a", "c"], writers=[["a", "b"], ["c"]]),
    ]
    found = win_rates(met for task, event in tasks for met in meetings_of(task, said_of(event)))
    assert {one: list(others) for one, others in found.items()} == {"a": ["b", "c"], "b": ["c"]}
    won = found["a"]["b"]
    assert (won["win"], won["tie"], won["loss"]) == pytest.approx((0.5, 1 / 3, 1 / 6))
    assert won["pairs"] == 4 and won["low"] < 2 / 3 < won["high"]
    longer = torch.tensor([1.0, -1.0, 1.0, 0.0])
    equal = length_controlled(torch.tensor([1.0, 1.0, 0.0, 0.5]), longer, ["p", "q", "q", "r"])
    assert won["at_equal_length"] == pytest.approx({"mean": equal.mean, "stderr": equal.stderr})
    assert found["b"]["c"]["win"] == found["a"]["c"]["win"] == 1


def test_a_reward_beside_people() -> None:
    """It is told by the pairs that they judged; probabilities only where it has any."""
    task, event = ranked("p", ("long", "x"), FIRST, policy=["a", "b"], reward=[0.5, 1.0])
    unseen = replace(ranked("q", ("s", "much longer"), FIRST, reward=[0, 1])[0], id="unseen")
    said = [outcomes_of([(task, event)])]
    found = with_reward(said, [task, unseen], "rank", None)
    assert found is not None and found["agreement"] == 0 and "calibration" not in found
    assert (found["longer_wins"]["share"], found["longer_wins"]["pairs"]) == (0, 1)
    assert found["win_rates"]["a"]["b"]["loss"] == 1
    scaled = with_reward(said, [task, unseen], "rank", 2.0)
    assert scaled is not None
    assert scaled["calibration"]["brier"] == pytest.approx((1 - 1 / (1 + math.e)) ** 2)
    assert scaled["calibration"]["calibration_error"] == pytest.approx(1 / (1 + math.exp(-1)))
    assert with_reward(said, [unseen], "rank", 2.0) is None


def test_a_rating_of_one_prompt_has_no_interval() -> None:
    """Redrawn it is the same prompt again and again; the last policy has 0 by definition."""
    task, event = ranked("p", ("x", "y"), FIRST, policy=["a", "b"])
    (first, last) = table_of({"ratings": rated([(task, event)], 0)})
    assert first[0] == "a" and first[2:] == ("unknown", "none")
    assert last == ("b", 0, "0 to 0", "none")
