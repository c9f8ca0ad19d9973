"""The stage as a user runs it: by lines, by rewards with planted errors, from a file."""

import importlib
import io
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.data.kinds import Feedback, Preference, Ranking
from rlhf_cli.data.rows import Rows
from rlhf_cli.labelling.desk import desks_of
from rlhf_cli.labelling.draws import pool_of
from rlhf_cli.labelling.policies import liked, points_of, rated
from rlhf_cli.labelling.report import bias_of
from rlhf_cli.labelling.rows import rows_of
from rlhf_cli.labelling.selection import chosen
from rlhf_cli.labelling.tasks import Sample, Task, dealt, samples_of_file, task_of, writers_of
from rlhf_cli.reporting.trackers.outlets import Trackers
from rlhf_cli.runs.data_checks import check_data
from rlhf_cli.runs.out_files import what_is_kept
from rlhf_cli.runs.out_folder import state_of
from rlhf_cli.runs.preflight import preflight
from tests.tiny import DATA

WORDS = [*(word for word in DATA if "eval" not in word), "algo.prompts=4"]


def label(out: Path, *more: str) -> Path:
    cfg: Any = compose("label", [*more, f"out={out}"])
    made: Path = importlib.import_module("rlhf_cli.stages.label").run(cfg)
    return made


def tasks_of(samples: list[Sample], *words: str) -> tuple[list[Task], dict[str, int]]:
    algo: Any = compose("label", list(words)).algo
    pool, dropped = pool_of(samples, algo, 0)
    return chosen(pool, algo, [], 0), dropped


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def given(file: Path, count: int = 6, k: int = 3, policies: tuple[str, ...] = ("x", "y")) -> str:
    """samples=FILE: responses to prompts, each with a reward."""
    draw = random.Random(0)
    rows = [
        {"prompt": f"p{i}", "response": f"{policy} says {i}{j}", "policy": policy}
        | {"reward": number + draw.random()}
        for i in range(count)
        for number, policy in enumerate(policies)
        for j in range(k)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"samples={file}"


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_people_label_stop_and_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = {"prompt": "p", "response": "\x1b]0;owned\x07 <b>", "policy": "secret-name"}
    file = tmp_path / "samples.jsonl"
    words = [given(file, 4), "policy=null", "algo.repeat=0.25", "algo.overlap=0"]
    with file.open("a") as stream:
        stream.write(json.dumps(evil) + "\n" + json.dumps({**evil, "response": "other"}) + "\n")
    out = tmp_path / "out"
    typed(monkeypatch, "1 2 3 4", "u", "4=3 2 1", "what", "2 1", "s", "m why not")
    with pytest.raises(RunError, match="of 6 labels are kept"):
        label(out, *words)
    shown = capsys.readouterr().err
    assert "\x1b" not in shown and "secret-name" not in shown and "'what' is none of" in shown
    before = (out / "events-me.jsonl").read_bytes()
    assert not (out / "rankings.jsonl").exists() and not (out / "stage.json").exists()
    (out / "events-me.jsonl").write_bytes(before + b'{"task": "torn')  # killed as it wrote
    done = [each["kind"] for each in read_events(out)]
    left = 6 - (len(done) - 2 * done.count("undo"))
    answers = ["1 2 3 4", "1 2"]  # one of the two fits each task
    typed(monkeypatch, *(answers * left))
    label(out, *words)
    assert (out / "events-me.jsonl").read_bytes().startswith(before)
    events = [each for each in read_events(out) if each["kind"] == "rank"]
    manifest = json.loads((out / "stage.json").read_text())
    assert manifest["kind"] == "labels" and manifest["metrics"]["left"] == 0
    assert {each["showing"] for each in events} == {0, 1}
    cfg = compose("reward", ["data=jsonl", f"data.path={out / 'rankings.jsonl'}"])
    rows = Rows(cfg.data).split(Ranking)
    assert [*rows.train, *rows.held_out][0].columns["annotator"] == "me"
    with pytest.raises(UserError, match="overwrite=true would remove"):
        state_of(compose("generate", ["overwrite=true", f"out={out}"]))  # nor another stage
    with pytest.raises(UserError, match="overwrite=true would remove"):
        label(out, *words, "overwrite=true")


def read_events(out: Path) -> list[dict[str, Any]]:
    lines = (out / "events-me.jsonl").read_bytes().splitlines()
    return [json.loads(line) for line in lines if line.endswith(b"}")]


def test_an_answer_reads_the_order_that_was_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, *["1"] * 20)
    words = ["policy=null", "algo.protocol=pair", "algo.repeat=0"]
    out = label(tmp_path / "out", given(tmp_path / "s.jsonl", 20, 1), *words)
    tasks = {row["task"]: row for row in read(out / "tasks.jsonl")}
    assert {tuple(each["shown"]) for each in read(out / "events-me.jsonl")} == {(0, 1), (1, 0)}
    for event, row in zip(
        read(out / "events-me.jsonl"), read(out / "preferences.jsonl"), strict=True
    ):
        task = tasks[event["task"]]
        assert row["chosen"] == task["responses"][event["shown"][0]]
        assert row["policies"][0] == task["origins"][event["shown"][0]]["policy"]
        assert (row["strength"], row["margin"]) == (4, 1.0)
    cfg = compose("dpo", ["data=jsonl", f"data.path={out / 'preferences.jsonl'}"])
    pairs = Rows(cfg.data).split(Preference)
    assert {pair.margin for pair in [*pairs.train, *pairs.held_out]} == {1.0}


