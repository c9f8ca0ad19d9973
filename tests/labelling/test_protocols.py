"""Ratings with marks, and first wrong steps: as typed, as kept, and as reward reads them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.data.kinds import Feedback, Stepwise
from rlhf_cli.data.readers import as_row
from rlhf_cli.labelling.agreement import between_people
from rlhf_cli.labelling.answers import Wrong, as_typed, fault_of, rating, read
from rlhf_cli.labelling.outcomes import outcomes_of
from rlhf_cli.labelling.rows import rows_of
from rlhf_cli.labelling.tasks import STEPS, Sample, Task, Turn, task_of
from tests.labelling.test_label import WORDS, given, label, typed
from tests.labelling.test_label import read as rows_in


def samples(file: Path, *texts: str) -> str:
    rows = [{"prompt": "p", "response": text, "policy": f"by {text[:1]}"} for text in texts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"samples={file}"


def turn(order: list[int], steps: tuple[str, ...] = ()) -> Turn:
    made = task_of([Sample("p", f"r{i}", "", {}) for i in range(len(order))])
    return Turn(Task(**{**vars(made), "steps": list(steps)}), 0, order)


def test_ratings_are_kept_by_the_places_of_the_task() -> None:
    answer = read("6 h o\n2\n4 x\n2=1 3", turn([2, 0, 1]), "instructgpt")
    assert answer["ratings"] == [2, 4, 6] and answer["ranks"] == [1, 2, 1]
    assert answer["marks"] == [[], ["sexual"], ["hallucination", "opinion"]]
    assert as_typed(answer) == "2\n4 x\n6 h o\n1=3 2"
    again = read(as_typed(answer), turn([0, 1, 2]), "instructgpt")
    assert again == answer and fault_of(answer, "instructgpt", turn([0, 1, 2]).task) is None


@pytest.mark.parametrize("line", ["", "0", "8", "6.5", "h", "6 q", "6 hh", "\u0666"])
def test_what_is_no_rating_is_refused(line: str) -> None:
    with pytest.raises(Wrong):
        rating(line)


@pytest.mark.parametrize(
    ("text", "protocol"),
    [
        *(("6\n1 2", "instructgpt"), ("6\n5\n4\n1 2", "instructgpt"), ("1 2", "instructgpt")),
        *(("4", "steps"), ("-1", "steps"), ("x", "steps"), ("1 2", "steps"), ("", "steps")),
    ],
)
def test_what_answers_something_else_is_refused(text: str, protocol: str) -> None:
    with pytest.raises(Wrong):
        read(text, turn([0, 1], ("a", "b", "c")), protocol)


RATED: dict[str, Any] = {
    "kind": "instructgpt",
    "ranks": [1, 2],
    "ratings": [7, 1],
    "marks": [[], ["opinion"]],
}


@pytest.mark.parametrize(
    "answer",
    [
        {**RATED, "ratings": [7]},
        {**RATED, "ratings": [0, 1]},
        {**RATED, "ratings": [7, True]},
        {**RATED, "ratings": None},
        {**RATED, "marks": [[]]},
        {**RATED, "marks": [[], ["h"]]},
        {**RATED, "marks": [[], None]},
        {**RATED, "ranks": [1, 3]},
        {"kind": "steps"},
        *({"kind": "steps", "first_wrong": each} for each in (0, 4, True, "1")),
    ],
)
def test_what_a_file_says_is_looked_at(answer: dict[str, Any]) -> None:
    task = turn([0, 1], ("a", "b", "c")).task
    assert fault_of(answer, answer["kind"], task) is not None


def test_responses_are_rated_in_a_terminal_and_a_step_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [samples(tmp_path / "s.jsonl", "a", "b"), "policy=null", "algo.repeat=0"]
    words += ["algo.protocol=instructgpt"]
    typed(monkeypatch, "6 h", "u", "5 h o", "3 ?", "3", "1 1", "u", "2", "m well", "2 1")
    out = label(tmp_path / "out", *words)
    shown = capsys.readouterr().err
    assert "response 2: 1 to 7" in shown and "'?' is none of the marks" in shown
    (event,) = rows_in(out / "events-me.jsonl")
    first, second = event["shown"]
    assert (event["ratings"][first], event["ratings"][second]) == (5, 2)
    assert event["ranks"][second] == 1 and event["note"] == "well"
    rows = {row["completion"]: row for row in rows_in(out / "feedback.jsonl")}
    texts = rows_in(out / "tasks.jsonl")[0]["responses"]
    said = rows[texts[first]]
    assert (said["score"], said["hallucination"], said["violent"]) == (5, True, False)
    assert said["policies"] == [f"by {texts[first]}"] and said["note"] == "well"
    (pair,) = rows_in(out / "preferences.jsonl")
    assert pair["chosen"] == texts[second] and rows_in(out / "rankings.jsonl")
    as_read = [as_row(row, "") for row in rows.values()]
    assert {row.score for row in as_read if isinstance(row, Feedback)} == {5.0, 2.0}
    report = json.loads((out / "report.json").read_text())
    assert report["scores"][f"by {texts[first]}"]["score"] == 5
    assert report["contradictions"] == {
        "share": 1.0,
        "pairs": 1,
    }  # ranked above, rated below


def test_steps_are_labelled_up_to_the_first_wrong_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ("One. Two.  Three", "All right", "Wrong. So far")
    words = [samples(tmp_path / "s.jsonl", *texts), "policy=null", "algo.repeat=0"]
    words += ["algo.protocol=steps"]
    wrong = {"O": "2", "A": "0", "W": "1"}
    with pytest.raises(RunError, match="0 of 3"):
        typed(monkeypatch, "9")
        label(tmp_path / "out", *words)
    assert "'9' is no step from 1 to" in capsys.readouterr().err
    for _ in texts:
        shown = capsys.readouterr().err
        typed(monkeypatch)
        with pytest.raises(RunError):
            label(tmp_path / "out", *words)
        shown = capsys.readouterr().err
        now = next(text for text in texts if f"1: {text.split('. ')[0]}" in shown)
        typed(monkeypatch, wrong[now[0]])
        try:
            out = label(tmp_path / "out", *words)
        except RunError:
            continue
    rows = {row["steps"][0]: row for row in rows_in(out / "stepwise.jsonl")}
    assert rows["One."]["labels"] == [1, 0, 0] and rows["One."]["first_wrong"] == 2
    assert rows["All right"]["labels"] == [1] and rows["All right"]["first_wrong"] is None
    assert rows["Wrong."]["labels"] == [0, 0]
    assert " ".join(rows["One."]["steps"]) == texts[0]
    assert all(isinstance(as_row(row, ""), Stepwise) for row in rows.values()) and len(rows) == 3
    report = json.loads((out / "report.json").read_text())
    assert report["ratings"]["by A"]["up"] == 1 and report["ratings"]["by W"]["up"] == 0


def test_no_wrong_step_lies_behind_the_last_one() -> None:
    """By ordinal alpha a solution that is right differs less from one that fails at its end."""

    def alpha(*said: tuple[int | None, int | None]) -> float:
        tasks = [replace(turn([0]).task, id=str(number)) for number in range(len(said))]
        events = [
            [
                (task, {"kind": "steps", "first_wrong": each[who]})
                for task, each in zip(tasks, said, strict=True)
            ]
            for who in (0, 1)
        ]
        found = between_people([*map(outcomes_of, events)], STEPS, 0)
        assert found is not None
        return float(found["alpha_ordinal"])

    agreed = [(step, step) for step in (1, 2, 3, 4, None)]
    assert alpha(*agreed) == 1
    assert alpha(*agreed, (4, None)) > alpha(*agreed, (3, None)) > alpha(*agreed, (1, None))


JUDGE = """
def right(steps):
    with open(__file__ + ".asked", "a") as file:
        file.write("".join(f"{each}\\n" for each in steps))
    return [[-1.0 if "wrong" in step else 1.0 for step in each] for each in steps]
