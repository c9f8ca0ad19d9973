"""Final answers: as text, as numbers, as mathematics."""

import signal
import subprocess
import threading
import time
from decimal import Decimal
from typing import Any

import pytest

from rlhf_cli.data.kinds import Prompt
from rlhf_cli.rewards.answers import (
    MathJudge,
    boxed,
    close_answer,
    exact_answer,
    final_answer,
    math_answer,
    number_of,
    quantity_of,
)

# the completions of golden verify/gsm8k_extract -> our final answer; that code takes the first ####
TRAPS = {
    "so 3+4=7 #### 7": "7",
    "#### 1,234": "1234",
    "no answer": None,
    "#### -5.50": "-5.50",
    "#### 12 then #### 13": "13",
}


def row(answer: Any) -> Prompt:
    return Prompt("q", {"answer": answer})


@pytest.mark.parametrize(("response", "answer"), TRAPS.items())
def test_every_rule_of_answers_takes_the_same_one(response: str, answer: str | None) -> None:
    others = {"7", "1234", "-5.5", "12", "13", "1", "50"} - {
        "-5.5" if answer == "-5.50" else answer
    }
    for rule in (exact_answer, math_answer, lambda row, text: close_answer(row, text, 0.0)):
        if answer is not None:
            assert rule(row(answer), response) == 1
        assert [other for other in others if rule(row(other), response)] == []


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("3 + 4 = 7\n#### 7", "7", 1),
        ("#### 1,234", "1234", 1),
        ("#### 1234", "1,234", 1),
        ("#### $5.50", "5.5", 1),
        ("#### -3", "-3", 1),
        ("#### 7.", "7", 1),
        ("#### 12 then #### 13", "13", 1),  # the last one counts
        ("#### 7\nand 8 more", "7", 1),
        ("#### \n 7", "7", 1),
        ("####", "7", 0),
        ("7 is the answer #### 8", "7", 0),
        ("I think it is 7", "7", 1),  # no ####: the last number
        ("7 or rather 9.", "9", 1),
        ("it costs 1,000.50 coins", "1000.5", 1),
        ("70", "7", 0),
        ("-7", "7", 0),
        ("no idea", "7", 0),
        ("", "7", 0),
        ("#### Paris ", "paris", 1),
        ("#### ", "", 0),  # nothing is no answer
    ],
)
def test_exact_answer(response: str, answer: str, score: float) -> None:
    assert exact_answer(row(answer), response) == score


def test_a_number_as_the_answer_column() -> None:
    assert exact_answer(row(7), "#### 7.0") == 1


def test_pieces_of_an_answer() -> None:
    assert final_answer("a 1 b 2 c") == "2"
    assert final_answer("a b c") == final_answer("####") == ""
    assert boxed(r"\boxed{1} or \boxed{\frac{1}{2}} .") == r"\frac{1}{2}"
    assert boxed(r"\boxed{1") is None and boxed("1") is None
    assert number_of("$1,234.5.") == (Decimal("1234.5"), "$")
    assert number_of("two") is None and number_of("") is None and number_of("1e5x") is None