def test_a_review_changes_nothing_of_the_errors_that_were_planted(tmp_path: Path) -> None:
    words = [given(tmp_path / "s.jsonl", 20, 1), "policy=null", "source=reward", "algo.repeat=0"]
    words += ["annotators=[one,two]", "algo.overlap=1", "flip=0.25", "algo.protocol=pair"]
    out = label(tmp_path / "out", *words)
    before = json.loads((out / "report.json").read_text())["flips"]
    for desk in desks_of(compose("label", [*words, f"out={out}"])).values():
        for turn, event in desk.own:
            desk.review(turn, {**event, "ranks": event["ranks"][::-1]})
    (out / "stage.json").unlink()
    report = json.loads((label(out, *words) / "report.json").read_text())
    assert report["reviewed"] == 40 and report["flips"] == before


def test_planted_errors_are_recovered_and_policies_keep_their_order(tmp_path: Path) -> None:
    words = [given(tmp_path / "s.jsonl", 400, 1, ("a", "b", "c")), "policy=null", "source=reward"]
    more = ["algo.prompts=null", "annotators=[one,two]", "algo.overlap=1", "flip=0.25"]
    monkey = label(tmp_path / "out", *words, *more, "algo.repeat=0")
    report = json.loads((monkey / "report.json").read_text())
    flips, bias = report["flips"], report["bias"]
    assert flips["recovered"] == pytest.approx(flips["planted"], abs=0.05)
    assert flips["planted"] == pytest.approx(0.25, abs=0.03) and flips["chance"] == 0.25
    assert not bias  # all are equally long, and a reward sees no order
    agreement = report["between_annotators"]
    assert agreement["agreement"] == pytest.approx(0.625, abs=3 * agreement["stderr"])
    assert agreement["stderr"] == pytest.approx((0.625 * 0.375 / 400) ** 0.5, rel=0.1)
    assert agreement["alpha"] == pytest.approx(0.25, abs=0.1)
    points = [report["ratings"][name]["rating"] for name in "abc"]
    assert points == sorted(points) and report["ratings"]["c"]["above"] == ["a", "b"]
    assert points[2] == 0  # the last one is what others are rated by


def said_of_pair(prompt: str, source: str = "page", **said: Any) -> tuple[Task, dict[str, Any]]:
    """An answer to a pair of which the second one, by b, is longer and better."""
    made = task_of([Sample(prompt, f"{by}{prompt}", "", {"policy": by}) for by in ("a", "bb")])
    shown = {"kind": "pair", "ranks": [2, 1], "shown": [1, 0], "source": source}
    return made, {**shown, **said}


