"""Language models as judges, against endpoints that are biased, broken or slow on purpose."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.config.schema.stages import EvaluateConfig
from rlhf_cli.evaluation.judge_asks import Endpoint, odds_of_tokens, verdict_of
from rlhf_cli.evaluation.judge_questions import Ask, Questions
from rlhf_cli.evaluation.pair_judge import (
    Pair,
    Text,
    agreement_with_people,
    agreement_with_scores,
    biases,
    cost_of,
    judged_pairs,
    judged_report,
    won,
)
from tests.endpoints import FakeJudge
from tests.evaluation.test_evaluate import evaluated


def config(url: str, folder: Path, *more: str) -> EvaluateConfig:
    words = [f"judge={url}", "judge_model=fake", f"data.cache={folder}", f"out={folder}/out", *more]
    cfg: Any = compose("evaluate", words)
    return cfg


def better(text: str) -> float:
    return float(text.count("good"))


PROMPTS = [f"prompt {i}" for i in range(8)]
GOOD = [Text(f"good {i}", 2) for i in range(8)]
BAD = [Text(f"bad {i} and longer", 4) for i in range(8)]


def report(cfg: EvaluateConfig) -> tuple[dict[str, Any], Counter[str]]:
    judge = Endpoint(cfg)
    texts = {name: [[text] for text in each] for name, each in (("ours", GOOD), ("theirs", BAD))}
    return judged_report(judge, PROMPTS, texts, "ours", cfg.judge_tie)[0], judge.counts


@pytest.mark.parametrize("in_words", [False, True])
def test_who_always_prefers_the_first_says_nothing(
    in_words: bool, fake: Callable[..., FakeJudge], tmp_path: Path
) -> None:
    """Its verdicts are ties of both orders, never preferences."""
    found, _ = report(config(fake(lambda a, b: 3.0, in_words=in_words).url, tmp_path))
    assert found["win_rates"]["theirs"]["tie"] == 1
    assert found["consistency"]["mean"] == 0 and found["first_slot"]["mean"] == 1
    assert found["longer_wins"] is None


def test_a_leaning_to_one_place_falls_out_of_the_mean(
    fake: Callable[..., FakeJudge], tmp_path: Path
) -> None:
    server = fake(lambda a, b: 2.0 + better(a) - better(b))  # 3 and 1 for ours, first and second
    found, counts = report(config(server.url, tmp_path))
    wins = found["win_rates"]["theirs"]
    assert (wins["win"], wins["pairs"], wins["failed"]) == (1, 8, 0)
    assert wins["preference"] == pytest.approx(1 / (1 + math.exp(-1.0)))
    assert found["consistency"]["mean"] == 0  # 2 + 1 for ours first, 2 - 1 against it second
    assert found["longer_wins"]["mean"] == 0
    assert counts["calls"] == 16 and cost_of(counts, [1.0, 10.0])["cost"] == pytest.approx(
        16 * (100 + 2 * 10) / 1e6
    )
    fair, _ = report(config(fake(lambda a, b: better(a) - better(b)).url, tmp_path))
    assert fair["consistency"]["mean"] == 1 and fair["first_slot"]["mean"] == 0.5
    assert fair["win_rates"]["theirs"]["preference"] == pytest.approx(wins["preference"])


def test_who_prefers_what_is_longer_is_found_out(
    fake: Callable[..., FakeJudge], tmp_path: Path
) -> None:
    server = fake(lambda a, b: float(len(a) - len(b)))
    found, _ = report(config(server.url, tmp_path))
    assert found["longer_wins"]["mean"] == 1 and found["win_rates"]["theirs"]["loss"] == 1


def test_answers_are_kept_for_other_runs_and_failures_are_not(
    fake: Callable[..., FakeJudge], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    works = False

    def verdict(a: str, b: str) -> float | None:
        return better(a) - better(b) if works or "3" not in a else None

    server = fake(verdict)
    cfg = config(server.url, tmp_path)
    found, counts = report(cfg)
    wins = found["win_rates"]["theirs"]
    assert (wins["win"], wins["tie"], wins["pairs"], wins["failed"]) == (1, 0, 7, 1)
    assert counts["calls"] == 14 and "judge: no verdict" in capsys.readouterr().err
    works = True
    found, counts = report(cfg)  # the same run, which goes on
    assert counts["calls"] == 16 and counts["cached"] == 0
    assert found["win_rates"]["theirs"]["failed"] == 0
    before = len(server.asked)
    again, counts = report(config(server.url, tmp_path, f"out={tmp_path}/other"))
    assert repr(again) == repr(found) and len(server.asked) == before  # nan is no equal of nan
    assert counts["calls"] == 0 and counts["cached"] == 16
    report(config(server.url, tmp_path, "judge_tokens=9"))  # another way of asking: another answer
    assert len(server.asked) == before + 16


def test_a_judge_that_never_answers_ends_the_run(
    fake: Callable[..., FakeJudge], tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="the judge has failed at all of 8 pairs"):
        report(config(fake(lambda a, b: None).url, tmp_path))


def test_the_key_comes_from_the_environment_and_requests_are_bounded(
    fake: Callable[..., FakeJudge], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-for-everyone")
    monkeypatch.setenv("JUDGE_API_KEY", "sk-of-the-judge")
    server = fake(lambda a, b: 1.0)
    report(config(server.url, tmp_path, "judge_concurrency=2"))
    assert server.keys == {"Bearer sk-of-the-judge"} and server.most <= 2
    assert all(body["temperature"] == 0 and body["model"] == "fake" for body in server.asked)
    assert "sk-of" not in "".join(path.read_text() for path in tmp_path.rglob("*.jsonl"))


def test_worked_verdicts() -> None:
    tokens = [{"token": " A", "logprob": math.log(0.6)}, {"token": "B", "logprob": math.log(0.3)}]
    assert odds_of_tokens(tokens) == pytest.approx(math.log(2))
    assert odds_of_tokens([*tokens, {"token": "A", "logprob": math.log(0.06)}]) == pytest.approx(
        math.log(2.2)
    )
    assert odds_of_tokens(tokens[:1]) == 0  # nothing is known of B but that it is no likelier
    assert odds_of_tokens([{"token": "The", "logprob": -0.1}]) is None
    assert odds_of_tokens([tokens[0], {"token": "B", "logprob": -9999.0}]) == 8  # as OpenAI has it
    with pytest.raises(ValueError):
        odds_of_tokens([{"token": "A", "logprob": math.nan}])

    def said(text: str | None) -> dict[str, Any]:
        return {"message": {"content": text}}

    assert verdict_of(said("A is [[A]]? No: [[B]]")) == -8
    assert verdict_of(said(" A.")) == 8 and verdict_of(said("[[C]]")) == 0
    for text in ("", None, "Both are good", "AB"):
        with pytest.raises(ValueError):
            verdict_of(said(text))


def test_braces_in_responses_are_their_own() -> None:
    ask = Ask("p", "{second}", "{prompt}")
    assert ask.written("{prompt}|{first}|{second}") == "p|{second}|{prompt}"


def test_failed_pairs_count_for_nothing() -> None:
    pairs = [Pair(i, 0, GOOD[i], BAD[i], 1.0, 1.0 if i else None) for i in range(4)]
    found = won(pairs, 0.5)
    assert found is not None and (found["win"], found["pairs"], found["failed"]) == (1, 3, 1)
    assert won(pairs[:1], 0.5) is None
    assert biases(pairs[:1], 0.5) == dict.fromkeys(("consistency", "first_slot", "longer_wins"))


def test_only_prompts_that_both_answered_are_asked() -> None:
    class Asked:
        counts: Counter[str] = Counter()

        def log_odds(self, asks: Any) -> list[float | None]:
            assert [(ask.prompt, ask.first) for ask in asks] == [("b", "x"), ("b", "y")]
            return [1.0, -1.0]

    pairs = judged_pairs(Asked(), ["a", "b"], [[Text("x", 1)]] * 2, [[], [Text("y", 1)]])
    assert [(pair.place, pair.log_odds) for pair in pairs] == [(1, 1.0)]


class Reader:
    """A judge in this process, which counts nothing."""

    counts: Counter[str] = Counter()

    def log_odds(self, asks: Any) -> list[float | None]:
        return [better(ask.first) - better(ask.second) for ask in asks]


def test_several_responses_to_a_prompt_are_read_and_count_as_one_prompt() -> None:
    ours = [[Text("good", 1), Text("bad", 1)], [Text("good good", 1), Text("good", 1)]]
    theirs = [[Text("bad", 1), Text("bad", 1)], [Text("good", 1)]]
    pairs = judged_pairs(Reader(), PROMPTS[:2], ours, theirs)
    assert [(pair.place, pair.number, pair.log_odds) for pair in pairs] == [
        *((0, 0, 1.0), (0, 1, 0.0)),  # the second one with the second one
        *((1, 0, 1.0), (1, 1, 0.0)),  # both with the only one
    ]
    found = won(pairs, 0.5)
    assert found is not None and (found["win"], found["tie"], found["pairs"]) == (0.5, 0.5, 4)
    once = won([pairs[0], pairs[3]], 0.5)
    doubled = won([pairs[0], pairs[0], pairs[3], pairs[3]], 0.5)
    assert once is not None and doubled is not None
    for each in ("win", "tie", "p", "preference"):  # copies of a response tell nothing new
        assert doubled[each] == pytest.approx(once[each]), each


def test_an_opponent_without_any_verdict_is_no_less_told_of() -> None:
    class Mute(Reader):
        def log_odds(self, asks: Any) -> list[float | None]:
            return [None if "mute" in (ask.first, ask.second) else 1.0 for ask in asks]

    texts = {name: [[Text(name, 1)]] * 2 for name in ("ours", "theirs", "mute")}
    found, _ = judged_report(Mute(), PROMPTS[:2], texts, "ours", 0.5)
    assert list(found["win_rates"]) == ["theirs"] and found["failed"] == 2


def test_agreement_with_people_and_with_another_scorer() -> None:
    """Of four pairs the judge finds two right, one wrong, and has one tie: (2 + 1/2) / 4."""
    ours = [[Text(text, 1)] for text in ("good", "good", "bad", "bad")]
    theirs = [[Text(text, 1)] for text in ("bad", "bad", "good", "bad")]
    pairs = judged_pairs(Reader(), PROMPTS[:4], ours, theirs)
    found = agreement_with_people(pairs, PROMPTS[:4], 0.5)
    assert (found["mean"], found["pairs"], found["tied"], found["failed"]) == (0.625, 4, 0.25, 0)
    assert found["low"] < 0.5 < found["high"]
    scores = {"theirs": torch.tensor([[0.0], [1.0], [math.nan], [0.0]])}
    agrees = agreement_with_scores({"theirs": pairs}, torch.ones(4, 1), scores, 0.5)
    # of the first (agreed) and the last (the judge has a tie); the second ties, the third is none
    assert (agrees["mean"], agrees["pairs"], agrees["tied"]) == (0.75, 2, 0.5)
    twice = judged_pairs(Reader(), PROMPTS[:4] * 2, ours * 2, theirs * 2)
    again = agreement_with_people(twice, PROMPTS[:4] * 2, 0.5)  # as pairs of a ranking share theirs
    assert again["pairs"] == 8
    for each in ("mean", "stderr"):
        assert again[each] == pytest.approx(found[each]), each
    assert agreement_with_people([], [], 0.5) == {"pairs": 0, "tied": None, "failed": 0}


def test_a_limit_of_cost_ends_the_run_and_keeps_what_was_paid(
    fake: Callable[..., FakeJudge], tmp_path: Path
) -> None:
    server = fake(lambda a, b: better(a) - better(b))  # a call costs 120 millionths
    words = ["judge_prices=[1,10]", "judge_concurrency=2"]
    with pytest.raises(
        RunError, match=r"judge_max_cost=0.0005 is spent after [56] calls, and 1[01]"
    ):
        report(config(server.url, tmp_path, *words, "judge_max_cost=0.0005"))
    asked = len(server.asked)
    assert asked in (5, 6)  # the fifth goes beyond it, one more may be under way
    for start in range(2):  # what was paid before counts, whatever verdict is kept
        with pytest.raises(RunError, match="with a greater judge_max_cost goes on"):
            report(config(server.url, tmp_path, *words, "judge_max_cost=0.0005"))
        assert len(server.asked) == asked, start
    with pytest.raises(RunError, match=r"judge_max_cost=0.001 is spent after (9|10) calls"):
        report(config(server.url, tmp_path, *words, "judge_max_cost=0.001"))
    _, counts = report(config(server.url, tmp_path, *words, "judge_max_cost=1"))
    assert counts["calls"] == len(server.asked) == 16 and counts["cached"] == 0
    other = [*words, f"out={tmp_path}/other", "judge_max_cost=0.0005"]
    _, counts = report(config(server.url, tmp_path, *other))  # others have paid for all of it
    assert counts["cached"] == 16 and len(server.asked) == 16


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["judge=http://x/v1"], "needs judge_model=NAME"),
        (["judge_model=x"], "judge_model is not used by judge=null"),
        (["judge_tie=1"], "judge_tie is not used by judge=null; set it to 0.5"),
        (["judge=runs/demo/sft", "judge_model=x"], "judge_model=x is for endpoints"),
        (["judge=runs/demo/sft", "judge_concurrency=9"], "judge_concurrency is for endpoints"),
        (["judge=runs/demo/sft", "judge_tokens=2"], "judge_tokens is for endpoints"),
        (["judge=http://x/v1", "judge_model=m", "judge_prices=[1]"], "takes two prices"),
        (["judge=http://x/v1", "judge_model=m", "judge_max_cost=1"], "for endpoints with judge_pr"),
        (["judge=runs/demo/sft", "judge_samples=5"], "judge_samples=5 exceeds algo.samples=4"),
        (["judge=http://me:secret@x/v1", "judge_model=m"], "judge holds a name or password"),
    ],
)
def test_what_is_refused(words: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        compose("evaluate", words)


@pytest.mark.usefixtures("inside")
def test_a_question_that_is_too_long_for_the_judge_is_said_so(tmp_path: Path) -> None:
    """It has no row of a file to be named by."""
    words = ["policy=runs/demo/sft", "baselines=[runs/demo/adapter]", "judge=runs/demo/sft"]
    said = r"^judge=runs/demo/sft cannot read a question: the prompt has \d+ tokens"
    with pytest.raises(UserError, match=said):
        evaluated(tmp_path / "out", *words, "judge_rows=0")


@pytest.mark.usefixtures("inside")
def test_judges_in_the_report(fake: Callable[..., FakeJudge], tmp_path: Path) -> None:
    """An endpoint; then a policy as judge, which is asked in both orders as well."""
    server = fake(lambda a, b: float(len(a) - len(b)))
    words = ["baselines=[runs/demo/adapter]", "judge_tie=0", f"data.cache={tmp_path}/cache"]
    found = evaluated(tmp_path / "a", *words, f"judge={server.url}", "judge_model=m")["judge"]
    assert list(found["win_rates"]) == ["runs/demo/adapter", "references"]
    assert found["agreement"]["people"]["pairs"] == 8  # rows that are held out
    assert 0 <= found["agreement"]["gold"]["mean"] <= 1
    assert found["calls"] == len(server.asked) and found["model"] == "m"

    question = tmp_path / "question.txt"
    question.write_text("{prompt}{first}|{second}: ")
    words = [*words, "judge=runs/demo/sft", f"judge_prompt={question}", "judge_rows=0"]
    found = evaluated(tmp_path / "b", *words, "judge_samples=2")["judge"]
    assert (
        found["calls"] == 40
        and found["agreement"]["people"] is None
        and found["win_rates"]["references"]["failed"] == 0
    )
    again = evaluated(tmp_path / "c", *words, "judge_samples=2")["judge"]
    assert (again["calls"], again["cached"]) == (0, 40)  # by the content of the judge, too
    assert again["win_rates"] == found["win_rates"]
    read = [*words, "judge_samples=2", "data.special_tokens=keep"]  # it may read other tokens
    assert evaluated(tmp_path / "e", *read)["judge"]["calls"] == 40
    question.write_text("{prompt}{first}: ")
    with pytest.raises(UserError, match="lacks {second}"):
        evaluated(tmp_path / "d", *words)


def test_both_orders_of_a_pair_are_judged_by_one_principle(
    fake: Callable[..., FakeJudge], tmp_path: Path
) -> None:
    file = tmp_path / "principles.txt"
    file.write_text("Be kind.\n\n  Be {first} short.\nBe right.\n")
    server = fake(lambda a, b: 1.0)
    cfg = config(server.url, tmp_path, f"principles={file}")
    report(cfg)
    asked = [body["messages"][0]["content"] for body in server.asked]
    said = dict.fromkeys(("Be kind.", "Be {first} short.", "Be right."), 0)
    for good, bad in zip(GOOD, BAD, strict=True):
        both = [text for text in asked if good.text in text and bad.text in text]
        (principle,) = {text.split("principle: ")[1].split(" Neither")[0] for text in both}
        assert len(both) == 2
        said[principle] += 1
    assert all(said.values())  # braces of a principle are its own
    questions = Questions.of(cfg)
    ask, turned = Ask("p", "x", "y"), Ask("p", "y", "x")
    assert questions.principle(ask) == questions.principle(turned)
    seeds = [Questions(questions.template, questions.principles, seed) for seed in range(30)]
    assert len({each.principle(ask) for each in seeds}) == 3


@pytest.mark.parametrize(
    ("question", "principles", "line"),
    [
        ("{prompt}{first}{second}", "Be kind.", "lacks {principle}"),
        ("{prompt}{first}{second}{principle}", None, "has {principle}: give principles="),
        (None, "\n \n", "is empty: write one principle on each line"),
    ],
)
def test_questions_and_principles_go_together(
    question: str | None, principles: str | None, line: str, tmp_path: Path
) -> None:
    words = []
    for key, text in (("judge_prompt", question), ("principles", principles)):
        if text is not None:
            (tmp_path / key).write_text(text)
            words.append(f"{key}={tmp_path / key}")
    with pytest.raises(UserError, match=line):
        Questions.of(config("http://x/v1", tmp_path, *words))