def fails(steps):
    return [[1.0 / (len(step) - len(step)) for step in each] for each in steps]
"""


def test_a_reward_that_judges_steps_labels_them(inside: None, tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text(JUDGE)
    words = [samples(tmp_path / "s.jsonl", "One\nIs wrong\nThree", "One\nTwo"), *WORDS[:-1]]
    words += ["algo.protocol=steps", "source=reward"]
    out = label(tmp_path / "out", *words, f"reward={judge}:right")
    assert sorted(row["first_wrong"] or 0 for row in rows_in(out / "stepwise.jsonl")) == [0, 2]
    for reward, said in (("length:3", "reward=length:3 judges"), ("null", "that judges steps")):
        with pytest.raises(UserError, match=said):
            label(tmp_path / "other", *words, f"reward={reward}")
    asked = (tmp_path / "judge.py.asked").read_text().splitlines()
    assert len(asked) == len(set(asked)) == 2  # each response once
    with pytest.raises(RunError, match="no task has a label"):  # a step that fails is not right
        label(tmp_path / "failed", *words, f"reward={judge}:fails")
    with pytest.raises(UserError, match="source=reward has none"):
        compose("label", ["algo.protocol=instructgpt", "source=reward", "reward=length:3"])


def test_steps_that_a_reward_has_judged_are_kept(
    inside: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text(JUDGE)
    words = [*WORDS, "algo.samples=1", "algo.protocol=steps", f"reward={judge}:right"]
    words += ["policy=runs/demo/sft", "source=reward"]

    def dying(*task: Any) -> None:
        raise RunError("killed")

    with monkeypatch.context() as patch, pytest.raises(RunError, match="killed"):
        patch.setattr("rlhf_cli.stages.label.write_tasks", dying)
        label(tmp_path / "out", *words)
    out = label(tmp_path / "out", *words)
    assert len((tmp_path / "judge.py.asked").read_text().splitlines()) == 4
    assert len(rows_in(out / "stepwise.jsonl")) == len(rows_in(out / "tasks.jsonl")) > 1


def test_ratings_and_steps_of_a_file(tmp_path: Path) -> None:
    labels, out = tmp_path / "labels.jsonl", tmp_path / "out"
    words = [given(tmp_path / "s.jsonl", 1, 1), "policy=null", "source=file", f"labels={labels}"]
    words += ["algo.protocol=instructgpt", "algo.repeat=0"]
    with pytest.raises(RunError, match="ranks, ratings, marks, skip or flag"):
        label(out, *words)
    (task,) = rows_in(out / "tasks.jsonl")
    said = {"task": task["task"], "ranks": [2, 1], "ratings": [1, 7]}
    labels.write_text(json.dumps(said))
    with pytest.raises(UserError, match="labels.jsonl:1: marks are not a list"):
        label(out, *words)
    labels.write_text(json.dumps({**said, "marks": [["violent"], []]}))
    label(out, *words)
    assert [row["violent"] for row in rows_in(out / "feedback.jsonl")] == [True, False]


def test_beside_what_a_judge_believes_a_person_is_certain() -> None:
    """So rows of a folder that a person has reviewed are soft labels as a whole."""
    about = {"annotator": "", "source": "judge", "instructions": ""}
    task = task_of([Sample("p", text, "", {"policy": text}) for text in ("x", "y")])
    judged = {"ranks": [2, 1], "p": [0.2], **about}
    reviewed = {"ranks": [1, 2], "reviewed": True, **about}

    def chances(*events: dict[str, Any]) -> list[float | None]:
        made = rows_of([(task, event) for event in events], "pair")["preferences.jsonl"]
        return [row.get("p") for row in made]

    assert chances(judged, reviewed) == [0.8, 1.0]
    assert chances(reviewed) == [None]