def test_what_was_shown_first_is_known_of_those_who_saw_it_here() -> None:
    sources = ("page", "terminal", "file", "reward")
    found = bias_of([said_of_pair(f"p{source}", source) for source in sources])
    assert found["first_shown_wins"]["pairs"] == 2 and found["first_shown_wins"]["share"] == 1
    assert found["longer_wins"]["pairs"] == 4
    assert all(each["low"] < 1 == each["high"] for each in found.values())


@pytest.mark.parametrize(
    ("prompts", "tasks", "apart"), [(5, 1, False), (1, 8, False), (3, 3, False), (6, 1, True)]
)
def test_policies_are_told_apart_by_prompts_and_not_by_tasks(
    prompts: int, tasks: int, apart: bool
) -> None:
    """Where one wins all, as a coin may on few prompts."""
    answers = [said_of_pair(f"p{i}") for i in range(prompts) for _ in range(tasks)]
    answers = [
        (replace(task, id=f"{number}"), event) for number, (task, event) in enumerate(answers)
    ]
    found = rated(answers, 0)
    assert found is not None and bool(found["bb"]["above"]) == apart
    assert found["a"]["rating"] < found["bb"]["rating"] == 0


def test_prompts_that_were_asked_are_not_asked_again(tmp_path: Path) -> None:
    """Of one file, and of a message list; a prompt with a space more is the same."""
    words = ["policy=null", "source=reward", given(tmp_path / "s.jsonl", 6, 1)]
    first = label(tmp_path / "one", *words, "algo.prompts=null")
    known = read(first / "tasks.jsonl")[:4]
    (tmp_path / "asked.jsonl").write_text(
        "".join(json.dumps({"prompt": f" {task['prompt']}"}) + "\n" for task in known)
    )
    second = label(tmp_path / "two", *words, f"asked=[{tmp_path}/asked.jsonl]")
    prompts = {task["prompt"] for task in read(second / "tasks.jsonl")}
    assert prompts == {f"p{i}" for i in range(6)} - {task["prompt"] for task in known}
    inputs = json.loads((second / "stage.json").read_text())["inputs"]
    assert inputs["asked[0]"]["path"] == f"{tmp_path}/asked.jsonl"
    asked = f"asked=[{first}/tasks.jsonl]"
    with pytest.raises(UserError, match="each of 12 rows has a prompt that was asked before"):
        label(tmp_path / "three", *words, asked)
    (tmp_path / "asked.jsonl").write_text('{"question": "p1"}\n')
    with pytest.raises(UserError, match=r"asked.jsonl:1: needs a prompt"):
        label(tmp_path / "four", *words, f"asked=[{tmp_path}/asked.jsonl]")
    with pytest.raises(UserError, match="asked=nowhere.jsonl does not exist"):
        label(tmp_path / "five", *words, "asked=[nowhere.jsonl]")


