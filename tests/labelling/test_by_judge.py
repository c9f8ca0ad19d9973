"""A language model as labeller, against endpoints that are biased, broken or right on purpose."""

import json
import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.data.kinds import Preference
from rlhf_cli.data.rows import Rows
from rlhf_cli.labelling.by_judge import ranks_of
from rlhf_cli.labelling.desk import Desk, desks_of
from rlhf_cli.runs.kinship import kinship_lines
from rlhf_cli.runs.preflight import preflight
from tests.endpoints import ODD, FakeJudge
from tests.labelling.test_label import WORDS, given, label, read, typed

Fake = Callable[..., FakeJudge]


def quality(text: str) -> float:
    """What the fair judge goes by: y is better than x, and 2 than 1 than 0."""
    return 4.0 * text.startswith("y") + float(text[-1])


def fair(first: str, second: str) -> float:
    return quality(first) - quality(second)


def words_for(server: FakeJudge, folder: Path, *more: str, count: int = 6) -> list[str]:
    samples = given(folder / "samples.jsonl", count)
    asked = [f"judge={server.url}", "judge_model=fake", f"data.cache={folder}/cache"]
    return [samples, "policy=null", "source=judge", *asked, *more]


def report_in(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def test_worked_rankings_of_pairs() -> None:
    """r_i is the mean of l_ij over all j: (1 + 2) / 3, (-1 + 1) / 3 and (-2 - 1) / 3."""
    assert ranks_of([1.0, 2.0, 1.0], 3, 0.5) == [1, 2, 3]
    assert ranks_of([1.0, 2.0, 1.0], 3, 1.0) == [1, 1, 1]  # neighbours are 1 apart, not more
    assert ranks_of([-1.0, -2.0, -1.0], 3, 0.5) == [3, 2, 1]
    assert ranks_of([0.2, 3.0, 3.0], 3, 0.5) == [1, 1, 2]
    assert ranks_of([1.0, -1.0, 1.0], 3, 0.5) == [1, 1, 1]  # a circle says nothing
    for odds, ranks in ((0.6, [1, 2]), (0.5, [1, 1]), (-0.4, [1, 1]), (-0.6, [2, 1])):
        assert ranks_of([odds], 2, 0.5) == ranks  # of two it is the verdict on the pair


def test_ranks_by_a_judge_are_kept_with_how_sure_it_is(fake: Fake, tmp_path: Path) -> None:
    server = fake(lambda a, b: 1.5 + fair(a, b))  # a leaning to what is first falls out
    out = label(tmp_path / "out", *words_for(server, tmp_path))
    tasks = {each["task"]: each for each in read(out / "tasks.jsonl")}
    for event in read(out / "events-me.jsonl"):
        texts = tasks[event["task"]]["responses"]
        best = sorted(texts, key=quality, reverse=True)
        assert event["ranks"] == [1 + best.index(text) for text in texts]
        for (a, b), p, odds in zip(
            combinations(texts, 2), event["p"], event["log_odds"], strict=True
        ):
            assert p == pytest.approx(1 / (1 + math.exp(-fair(a, b))))
            assert odds == pytest.approx([fair(a, b) + 1.5, fair(a, b) - 1.5])
    rows = read(out / "preferences.jsonl")
    assert len(rows) == 6 * 6 and {row["labelled_by"] for row in rows} == {"judge"}
    for row in rows:
        gap = fair(row["chosen"], row["rejected"])
        assert row["p"] == pytest.approx(1 / (1 + math.exp(-gap))) and row["p"] > 0.5
    report = report_in(out)
    assert report["judge"]["calls"] == 2 * 36 == len(server.asked)
    assert report["with_themselves"] is None and not report["bias"]  # texts are equally long


def test_who_always_prefers_the_first_leaves_no_preference(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = fake(lambda a, b: 3.0)
    out = label(tmp_path / "out", *words_for(server, tmp_path, "algo.protocol=pair"))
    assert not (out / "preferences.jsonl").exists()
    report = report_in(out)
    assert report["ties"] == 1 and report["rows"] == {"preferences.jsonl": 0}
    assert report["judge"]["consistency"]["mean"] == 0
    assert report["judge"]["first_slot"]["mean"] == 1 and report["judge"]["longer_wins"] is None
    assert "warning: both orders agree in 0.00 of the pairs" in capsys.readouterr().err


def test_a_failure_is_no_tie_and_is_asked_again(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    works = False

    def verdict(a: str, b: str) -> float | None:
        return fair(a, b) if works or "says 3" not in a else None

    server = fake(verdict)
    words = words_for(server, tmp_path, "algo.protocol=pair")
    with pytest.raises(RunError, match="5 of 6 labels are kept; the same command goes on"):
        label(tmp_path / "out", *words)
    assert "judge: 1 tasks have no verdict and no label" in capsys.readouterr().err
    assert len(read(tmp_path / "out/events-me.jsonl")) == 5
    before, works = len(server.asked), True
    out = label(tmp_path / "out", *words)
    assert len(server.asked) <= before + 2 and len(read(out / "events-me.jsonl")) == 6
    report = report_in(out)
    assert (report["left"], report["judge"]["failed"]) == (0, 0)
    assert (report["judge"]["calls"], report["judge"]["cached"]) == (12, 0)

    before = len(server.asked)  # another folder of the same tasks asks nothing
    other = report_in(label(tmp_path / "other", *words))
    assert len(server.asked) == before and other["ratings"] == report["ratings"]
    assert (other["judge"]["calls"], other["judge"]["cached"]) == (0, 12)


def test_what_is_no_answer_is_no_verdict(fake: Fake, tmp_path: Path) -> None:
    """With status 200: it ends no run before all are asked, and none is taken for a tie."""
    server, odd = fake(fair), list(ODD)
    choose = server.choose
    server.choose = lambda text: odd.pop() if odd else choose(text)
    words = words_for(server, tmp_path, "algo.protocol=pair", "judge_concurrency=1", count=8)
    words += ["judge_prices=[1,10]", "judge_max_cost=1"]  # what they cost is not known
    with pytest.raises(RunError, match="of 8 labels are kept"):
        label(tmp_path / "out", *words)
    assert len(server.asked) == 16
    out = label(tmp_path / "out", *words)
    assert len(read(out / "preferences.jsonl")) == 8
    assert len(server.asked) == 16 + len(ODD)


@pytest.mark.parametrize("tokens", [b"1e999", b"-5", b'"many"'])
def test_what_is_no_number_of_tokens_is_no_verdict(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str], tokens: bytes
) -> None:
    """Else it ended the run in the middle, or gave back what was paid."""
    server = fake(fair)
    text = b'{"choices": [{"message": {"content": "[[A]]"}}], "usage": {"prompt_tokens": %s}}'
    server.choose = lambda asked: text % tokens
    words = words_for(server, tmp_path, "algo.protocol=pair", count=2)
    with pytest.raises(RunError, match="0 of 2 labels are kept"):
        label(tmp_path / "out", *words)
    shown = " ".join(capsys.readouterr().err.split())
    assert "usage.prompt_tokens is" in shown and "not a whole number of 0 or more" in shown


def test_what_may_be_paid_is_labelled_and_may_be_sealed(fake: Fake, tmp_path: Path) -> None:
    server = fake(fair)  # a call costs 120 millionths
    words = ["algo.protocol=pair", "judge_prices=[1,10]", "judge_concurrency=1"]
    asked = words_for(server, tmp_path, *words, count=70)
    with pytest.raises(RunError, match="judge_max_cost=0.016 is spent after 134 calls, and 6 are"):
        label(tmp_path / "out", *asked, "judge_max_cost=0.016")
    report = report_in(
        label(tmp_path / "out", *asked, "judge_max_cost=0.016", "accept_partial=true")
    )
    assert (report["labels"], report["left"], len(server.asked)) == (64, 6, 134)
    assert report["judge"]["cost"] == pytest.approx(134 * 120e-6)


def test_a_judge_that_has_left_is_not_waited_for_by_every_call(fake: Fake, tmp_path: Path) -> None:
    """70 tasks are 140 calls: 128 of the first 64 tasks, then it is gone."""
    server = fake(fair)
    asked = 0

    def verdict(text: str) -> dict[str, Any]:
        nonlocal asked
        asked += 1
        if asked == 128:
            server.end()
        return {"message": {"content": "A"}}

    server.choose = verdict
    words = ["algo.protocol=pair", "judge_timeout=1", "judge_concurrency=1"]
    words = words_for(server, tmp_path, *words, count=70)
    with pytest.raises(RunError, match="cannot be reached: .*judge_timeout=1 is over; verdicts so"):
        label(tmp_path / "out", *words)
    report = report_in(label(tmp_path / "out", *words, "accept_partial=true"))
    assert (report["labels"], report["left"]) == (64, 6)


def test_labels_of_people_do_not_wait_for_a_judge_that_has_left(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = fake(fair)
    words = words_for(server, tmp_path, "algo.protocol=pair", "judge_timeout=1", "algo.repeat=0")
    words += ["source=terminal"]
    server.end()
    typed(monkeypatch, *["1"] * 6)
    with pytest.raises(RunError, match="is over; .*; accept_partial=true seals without the judge"):
        label(tmp_path / "out", *words)
    report = report_in(label(tmp_path / "out", *words, "accept_partial=true"))
    assert report["rows"] == {"preferences.jsonl": 6} and "judge" not in report
    assert "sealed without the judge" in " ".join(capsys.readouterr().err.split())


def test_a_judge_beside_people(
    fake: Fake,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """People take what is shown first, of which the judge says nothing: it agrees by chance."""
    server = fake(fair)
    words = words_for(server, tmp_path, "algo.protocol=pair", "algo.repeat=0", count=20)
    typed(monkeypatch, *["1"] * 20)
    out = label(tmp_path / "out", *words, "source=terminal")
    report, rows = report_in(out), read(out / "preferences.jsonl")
    right = sum(fair(row["chosen"], row["rejected"]) > 0 for row in rows)
    found = report["with_judge"]
    assert found["agreement"] == pytest.approx(right / 20) == found["preferred"]["mean"]
    assert found["outcomes"] == found["decided_outcomes"] == 20
    assert report["judge"]["consistency"]["mean"] == 1 and len(server.asked) == 40
    odds = [fair(row["chosen"], row["rejected"]) for row in rows]
    belief = report["judge"]["calibration"]
    brier = sum((1 / (1 + math.exp(-each)) - 1) ** 2 for each in odds) / 20
    assert (belief["brier"], belief["pairs"]) == (pytest.approx(brier, rel=1e-5), 20)
    assert report["judge"]["win_rates"]["x"]["y"]["loss"] == 1  # y is better by it, to anybody
    assert report["win_rates"]["x"]["y"]["loss"] < 1
    assert all("p" not in row for row in rows)
    shown = capsys.readouterr().err
    assert ("as a coin may" in shown) == (found["preferred"]["low"] <= 0.5)
    assert "the judge agrees with them on" in shown
    assert "how sure the judge is: Brier score" in shown and "on 20 pairs" in shown
    manifest = json.loads((out / "stage.json").read_text())
    assert manifest["metrics"]["judge_agreement"] == pytest.approx(right / 20)

    (desk,) = desks_of(compose("label", [*words, "source=terminal", f"out={out}"])).values()
    for turn, event in desk.own:  # a review says otherwise
        ranks = event["ranks"][::-1]
        desk.review(turn, {"kind": "pair", "ranks": ranks, "strength": 4, "both_bad": False})
    (out / "stage.json").unlink()
    again = report_in(label(out, *words, "source=terminal"))
    assert again["reviewed"] == 20 and again["with_judge"] == found
    assert again["judge"]["calibration"] == belief

    label(tmp_path / "labelled", *words)  # what the judge has said there costs nothing here
    assert len(server.asked) == 40


def test_what_a_judge_said_before_tells_nothing_of_how_sure_it_may_be(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = words_for(fake(fair), tmp_path, "algo.protocol=pair", "algo.repeat=0")
    typed(monkeypatch, *["1"] * 6)
    people = label(tmp_path / "people", *words, "source=terminal", "judge=null", "judge_model=null")
    judged = label(tmp_path / "judged", *words)
    for before, pairs in ((people, 4), (judged, None)):
        more = [f"anchors={before}", "algo.anchor_tasks=4"]
        report = report_in(label(tmp_path / f"after-{before.name}", *words, *more))
        belief = report["judge"]["calibration"]
        assert report["anchors"]["tasks"] == 4 and (belief and belief["pairs"]) == pairs


def test_a_judge_is_told_by_what_it_said_of_what_was_drawn(fake: Fake, tmp_path: Path) -> None:
    """Neither a task with a known answer nor a review changes what it goes by."""
    server = fake(lambda a, b: 3.0 if a.startswith("known") else fair(a, b))
    known = tmp_path / "known.jsonl"
    known.write_text(json.dumps({"prompt": "k", "chosen": "known 1", "rejected": "known 0"}))
    words = words_for(server, tmp_path, "algo.protocol=pair", f"known={known}")
    out = label(tmp_path / "out", *words)
    report = report_in(out)
    assert report["judge"]["consistency"]["mean"] == 1 and report["judge"]["calls"] == 14
    belief = report["judge"]["calibration"]  # it goes by the order there: by neither, in the mean
    assert (belief["brier"], belief["pairs"]) == (0.25, 1)

    (desk,) = desks_of(compose("label", [*words, f"out={out}"])).values()
    turn = next(turn for turn in desk.turns if not turn.task.planted)
    tie = {"kind": "pair", "ranks": [1, 1], "strength": 0, "both_bad": True}
    Desk(out, desk.who, desk.turns, desk.terms).review(turn, tie)
    (out / "stage.json").unlink()
    again = report_in(label(out, *words))
    goes_by = ("consistency", "first_slot", "longer_wins", "failed")
    assert all(again["judge"][each] == report["judge"][each] for each in goes_by)
    assert again["reviewed"] == 1
    assert (report["rows"]["preferences.jsonl"], again["rows"]["preferences.jsonl"]) == (6, 5)


def test_principles_are_in_the_events(fake: Fake, tmp_path: Path) -> None:
    file = tmp_path / "principles.txt"
    file.write_text("Be kind.\nBe right.\n")
    server = fake(fair)
    out = label(tmp_path / "out", *words_for(server, tmp_path, f"principles={file}"))
    said = [each["principles"] for each in read(out / "events-me.jsonl")]
    assert {len(each) for each in said} == {6}
    assert {each for own in said for each in own} == {"Be kind.", "Be right."}
    asked = [body["messages"][0]["content"] for body in server.asked]
    for principle in ("Be kind.", "Be right."):
        count = sum(f"principle: {principle}" in text for text in asked)
        assert count == 2 * sum(own.count(principle) for own in said)
    assert not any("Be kind" in json.dumps(row) for row in read(out / "preferences.jsonl"))


def test_files_of_questions_are_looked_for_before_anything_runs(fake: Fake, tmp_path: Path) -> None:
    server = fake(fair)
    for key in ("judge_prompt", "principles"):
        words = words_for(server, tmp_path, f"{key}={tmp_path / 'none.txt'}")
        with pytest.raises(UserError, match=f"{key}=.*none.txt does not exist"):
            preflight(compose("label", [*words, f"out={tmp_path / 'out'}"]), check_only=True)


def test_a_policy_labels(inside: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, where it samples as well; it is told to be of the family."""
    question = tmp_path / "question.txt"
    question.write_text("{prompt}{first}|{second}: ")
    words = [*WORDS, "source=judge", "judge=runs/demo/sft", f"judge_prompt={question}"]
    words += ["algo.protocol=pair", "algo.samples=3", "judge_tie=0", f"data.cache={tmp_path}"]
    out = label(tmp_path / "out", *words)
    assert "warning: judge=runs/demo/sft and runs/demo/sft both come from" in (
        capsys.readouterr().err
    )
    events = read(out / "events-me.jsonl")
    assert events and all(0 < event["p"][0] < 1 for event in events)
    report = report_in(out)
    assert report["judge"]["calls"] == 2 * len(events)
    cfg = compose("dpo", ["data=jsonl", f"data.path={out / 'preferences.jsonl'}"])
    pairs = Rows(cfg.data).split(Preference)
    assert all(pair.p is not None for pair in [*pairs.train, *pairs.held_out])


@pytest.mark.usefixtures("inside")
def test_kinship_goes_by_the_weights_that_a_policy_began_with() -> None:
    def lines(*words: str) -> list[str]:
        return kinship_lines(compose("label", [*words, "data=demo"]))

    assert lines("policy=runs/demo/adapter", "judge=runs/demo/sft") == [
        "warning: judge=runs/demo/sft and runs/demo/adapter both come from runs/demo/sft: a judge "
        "may favour its own family"
    ]
    assert lines("policy=runs/demo/sft", "judge=runs/demo/adapter")
    assert not lines("policy=runs/demo/sft", "judge=http://x/v1", "judge_model=m")
    assert not lines("policy=runs/demo/sft")


def test_folders_that_were_made_anew_from_each_other_have_an_end(tmp_path: Path) -> None:
    for name, other in (("one", "two"), ("two", "one")):
        (tmp_path / name).mkdir()
        parents = {"policy": {"path": str(tmp_path / other), "hash": f"that of {other} then"}}
        said = {"stage": "dpo", "kind": "policy", "complete": True, "parents": parents}
        (tmp_path / name / "stage.json").write_text(json.dumps(said))
    words = [f"policy={tmp_path}/one", f"judge={tmp_path}/two", "data=demo"]
    assert "both come from" in kinship_lines(compose("label", words))[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["source=judge"], "source=judge needs judge=DIR"),
        (["source=judge", "judge=x", "algo.protocol=thumbs"], "take rank or pair"),
        (["source=judge", "judge=x", "annotators=[a,b]"], "one judge labels"),
        (["source=judge", "judge=x", "instructions=f"], "set instructions to null"),
        (["judge=http://x/v1"], "needs judge_model=NAME"),
        (["principles=f"], "principles is not used by judge=null"),
    ],
)
def test_what_does_not_go_together_is_said(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        compose("label", words)
