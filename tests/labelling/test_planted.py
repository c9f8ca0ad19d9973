"""Tasks with known answers, and anchors: in everybody's turns, in no row, and in the report."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.labelling.planted import known_tasks
from rlhf_cli.labelling.tasks import Sample, Task, dealt, task_of
from tests.labelling.test_label import given, label, read

KNOWN: list[dict[str, Any]] = [
    {"prompt": "k0", "chosen": "good", "rejected": "bad"},
    {"prompt": "k1", "responses": ["bad", "good"], "ranks": [2, 1]},
    {"prompt": "k2", "responses": ["bad", "good", "good too"], "ranks": [5, 1, 1]},
]


def written(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_known_answers_are_those_of_the_rows(tmp_path: Path) -> None:
    file = written(tmp_path / "known.jsonl", KNOWN)
    tasks = known_tasks(file, "rank", "\n")
    assert [task.known for task in tasks] == [
        *({"ranks": [1, 2]}, {"ranks": [2, 1]}, {"ranks": [2, 1, 1]})
    ]
    with pytest.raises(UserError, match="known.jsonl:3: algo.protocol=pair needs"):
        known_tasks(file, "pair", "\n")
    file = written(tmp_path / "up.jsonl", [{"prompt": "p", "completion": "c", "label": False}])
    assert known_tasks(file, "thumbs", "\n")[0].known == {"label": False}
    with pytest.raises(UserError, match="up.jsonl:1: algo.protocol=steps needs prompt, steps"):
        known_tasks(file, "steps", "\n")
    steps = {"prompt": "p", "steps": ["a", "b", "c"], "labels": [1, 0, 1]}
    (task,) = known_tasks(written(tmp_path / "s.jsonl", [steps]), "steps", "\n")
    assert task.known == {"first_wrong": 2} and task.responses == ["a\nb\nc"]


def test_planted_tasks_go_to_everybody_once_and_are_mixed_in() -> None:
    plain = [task_of([Sample(f"p{i}", text, "", {}) for text in "ab"]) for i in range(40)]
    planted = [Task(f"k{i}", "p", ["a", "b"], [{}, {}], "", known={}) for i in range(8)]
    before = dealt(plain, ["ana", "bob"], 0.25, 0.5, 3)
    turns = dealt([*plain, *planted], ["ana", "bob"], 0.25, 0.5, 3)
    for who, own in turns.items():
        ids = [turn.task.id for turn in own]
        assert all(ids.count(task.id) == 1 for task in planted)
        places = [ids.index(task.id) for task in planted]
        assert min(places) < 15 and max(places) > 15  # not all at one end
        others = [turn.task.id for turn in own if not turn.task.planted]
        assert len(others) == len(before[who])
        assert {*others} == {turn.task.id for turn in before[who]}


def test_the_report_tells_who_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = written(tmp_path / "known.jsonl", KNOWN[:2])
    words = [given(tmp_path / "s.jsonl", 4, 1), "policy=null", f"known={known}", "algo.repeat=0"]
    words += ["algo.protocol=pair", "source=file", f"labels={tmp_path / 'labels.jsonl'}"]
    words += ["annotators=[ana,bob]", "algo.overlap=1"]
    out = tmp_path / "out"
    with pytest.raises(Exception, match="is not there yet"):
        label(out, *words)
    tasks = read(out / "tasks.jsonl")
    assert len(tasks) == 6
    rows = []
    for who in ("ana", "bob"):
        for task in tasks:
            ranks = task.get("known", {"ranks": [1, 2]})["ranks"]
            right = who == "ana" or task["prompt"] != "k1"
            said = {"ranks": ranks if right else [1, 1]}
            rows.append({"task": task["task"], "annotator": who, **said})
    written(tmp_path / "labels.jsonl", rows)
    label(out, *words)
    report = json.loads((out / "report.json").read_text())
    shares = {who: each["known"]["right"] for who, each in report["annotators"].items()}
    assert shares == {"ana": 1.0, "bob": 0.5}
    assert "bob is right on 0.50 ± 0.50 of 2 known outcomes" in capsys.readouterr().err
    assert report["labels"] == 8 and report["between_annotators"]["agreement"] == 1
    prompts = {row["prompt"] for row in read(out / "preferences.jsonl")}
    assert prompts == {"p0", "p1", "p2", "p3"}


def test_anchors_go_on_from_run_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """First y is above x, then half of the time, then never."""
    before = None
    for number, wins in enumerate((1.0, 0.5, 0.0)):
        out, labels = tmp_path / f"out{number}", tmp_path / f"labels{number}.jsonl"
        folder = tmp_path / str(number)
        folder.mkdir()
        words = [given(folder / "s.jsonl", 6, 1), "policy=null", "algo.repeat=0", "source=file"]
        words += ["algo.protocol=pair", f"labels={labels}", f"seed={number}"]
        if before is not None:
            words += [f"anchors={before}", "algo.anchor_tasks=4"]
        with pytest.raises(Exception, match="is not there yet"):
            label(out, *words)
        tasks = read(out / "tasks.jsonl")
        anchors = [task for task in tasks if "earlier" in task]
        assert len(anchors) == (0 if before is None else 4)
        assert all(len(task["earlier"]) == number for task in anchors)
        best = [task["task"] for task in anchors or tasks]
        rows = []
        for task in tasks:
            y = task["origins"][1]["policy"] == "y"
            won = task["task"] not in best or best.index(task["task"]) < wins * len(best)
            rows.append({"task": task["task"], "ranks": [2, 1] if y == won else [1, 2]})
        written(labels, rows)
        label(out, *words)
        before = out
    report = json.loads((tmp_path / "out2" / "report.json").read_text())
    rates = [run["rates"]["x over y"]["share"] for run in report["anchors"]["runs"]]
    assert rates == [0.0, 0.5, 1.0]
    assert report["anchors"]["same"]["agreement"] == 0.5 and report["anchors"]["tasks"] == 4
    assert report["labels"] == 2  # of six tasks, four of which are anchors
    assert "anchors: x over y: 0 " in capsys.readouterr().err
    with pytest.raises(UserError, match="is no finished output of label"):
        label(tmp_path / "z", given(tmp_path / "s.jsonl"), "policy=null", f"anchors={tmp_path}")


def test_a_reward_has_nothing_to_learn_of_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="known is not used by source=reward"):
        compose("label", ["source=reward", "reward=length:3", "known=x.jsonl"])
    with pytest.raises(UserError, match="algo.anchor_tasks is not used by anchors=null"):
        compose("label", ["algo.anchor_tasks=3"])