def test_a_round_samples_from_new_prompts_only(
    tmp_path: Path, chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(chain)
    words = [*WORDS, "policy=runs/demo/sft", "source=reward", "reward=length:2"]
    first = label(tmp_path / "one", *words)
    second = label(tmp_path / "two", *words, f"asked=[{first}/tasks.jsonl]")
    before, after = (
        {task["prompt"] for task in read(out / "tasks.jsonl")} for out in (first, second)
    )
    assert len(before) == len(after) == 4 and not before & after


def test_samples_of_policies_are_scored_and_agree_with_the_reward(
    inside: None, tmp_path: Path
) -> None:
    words = [*WORDS, "source=reward", "reward=length:2", "baselines=[runs/demo/adapter]"]
    out = label(tmp_path / "out", *words, "algo.samples=2")
    tasks = read(out / "tasks.jsonl")
    assert {each["policy"] for task in tasks for each in task["origins"]} == {
        *("runs/demo/sft", "runs/demo/adapter")
    }
    for task, row in zip(
        sorted(tasks, key=lambda each: each["task"]),
        sorted(read(out / "rankings.jsonl"), key=lambda each: each["task"]),
        strict=True,
    ):
        rewards = [origin["reward"] for origin in task["origins"]]
        order = sorted(range(len(rewards)), key=lambda i: -rewards[i])
        assert [row["ranks"][i] for i in order] == sorted(row["ranks"])
    assert not (out / "samples.jsonl").is_symlink()
    assert label(tmp_path / "out", *words, "algo.samples=2") == out  # nothing to do


def test_labels_of_a_file(tmp_path: Path) -> None:
    labels, out = tmp_path / "labels.jsonl", tmp_path / "out"
    words = [given(tmp_path / "s.jsonl", 3, 1), "policy=null", "source=file", f"labels={labels}"]
    words += ["algo.protocol=thumbs", "algo.repeat=0", "annotators=[ana]"]
    with pytest.raises(RunError, match=r"tasks\.jsonl has the tasks"):
        label(out, *words)
    tasks = read(out / "tasks.jsonl")
    rows: list[dict[str, Any]] = [{"task": each["task"], "label": True} for each in tasks]
    rows[0] = {"task": tasks[0]["task"], "flag": "a phone number"}
    rows[1] = {"task": tasks[1]["task"], "kind": "skip", "reason": "odd"}  # as events have it
    labels.write_text(json.dumps({**rows[1], "annotator": "bob"}))
    with pytest.raises(UserError, match="labels.jsonl:1: annotator is 'bob'"):
        label(out, *words)
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    label(out, *words)
    cfg = compose("dpo", ["algo=kto", "data=jsonl", f"data.path={out / 'feedback.jsonl'}"])
    feedback = Rows(cfg.data).split(Feedback)
    assert len(feedback.train) + len(feedback.held_out) == len(tasks) - 2  # flagged, and skipped
    left_out = [each for each in read(out / "events-ana.jsonl") if "reason" in each]
    assert {each["reason"] for each in left_out} == {"a phone number", "odd"}


def test_labels_of_a_file_may_change_until_they_are_sealed(tmp_path: Path) -> None:
    labels, out = tmp_path / "labels.jsonl", tmp_path / "out"
    words = [given(tmp_path / "s.jsonl", 3, 1), "policy=null", "source=file", f"labels={labels}"]
    words += ["algo.protocol=thumbs", "algo.repeat=0", "annotators=[ana]"]
    with pytest.raises(RunError, match="is not there yet"):
        label(out, *words)
    rows = [{"task": each["task"], "label": True} for each in read(out / "tasks.jsonl")]

    def write(*said: dict[str, Any]) -> None:
        labels.write_text("".join(json.dumps(row) + "\n" for row in said))

    write(*rows[:2])
    for _ in range(2):  # what was kept is not kept again
        with pytest.raises(RunError, match=f"2 of {len(rows)} labels are kept"):
            label(out, *words)
    write({**rows[0], "label": False}, *rows[1:])  # a mistake is mended, and all are there
    label(out, *words)
    assert len(read(out / "events-ana.jsonl")) == len(rows) + 1
    said = {row["task"]: row["label"] for row in read(out / "feedback.jsonl")}
    assert said == {row["task"]: row is not rows[0] for row in rows}
    assert label(out, *words) == out  # nothing to do
    write(*rows)
    with pytest.raises(UserError, match=r"made from another labels .*labels.jsonl has changed"):
        label(out, *words)
    with pytest.raises(UserError, match="name another out$"):
        preflight(compose("label", [*words, f"out={out}"]), check_only=True)


def test_a_label_file_of_odd_rows_is_named(tmp_path: Path) -> None:
    labels, out = tmp_path / "labels.jsonl", tmp_path / "out"
    words = [given(tmp_path / "s.jsonl"), "policy=null", "source=file", f"labels={labels}"]
    labels.write_text(json.dumps({"task": "x", "annotator": ["me"], "ranks": [1, 2]}))
    with pytest.raises(UserError, match=r"labels.jsonl:1: annotator is \['me'\]"):
        label(out, *words)


@pytest.mark.parametrize("prompt", [["a text"], [{"role": "user"}], []])
def test_a_prompt_that_is_no_dialogue_is_named(tmp_path: Path, prompt: Any) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text(2 * (json.dumps({"prompt": prompt, "response": "x"}) + "\n"))
    with pytest.raises(UserError, match=r"samples.jsonl:1: column 'prompt'"):
        samples_of_file(str(file))


@pytest.mark.parametrize("column", ["prompt", "response", "policy"])
def test_half_a_character_is_named(tmp_path: Path, column: str) -> None:
    row = {"prompt": "a", "response": "b", "policy": "c", column: "x\ud800"}
    file = tmp_path / "samples.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"samples.jsonl:1: column '{column}' holds half"):
        samples_of_file(str(file))


def test_instructions_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    file = tmp_path / "told.md"
    file.write_bytes(b"\xff\xfe")
    words = [given(tmp_path / "s.jsonl"), "policy=null", f"instructions={file}"]
    with pytest.raises(UserError, match=r"instructions=.*told.md cannot be read"):
        label(tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_what_is_being_labelled_is_named_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [given(tmp_path / "samples.jsonl", 4), "policy=null"]
    typed(monkeypatch, "1 2 3 4")
    with pytest.raises(RunError, match="1 of 4 labels"):
        label(out, *words)
    assert what_is_kept(out) == "4 tasks"
    shown = capsys.readouterr().err
    assert f"responses: those of samples={tmp_path}" in shown and "prompts x" not in shown
    for place in (out, out / "preferences.jsonl"):
        data = ["data=jsonl", f"data.path={place}"]
        for stage in ("reward", "dpo"):
            with pytest.raises(UserError, match=f"data.path={place}: {out} is labelled still"):
                check_data(compose(stage, data))
    for pattern in ("o*/rankings.jsonl", "o*", "out/rank*.jsonl", "*/*.jsonl"):  # left out of none
        with pytest.raises(UserError, match="is labelled still"):
            check_data(compose("reward", ["data=jsonl", f'data.path="{tmp_path}/{pattern}"']))
    (tmp_path / "o[1].jsonl").write_text("{}\n")
    for pattern in ("sam*.jsonl", "*.jsonl", "o[1].jsonl"):
        check_data(compose("reward", ["data=jsonl", f'data.path="{tmp_path}/{pattern}"']))
    check_data(compose("generate", ["data=jsonl", f"data.path={out / 'tasks.jsonl'}"]))
    shutil.rmtree(out / "checkpoints")  # the tasks are all that is needed
    typed(monkeypatch, *["1 2 3 4"] * 3)
    label(out, *words)
    for place in (out / "preferences.jsonl", out / "p*.jsonl"):
        check_data(compose("reward", ["data=jsonl", f"data.path={place}"]))
    for place in (out, tmp_path / "ou?"):
        with pytest.raises(UserError, match="its rows, .*/rankings.jsonl or .*/preferences.jsonl$"):
            check_data(compose("reward", ["data=jsonl", f"data.path={place}"]))


def test_trackers_hear_of_a_label_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    monkeypatch.setattr(Trackers, "start", lambda self, about: begun.append(about.id))
    monkeypatch.setattr(Trackers, "finish", lambda self, figures: begun.append("end"))
    monkeypatch.setattr("rlhf_cli.runs.preflight.check_packages", lambda trackers: None)
    words = [given(tmp_path / "samples.jsonl"), "policy=null", "source=reward"]
    label(tmp_path / "out", *words, "tracker=tensorboard")
    assert len(begun) == 2 and begun[1] == "end"


@pytest.mark.parametrize("key", ["samples", "instructions"])
def test_a_file_that_is_not_there_is_named_before_anything_runs(tmp_path: Path, key: str) -> None:
    words = [given(tmp_path / "s.jsonl"), "policy=null", f"{key}={tmp_path / 'none.jsonl'}"]
    with pytest.raises(UserError, match=f"{key}=.*none.jsonl does not exist"):
        label(tmp_path / "out", *words)


def test_tasks_are_distinct_and_take_policies_in_turn() -> None:
    samples = [
        Sample("p", text, "", {"policy": policy})
        for policy, texts in {"a": "uvwx", "b": "uyz "}.items()
        for text in texts
    ]
    tasks, dropped = tasks_of([*samples, Sample("q", "one", "", {})])
    (task,) = tasks
    assert dropped == {"empty": 1, "identical": 1, "prompts": 1}
    assert sorted(origin["policy"] for origin in task.origins) == ["a", "a", "b", "b"]
    assert len(set(task.responses)) == 4
    assert len(tasks_of(samples, "algo.protocol=thumbs")[0]) == 6


def test_a_text_that_several_wrote_counts_for_each_of_them() -> None:
    said = {"a": ["same", "own a"], "b": ["same", "own b"], "c": ["same", "own c", "same"]}
    samples = [Sample("p", text, "", {"policy": name}) for name in said for text in said[name]]
    (task,), dropped = tasks_of(samples)
    assert dropped["identical"] == 3
    place = task.responses.index("same")
    assert writers_of(task.origins[place]) == ["a", "b", "c"]
    best = [task.responses.index(text) for text in ("own c", "same", "own b", "own a")]
    event = {"kind": "rank", "ranks": [best.index(i) + 1 for i in range(4)]}
    # between a and b: same ties same, same beats own b, own a loses to same and to own b
    assert points_of(task, event, ["a", "b", "c"]).tolist() == [
        [0.0, 1.5, 0.5],
        [2.5, 0.0, 0.5],
        [3.5, 3.5, 0.0],
    ]
    about = {"annotator": "me", "source": "file", "instructions": None}
    (row,) = rows_of([(task, {**event, **about})], "rank")["rankings.jsonl"]
    assert row["policies"][place] == "a, b, c" and sorted(map(len, row["policies"])) == [1, 1, 1, 7]
    (thumb,) = [
        each for each in tasks_of(samples, "algo.protocol=thumbs")[0] if "same" in each.responses
    ]
    assert liked([(thumb, {"kind": "thumbs", "label": True})]).keys() == {"a", "b", "c"}


def test_every_task_is_dealt() -> None:
    samples = [Sample(f"p{i}", text, "", {}) for i in range(40) for text in "ab"]
    tasks, _ = tasks_of(samples, "algo.protocol=pair")
    turns = dealt(tasks, ["ana", "bob", "eve"], 0.25, 0.1, 3)
    first = {who: [turn.task.id for turn in own if not turn.showing] for who, own in turns.items()}
    every = [task for own in first.values() for task in own]
    assert len(set(every)) == 40 and sum(every.count(task) == 3 for task in set(every)) == 10
    assert len(every) == 30 + 3 * 10
    for who, own in turns.items():
        again = [turn.task.id for turn in own if turn.showing]
        assert set(again) <= set(first[who]) and len(again) == round(0.1 * len(first[who]))
    shared = set(first["ana"]) & set(first["bob"])
    orders = {
        who: [turn.order for turn in own if turn.task.id in shared] for who, own in turns.items()
    }
    assert orders["ana"] != orders["bob"]
    assert dealt(tasks, ["ana", "bob", "eve"], 0.25, 0.1, 3) == turns


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["annotators=[a,a]"], "name each once"),
        (["annotators=['../x']"], "names a file"),
        (["annotators=[a]", "who=b"], "who=b is none of"),
        (["source=reward"], "source=reward needs reward"),
        (["source=file"], "source=file needs labels"),
        (["flip=0.1"], "flip is not used by source=terminal"),
        (["port=8000"], "port=8000 is that of a page"),
        (["algo.protocol=pair", "algo.responses=3"], "algo.responses is not used by algo.protocol"),
        (["policy=null"], "policy=null needs samples"),
        (["samples=s.jsonl", "baselines=[x]"], "baselines are sampled from"),
        (["data=jsonl", "data.path=-"], "data.path=-"),
        (["hardware.processes=2"], "one process labels"),
    ],
)
def test_what_does_not_go_together_is_said(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        compose("label", words)
