"""Label folders on the page of runs: sealed, not sealed, damaged and hostile ones."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.errors import RunError
from rlhf_cli.labelling.desk import events_file
from rlhf_cli.reporting.grid import with_error
from rlhf_cli.views.charts import Figure
from rlhf_cli.views.label_policies import ratings, wins
from rlhf_cli.views.label_tasks import HIDDEN, verdict
from rlhf_cli.views.labels import anchors, beliefs, biases, selected
from rlhf_cli.views.report import report, runs_at
from tests.labelling.test_label import given, label, read, typed
from tests.views.test_html import HOSTILE, Reader
from tests.views.test_unknown_figures import UNKNOWN, drawn, seen_on_page, without

POLICIES = ("runs/plain-sft", "runs/better-ppo")
TWO = ["policy=null", "annotators=[ana,bob]", "algo.overlap=1", "algo.repeat=0.25"]


def made(folder: Path, *more: str, count: int = 8) -> Path:
    """A sealed folder that a reward has labelled, with errors."""
    words = [given(folder / "s.jsonl", count, 2, POLICIES), *TWO, "source=reward", "flip=0.25"]
    return label(folder / "label", *words, *more)


def set_of(page: str) -> dict[str, Any]:
    """The tasks as the browser of samples reads them."""
    (tasks,) = json.loads(Reader(page).scripts[0])["samples"]
    return dict(tasks)


def test_a_sealed_folder_tells_who_said_what_and_how_policies_fare(tmp_path: Path) -> None:
    out = made(tmp_path)
    words, figures = seen_on_page(out)
    found = json.loads((out / "report.json").read_text())
    assert f"{found['labels']} labels; 8 tasks; protocol rank; source reward" in words
    for who in ("ana", "bob"):
        assert re.search(rf"{who}\s+10\s+10\s+0\s+0\s+0", words)
    between = found["between_annotators"]
    assert f"{between['decided']:.3f}" in words and f"{between['alpha']:.3f}" in words
    assert f"{found['flips']['planted']:.3f}" in words
    bias = found["bias"]["longer_wins"]
    interval = f"{bias['low']:.3f} to {bias['high']:.3f}"
    assert re.search(rf"the longer one\s+{bias['share']:.3f} \({interval}\)", words)
    won = found["win_rates"]["runs/better-ppo"]["runs/plain-sft"]
    equal = with_error(won["at_equal_length"]["mean"], won["at_equal_length"]["stderr"])
    share = f"{won['win'] + won['tie'] / 2:.3f} \\({won['low']:.3f} to {won['high']:.3f}\\)"
    assert re.search(rf"better-ppo over plain-sft\s+{share}\s+{won['tie']:.3f}\s+{equal}", words)
    rows = {row["name"]: row for row in drawn(figures["ratings.0"])}
    ppo = found["ratings"]["runs/better-ppo"]
    assert (rows["better-ppo"]["value"], rows["better-ppo"]["low"]) == (ppo["rating"], ppo["low"])
    assert ("Not separable at 8 tasks" in words) == (not ppo["above"])


def test_all_tasks_can_be_read_with_every_answer(tmp_path: Path) -> None:
    out = made(tmp_path)
    shown = set_of(report(runs_at([out]), "t"))
    assert shown["beside"] and {each["of"] for each in shown["sources"]} == set(POLICIES)
    tasks = {task["prompt"]: task for task in read(out / "tasks.jsonl")}
    events = [each for who in ("ana", "bob") for each in read(events_file(out, who))]
    for entry in shown["prompts"]:
        task = tasks[entry["prompt"][0]["text"]]
        own = [each for each in events if each["task"] == task["task"]]
        answers = {
            each["text"]: (shown["sources"][int(source)]["of"], each)
            for source, given_ in entry["answers"].items()
            for each in given_
        }
        for place, response in enumerate(task["responses"]):
            policy, answer = answers[response]
            assert policy == task["origins"][place]["policy"]
            said = {
                each["annotator"] + ", once more" * each["showing"]: f"rank {each['ranks'][place]}"
                for each in own
            }
            assert dict(answer["said"]) == said
            first = [each["ranks"] for each in own if not each["showing"]]
            won = [rank > ranks[place] for ranks in first for rank in ranks if rank != ranks[place]]
            assert answer["won"] == pytest.approx(sum(won) / len(won), abs=1e-5)
        ranks = {tuple(each["ranks"]) for each in own if not each["showing"]}
        agree = "annotators agree" if len(ranks) == 1 else "annotators disagree"
        assert entry["marks"] == [agree]


def test_what_is_not_sealed_tells_what_is_left_and_not_who_wrote_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [given(tmp_path / "s.jsonl", 8, 2, POLICIES), *TWO, "algo.protocol=pair"]
    typed(monkeypatch, "1", "5", "s no idea", "m odd", "f a phone number")
    with pytest.raises(RunError, match="4 of 20 labels"):
        label(tmp_path / "label", *words)
    page = report(runs_at([tmp_path / "label"]), "t")
    said, _ = seen_on_page(tmp_path / "label")
    assert "Not sealed: 4 of 20 labels are there; left: ana 6, bob 10." in said
    assert re.search(r"ana\s+10\s+4\s+6\s+1\s+1", said)
    shown = set_of(page)
    assert [each["name"] for each in shown["sources"]] == [HIDDEN]
    beside = [
        {name: value for name, value in answer.items() if name != "text"}  # which name them here
        for entry in shown["prompts"]
        for answer in entry["answers"]["0"]
    ]
    assert all(each.keys() <= {"said", "won"} for each in beside)
    assert not any(policy in said for policy in POLICIES)
    told = [line for entry in shown["prompts"] for line in entry.get("said", [])]
    assert told == ["ana skipped it: no idea", "ana flagged it: a phone number", "ana noted: odd"]
    marks = [mark for entry in shown["prompts"] for mark in entry.get("marks", [])]
    assert marks.count("skipped or flagged") == 2 and marks.count("not labelled yet") == 4


def test_which_answers_are_known_is_not_told_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = tmp_path / "known.jsonl"
    known.write_text(json.dumps({"prompt": "k", "chosen": "good", "rejected": "bad"}))
    words = [given(tmp_path / "s.jsonl", 3, 1, POLICIES), "policy=null", f"known={known}"]
    words += ["algo.protocol=pair", "algo.repeat=0"]

    def marks() -> list[str]:
        entries = set_of(report(runs_at([tmp_path / "label"]), "t"))["prompts"]
        return [mark for entry in entries for mark in entry.get("marks", [])]

    typed(monkeypatch, "1")
    with pytest.raises(RunError, match="1 of 4 labels"):
        label(tmp_path / "label", *words)
    assert set(marks()) == {"not labelled yet"}
    typed(monkeypatch, *"111")
    label(tmp_path / "label", *words)
    assert marks() == ["its answer is known"]


@pytest.mark.parametrize(
    ("event", "verdicts"),
    [
        ({"ranks": [2, 1, 2]}, ["rank 2, tied", "rank 1", "rank 2, tied"]),
        ({"ranks": [2, 1], "strength": 3, "both_bad": False}, ["worse", "better, strength 3"]),
        ({"ranks": [1, 1], "strength": 0, "both_bad": False}, ["tie", "tie"]),
        ({"ranks": [1, 1], "strength": 0, "both_bad": True}, ["both bad", "both bad"]),
        ({"label": True}, ["good"]),
        ({"first_wrong": 2}, ["step 2 is the first wrong one"]),
        (
            {"ranks": [1, 2], "ratings": [6, 2], "marks": [[], ["harmful_advice"]]},
            ["rank 1, 6 of 7", "rank 2, 2 of 7, harmful advice"],
        ),
    ],
)
def test_answers_in_words(event: dict[str, Any], verdicts: list[str]) -> None:
    assert [verdict(event, place) for place in range(len(verdicts))] == verdicts


@pytest.mark.parametrize("protocol", ["rank", "thumbs"])
def test_figures_that_are_not_known_are_left_out(tmp_path: Path, protocol: str) -> None:
    out = made(tmp_path, f"algo.protocol={protocol}")
    words, figures = seen_on_page(out)
    assert ("liked.0" in figures) == (protocol == "thumbs")
    known = json.loads((out / "report.json").read_text())
    for lost in ("low", "rating", "up", "alpha", ""):
        left = without(known, lambda name, lost=lost: lost in ("", name))  # type: ignore[misc]
        (out / "report.json").write_text(json.dumps(left))
        words, figures = seen_on_page(out)
        assert not UNKNOWN.search(words)
        assert not any(UNKNOWN.search(json.dumps(drawn(each))) for each in figures.values())


def test_figures_of_ratings_anchors_and_choices() -> None:
    rate = {"share": 0.75, "stderr": 0.1, "outcomes": 8}
    found = {
        "anchors": {
            "same": {"agreement": 0.5, "outcomes": 8},
            "runs": [{"out": "r1", "rates": {"a over b": rate}}, {"out": "now", "rates": {}}],
        },
        "scores": {"x/a": {"score": 6.5, "ratings": 4, "marks": {"opinion": 0.25, "sexual": 0.0}}},
        "contradictions": {"share": 0.125, "pairs": 8},
        "selected": {"random": {"tasks": 3, "labels": 2}, "gap": {"tasks": 7, "labels": 6}},
    }
    page = anchors(found) + ratings(found) + selected(found)
    words = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    assert "as before 0.5 8 a over b, r1 0.75 ± 0.10 8" in words
    assert "policy rating ratings opinion a 6.5 4 0.250" in words
    assert "lower rating in 0.125 of the pairs" in words and "gap 7 6" in words


def test_figures_of_a_judge_and_a_reward_beside_people() -> None:
    bins = [{"low": 0.5, "high": 0.55, "confidence": 0.53, "accuracy": 0.5, "count": 9}]
    belief = {"brier": 0.2, "brier_stderr": 0.01, "pairs": 9, "calibration_error": 0.03}
    sure = {"calibration": {**belief, "calibration_bins": bins}}
    won = {"win": 0.5, "tie": 0.5, "loss": 0.0, "low": 0.6, "high": 0.8, "pairs": 4}
    equal = {"at_equal_length": {"mean": 0.5, "stderr": 0.1}}
    longer = {"share": 0.75, "low": 0.5, "high": 0.9, "pairs": 8}
    found = {
        "win_rates": {"x/a": {"x/b": won}},
        "with_reward": {**sure, "longer_wins": longer, "win_rates": {"x/a": {"x/b": won | equal}}},
        "judge": {**sure, "win_rates": {"x/a": {"x/b": won}}},
    }
    titles: list[str] = []

    def drawn_as(figures: Sequence[Figure | None]) -> str:
        titles.extend(each.title for each in figures if each)
        return ""

    page = beliefs(found, drawn_as) + biases(found) + wins(found)
    words = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    assert "the judge 0.200 ± 0.010 0.030 9 the reward 0.200 ± 0.010 0.030 9" in words
    assert titles == ["judge: calibration error 0.030", "reward: calibration error 0.030"]
    assert "the longer one, by the reward 0.750 (0.500 to 0.900) 8" in words
    assert "a over b 0.750 (0.600 to 0.800) 0.500 – 4" in words
    assert "a over b, by the reward 0.750 (0.600 to 0.800) 0.500 0.50 ± 0.10 4" in words
    assert "a over b, by the judge" in words


@pytest.mark.parametrize("lost", ["report.json", "tasks.jsonl", "config.yaml", "events-ana.jsonl"])
def test_what_is_lost_of_a_folder_is_left_out(tmp_path: Path, lost: str) -> None:
    out = made(tmp_path)
    (out / lost).write_text("{" if lost != "config.yaml" else "# rlhf-cli label\nalgo: 3\n")
    words, _ = seen_on_page(out)
    assert re.search(r"\bana\s+10\b", words)  # by what is left: the figures, or the answers


def test_what_labels_hold_is_never_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = HOSTILE.replace("\ud800", "")  # no row has halves of characters
    row = {"prompt": hostile, "policy": hostile}
    lines = [json.dumps({**row, "response": f"{hostile}{i}"}) for i in range(2)]
    (tmp_path / "s.jsonl").write_text("\n".join(lines))
    typed(monkeypatch, f"m {hostile}", f"f {hostile}")
    words = [f"samples={tmp_path / 's.jsonl'}", "policy=null", "algo.protocol=pair"]
    with pytest.raises(RunError, match="nothing to seal"):
        label(tmp_path / "label", *words)
    read_page = Reader(report(runs_at([tmp_path / "label"]), "t"))
    assert "img" not in {tag for tag, _ in read_page.tags}
    assert all("alert(1)" not in text for text in read_page.scripts[1:])
    (entry,) = json.loads(read_page.scripts[0])["samples"][0]["prompts"]
    assert entry["said"][0] == f"me flagged it: {hostile}"
