"""What most of several labels say, worked by hand."""

import itertools
from typing import Any

import pytest

from rlhf_cli.labelling.majority import by_majority
from rlhf_cli.labelling.rows import rows_of
from rlhf_cli.labelling.tasks import Sample, Task, task_of


def task(count: int, steps: int = 0) -> Task:
    made = task_of([Sample("p", f"r{i}", "", {"policy": f"by {i}"}) for i in range(count)])
    return Task(**{**vars(made), "steps": [f"s{i}" for i in range(steps)]})


def event(kind: str, who: str = "ana", **said: Any) -> dict[str, Any]:
    return {"kind": kind, "annotator": who, "source": "file", "instructions": None, **said}


def rows(kind: str, asked: Task, *said: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    events = [event(kind, f"a{number}", **each) for number, each in enumerate(said)]
    return rows_of(by_majority([(asked, each) for each in events]), kind)


def pairs(made: dict[str, list[dict[str, Any]]]) -> list[str]:
    return [f"{row['chosen']} > {row['rejected']}" for row in made["preferences.jsonl"]]


def test_a_pair_goes_by_more_than_half_and_has_the_margin_of_those() -> None:
    first, second = {"ranks": [1, 2]}, {"ranks": [2, 1], "strength": 4}
    tie = {"ranks": [1, 1], "strength": 0}
    made = rows("pair", task(2), {**first, "strength": 1}, {**first, "strength": 4}, second)
    (row,) = made["preferences.jsonl"]
    assert (row["chosen"], row["margin"], row["votes"]) == ("r0", 0.5, 3)
    assert row["annotator"] == ["a0", "a1", "a2"] and "strength" not in row
    assert pairs(rows("pair", task(2), {**first, "strength": 1}, second)) == []  # split
    assert pairs(rows("pair", task(2), {**first, "strength": 1}, second, tie)) == []
    assert pairs(rows("pair", task(2), {**first, "strength": 2}, tie, tie)) == []


def test_what_a_review_settled_is_told_of_the_row() -> None:
    said = {"ranks": [1, 2], "strength": 2}
    for reviewed in ((True, True), (True, False)):
        events = [{**said, "reviewed": True} if each else said for each in reviewed]
        (row,) = rows("pair", task(2), *events)["preferences.jsonl"]
        assert row.get("reviewed", False) == all(reviewed)


def test_pairs_that_run_in_a_circle_stay_and_tie_in_the_ranking() -> None:
    circle = [{"ranks": ranks} for ranks in ([1, 2, 3, 4], [3, 1, 2, 4], [2, 3, 1, 4])]
    made = rows("rank", task(4), *circle)
    assert made["rankings.jsonl"][0]["ranks"] == [1, 1, 1, 2]
    assert {*pairs(made)} == {*("r0 > r1", "r1 > r2", "r2 > r0", "r0 > r3", "r1 > r3", "r2 > r3")}


@pytest.mark.parametrize("ranks", [*itertools.product((1, 2, 3), repeat=3)])
def test_whoever_has_a_majority_alone_keeps_their_ranking(ranks: tuple[int, ...]) -> None:
    if {*ranks} != {*range(1, max(ranks) + 1)}:
        return
    made = rows("rank", task(3), *[{"ranks": list(ranks)}] * 2, {"ranks": [3, 2, 1]})
    assert made["rankings.jsonl"][0]["ranks"] == list(ranks)


def test_thumbs_that_are_split_make_no_row() -> None:
    up, down = {"label": True}, {"label": False}
    assert rows("thumbs", task(1), up, down)["feedback.jsonl"] == []
    (row,) = rows("thumbs", task(1), up, down, down)["feedback.jsonl"]
    assert row["label"] is False
    (row,) = rows("thumbs", task(1), up)["feedback.jsonl"]
    assert row["annotator"] == "a0" and "votes" not in row  # alone it is as it was


def test_steps_are_right_as_far_as_most_say() -> None:
    made = rows("steps", task(1, 4), {"first_wrong": 2}, {"first_wrong": None}, {"first_wrong": 4})
    assert made["stepwise.jsonl"][0]["labels"] == [1, 1, 1, 0]
    made = rows("steps", task(1, 4), {"first_wrong": 2}, {"first_wrong": 4})
    row = made["stepwise.jsonl"][0]
    assert (row["labels"], row["first_wrong"]) == ([1, 0.5, 0.5, 0], 4)


def test_ratings_are_averaged_and_marks_counted() -> None:
    said = [
        {"ranks": [1, 2], "ratings": [7, 2], "marks": [["opinion"], ["sexual"]]},
        {"ranks": [1, 2], "ratings": [6, 1], "marks": [["opinion"], []]},
    ]
    made = rows("instructgpt", task(2), *said)
    assert [row["score"] for row in made["feedback.jsonl"]] == [6.5, 1.5]
    assert [row["opinion"] for row in made["feedback.jsonl"]] == [True, False]
    assert not made["feedback.jsonl"][1]["sexual"] and pairs(made) == ["r0 > r1"]