# gold, final answer, whether they are the same
SAME = [
    *(("1/2", "1/2", 1), ("10%", "10 %", 1), ("12:30", "12:30", 1), ("x+1", "X + 1", 1)),
    *(
        ("2 hours", "2 Hours.", 1),
        ("(1, 2)", "(1,2)", 1),
        ("A", "**A**", 1),
        ("Paris", "`paris`", 1),
    ),
    *(
        ("1/2", r"\boxed{1/2}", 1),
        (r"\frac{1}{2}", r"$\boxed{\frac{1}{2}}$", 1),
        ("x", r"\(x\)", 1),
    ),
    *(
        ("-4", "\u22124", 1),
        ("\u22124", "- 4", 1),
        ("5", "+5", 1),
        ("5", "5.0", 1),
        ("5", "$5$", 1),
    ),
    *(("1000", "1e3", 1), ("1e3", "1e3", 1), ("0.5", ".5", 1), ("1234", r"1{,}234", 1)),
    *(("1234567", "1,234,567", 1), ("18", "$18.00", 1), ("18", "18 €", 1), ("$18", r"\$18", 1)),
    *(("-3", "-$3", 1), ("Yes", "\u201cyes\u201d", 1), ("5", "**$5$**.", 1)),
    *(("1", "1/2", 0), ("2", "1/2", 0), ("10", "10%", 0), ("0.1", "10%", 0), ("12", "12:30", 0)),
    *(("1", "x+1", 0), ("2", "2 hours", 0), ("2 hours", "2 days", 0), ("5", ".5", 0)),
    *(("12", "1,2", 0), ("2", "1,2", 0), ("1234", "12,34", 0), ("1000", "1,0000", 0)),
    *(("$5", "€5", 0), ("5", "-5", 0), ("5", "5 or 6", 0), ("6", "5 or 6", 0), ("5", "5x", 0)),
    *(
        ("52", "5\u00b2", 0),
        ("5", "5 million", 0),
        ("3", "3-5", 0),
        ("5", "3-5", 0),
        ("5", "--5", 0),
    ),
    *(("1.2", "1.2.3", 0), ("12345678901234567890", "12345678901234567891", 0), ("12", "1 2", 0)),
    *(("1e400", "1e401", 0), ("five", "5", 0), ("", "", 0), (".", "", 0)),
]


@pytest.mark.parametrize(("gold", "said", "same"), SAME)
def test_the_whole_of_an_answer_is_compared(gold: str, said: str, same: float) -> None:
    assert exact_answer(row(gold), f"so it is\n#### {said}\nor 99") == same
    assert exact_answer(row(gold), f"#### {said}</answer>") == same
    if same:
        assert exact_answer(row(gold), said) == 1


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("the answer is 1/2.", "1/2"),
        ("we meet at 12:30!", "12:30"),
        ("answer:5", "5"),
        ("<think>2+3</think><answer>5</answer>", "5"),
        ('{"answer":5}', "5"),
        ("so (5)", "5"),
        ("x = 5, which is **5**", "5"),
        (r"it is \boxed{2 hours}, I think, or 3", "2 hours"),
        ("that makes 10%.", "10%"),
        ("2+3=5", "5"),
        ("f(5)", "f(5)"),
    ],
)
def test_without_a_mark_the_last_word_with_a_digit_counts(response: str, answer: str) -> None:
    assert exact_answer(row(answer), response) == 1
    others = {"1", "2", "3", "5", "10", "12", "30"} - {answer}
    assert [other for other in others if exact_answer(row(other), response)] == []


def test_a_long_answer_takes_no_time() -> None:
    began = time.monotonic()
    for long in ("9" * 20_000, "1," * 20_000, "**" * 5_000 + "1", "$" * 20_000, "(" * 5_000 + "1"):
        exact_answer(row("7"), f"#### {long}")
        exact_answer(row("7"), long)
        exact_answer(row(long), long)
    assert time.monotonic() - began < 2


# --------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("response", "answer", "tolerance", "score"),
    [
        ("#### 101", 100, 0.01, 1),  # exactly at the tolerance
        ("#### 99", "100", 0.01, 1),
        ("#### 101.1", 100, 0.01, 0),
        ("#### -101", -100, 0.01, 1),
        ("#### 100", -100, 0.01, 0),
        ("#### 0.001", 0, 0.01, 0),  # relative: only 0 is near 0
        ("#### 0", 0, 0.01, 1),
        ("#### 6.02e23", "6.02e23", 0, 1),
        ("about 6.02E+23 of them", 6.02e23, 0, 1),
        ("#### $1,234.50", "1234.5", 0, 1),
        ("a range of 3-5", 5, 0, 0),  # it is neither 5 nor -5
        ("a range of 3-5", -5, 0, 0),
        ("#### 1/2", 1, 0, 0),
        ("#### 12:30", 12, 0, 0),
        ("x=-5", -5, 0, 1),
        ("the list 1,2,3", 3, 0, 0),
        ("the list 1, 2, 3", 3, 0, 1),
        ("it is .5", 0.5, 0, 1),
        ("it is -.5.", -0.5, 0, 1),
        ("version 1.2.3", 1.2, 0, 0),
        ("#### 1e999", 1, 0, 0),
        ("none", 1, 0.5, 0),
        ("#### seven", 7, 0.5, 0),
    ],
)
def test_numeric_answer(response: str, answer: Any, tolerance: float, score: float) -> None:
    assert close_answer(row(answer), response, tolerance) == score


@pytest.mark.parametrize("text", ["", "two", "1,23", "1e999", "nan", "5 apples", "True", "--5"])
def test_what_is_no_number(text: str) -> None:
    assert quantity_of(text) is None


# --------------------------------------------------------------------------- mathematics


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        (r"so $\frac{2}{4}$", "1/2", 1),
        ("it is 0.5", r"\frac{1}{2}", 1),
        (r"\boxed{0.5} and 3 more", r"$\frac{1}{2}$", 1),  # what is boxed counts
        ("$1 + x$", "$x+1$", 1),
        ("$(x+1)^2$", "$x^2 + 2x + 1$", 1),
        ("$(x+1)^2$", "$x^2 + x + 1$", 0),
        (r"$2\sqrt{2}$", r"\sqrt{8}", 1),
        (r"$\{2,1\}$", "{1,2}", 1),
        ("#### 12:30", "12:30", 1),
        ("#### 12:30", "12", 0),
        ("#### x + 1", "1+x", 1),
        ("#### .5", "5", 0),
        ("x = 3", "3", 1),
        ("x = 3", 3, 1),
        ("I do not know", "3", 0),
        ("", "3", 0),
        ("3", "", None),  # nothing to compare with
        ("\ud800 3", "3", 1),  # half a character, as byte-level tokens may leave
    ],
)
def test_math_answer(response: str, answer: Any, score: float | None) -> None:
    assert math_answer(row(answer), response) == score


def test_an_endless_answer_is_wrong_in_time_from_any_thread() -> None:
    judge = MathJudge(seconds=1.0)
    assert judge.equal("3", "3")  # started
    found: list[bool | None] = []

    def ask() -> None:
        found.append(judge.equal("10^{10^{10^{10}}}", "$9^{9^{9^{9}}}$"))
        found.append(judge.equal("$x+1$", "$1+x$"))

    began = time.monotonic()
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(60)
    assert found == [False, True]  # it works on afterwards
    assert time.monotonic() - began > 1.0


def test_a_judge_that_died_is_replaced() -> None:
    judge = MathJudge()
    assert judge.equal("3", "3")
    process: Any = judge._process
    process.kill()
    process.wait()
    assert judge.equal("3", "3") and judge._process is not process


def test_a_signal_to_the_judges_process_as_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the midst of its imports, or before Python itself is up."""
    start = subprocess.Popen

    def signalled(*words: Any, **more: Any) -> "subprocess.Popen[str]":
        process = start(*words, **more)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            process.send_signal(number)
        return process

    monkeypatch.setattr(subprocess, "Popen", signalled)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    judge = MathJudge()
    assert judge.equal("1/2", "0.5") is True
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    judge._end()


def test_what_ends_the_judges_process_changes_no_answer() -> None:
    """SIGTERM and SIGINT to all processes of a run are for the run; a dead judge is replaced."""
    judge = MathJudge()
    assert judge.equal("1/2", "0.5") is True
    process = judge._process
    assert process is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        assert judge.equal("1/2", "0.5") is True and judge._process is process
    process.kill()
    assert judge.equal("1/2", "0.5") is True and judge._process is not process
    judge._end()
