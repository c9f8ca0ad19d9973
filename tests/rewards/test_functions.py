"""Users' functions: what they are given, what may go wrong, and that nothing ends the run."""

import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.rewards import functions
from rlhf_cli.rewards.functions import CONCURRENT, FAILED, TOLD, UserFunction

ROWS = [
    Prompt("one", {"answer": 1, "topic": "a"}, "f:1"),
    Prompt([{"role": "user", "content": "two"}], {"answer": 2}, "f:2"),
    Prompt("three", {"topic": "c"}, "f:3"),
]
TEXTS = ["r1", "r2", "r3"]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that are told."""
    lines: list[str] = []
    monkeypatch.setattr(functions, "say", lines.append)
    return lines


def function(folder: Path, body: str, name: str = "f", timeout: float = 5.0) -> UserFunction:
    """The function `name` of a file with this body."""
    file = folder / f"checks{len(list(folder.iterdir()))}.py"
    file.write_text("import asyncio, math, time\nseen = []\n" + body)
    return UserFunction(f"{file}:{name}", timeout)


def seen(made: UserFunction) -> Any:
    return made._function.__globals__["seen"]


def test_it_is_given_lists_of_what_it_names(tmp_path: Path, said: list[str]) -> None:
    body = """
def f(prompts, responses, answer, topic="none", missing="default"):
    seen.append((prompts, responses, answer, topic, missing))
    return [1, 2.5, None]
"""
    made = function(tmp_path, body)
    assert made.judge(ROWS, TEXTS) == [1.0, 2.5, None]
    prompts = ["one", [{"role": "user", "content": "two"}], "three"]
    assert seen(made) == [(prompts, TEXTS, [1, 2, None], ["a", None, "c"], "default")]
    assert said == []


def test_it_is_given_every_column_if_it_takes_them(tmp_path: Path) -> None:
    body = """
def f(prompts, responses, **columns):
    seen.append(columns)
    return [0] * len(prompts)
"""
    made = function(tmp_path, body)
    rows = [Prompt("a", {"x": 1, "responses": "no"}), Prompt("b", {"y": 2})]
    made.judge(rows, ["", ""])
    assert seen(made) == [{"x": [1, None], "y": [None, 2]}]  # its own parameters aside


def test_numbers_of_other_libraries_are_numbers(tmp_path: Path, said: list[str]) -> None:
    body = """
import numpy, torch
def f(prompts, responses):
    return (True, numpy.float32(0.5), torch.tensor(2))
def g(prompts, responses):
    return numpy.array([1.0, 2.0, 3.0])
"""
    assert function(tmp_path, body).judge(ROWS, TEXTS) == [1.0, 0.5, 2.0]
    assert function(tmp_path, body, "g").judge(ROWS, TEXTS) == [1.0, 2.0, 3.0]
    assert said == []


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("math.nan", "gave nan instead of a finite number"),
        ("-math.inf", "gave -inf instead of a finite number"),
        ("'2'", "gave '2' instead of a finite number"),
        ("[2.0]", "gave a list instead of a number"),
        ("object()", "gave a object instead of a number"),
    ],
)
def test_a_value_that_is_no_reward(value: str, told: str, tmp_path: Path, said: list[str]) -> None:
    made = function(tmp_path, f"def f(prompts, responses):\n    return [1.0, {value}, 3.0]\n")
    assert made.judge(ROWS, TEXTS) == [1.0, FAILED, 3.0]
    (line,) = said
    assert line.startswith(f"reward={made.spec}: no reward: f:2: ") and told in line


def test_an_exception_names_its_row_and_costs_the_others_nothing(
    tmp_path: Path, said: list[str]
) -> None:
    body = """
def f(prompts, responses, answer):
    seen.append(len(prompts))
    return [10 / answer[i] for i in range(len(prompts))]
"""
    made = function(tmp_path, body)
    assert made.judge(ROWS, TEXTS) == [10, 5, FAILED]
    assert seen(made) == [3, 1, 1, 1]
    (line,) = said
    assert "f:3: TypeError: unsupported operand" in line and "\n" not in line


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("return [1.0]", "3 asked"),
        ("return None", "gave None instead of a list"),
        ("return 1.0", "gave a float instead of a list"),
        ("return 'abc'", "gave a str instead of a list"),
        ("return (1 / 0 for _ in prompts)", "ZeroDivisionError: division by zero"),
        ("raise ValueError('a\\nb')", "ValueError: a"),
        ("raise ValueError", "ValueError: no message"),
    ],
)
def test_an_answer_that_is_no_list(body: str, told: str, tmp_path: Path, said: list[str]) -> None:
    """It fails for all; only what raises is asked again, one by one."""
    made = function(tmp_path, f"def f(prompts, responses):\n    {body}\n")
    found = made.judge(ROWS, TEXTS)
    assert found == [FAILED] * 3
    assert [line.split(": ")[2] for line in said] == ["f:1", "f:2", "f:3"]
    assert all(told in line and "\n" not in line for line in said)


def test_only_a_few_failures_are_told(tmp_path: Path, said: list[str]) -> None:
    made = function(tmp_path, "def f(prompts, responses):\n    return [None, *prompts[1:]]\n")
    rows = [Prompt("x", {}, f"f:{i}") for i in range(10)]
    assert made.judge(rows, [""] * 10) == [None, *[FAILED] * 9]
    assert len(said) == TOLD + 1  # None is an answer, no failure
    assert said[-1] == f"reward={made.spec}: no reward for {9 - TOLD} more of 10"


# --------------------------------------------------------------------------- async


def test_async_functions_run_at_once(tmp_path: Path, said: list[str]) -> None:
    body = """
running = 0
async def f(prompt, response, answer):
    global running
    running += 1
    seen.append(running)
    await asyncio.sleep(0.2)
    running -= 1
    return answer
"""
    made = function(tmp_path, body)
    count = CONCURRENT + 10
    rows = [Prompt("x", {"answer": i}) for i in range(count)]
    began = time.monotonic()
    assert made.judge(rows, [""] * count) == list(range(count))  # in order
    assert time.monotonic() - began < 3  # one after the other it would be 15
    assert max(seen(made)) == CONCURRENT
    assert said == []


def test_async_functions_share_a_loop_for_the_sake_of_their_clients(tmp_path: Path) -> None:
    body = """
async def f(prompt, response):
    seen.append(asyncio.get_running_loop())
    return 1
"""
    made = function(tmp_path, body)
    made.judge(ROWS, TEXTS)
    made.judge(ROWS, TEXTS)
    assert len(set(seen(made))) == 1


def test_an_async_function_has_its_time(tmp_path: Path, said: list[str]) -> None:
    body = """
async def f(prompt, response, answer):
    if answer == 2:
        while True:  # deaf to being cancelled
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                seen.append("cancelled")
    if answer is None:
        raise TimeoutError("of its own")
    return answer
"""
    made = function(tmp_path, body, timeout=0.3)
    began = time.monotonic()
    assert made.judge(ROWS, TEXTS) == [1, FAILED, FAILED]
    assert time.monotonic() - began < 3
    assert "f:2: no answer within 0.3 s (reward_timeout)" in said[0]
    assert "f:3: TimeoutError: of its own" in said[1]


def test_an_async_function_that_blocks_costs_no_more_than_that(
    tmp_path: Path, said: list[str]
) -> None:
    body = """
async def f(prompt, response, answer):
    if answer == 2:
        time.sleep(4)
    return 1
"""
    made = function(tmp_path, body, timeout=0.2)
    began = time.monotonic()
    assert made.judge(ROWS, TEXTS)[1] == FAILED
    assert time.monotonic() - began < 3
    assert any("f:2: no answer, for a call blocks the event loop" in line for line in said)
    assert made.judge(ROWS[:1], TEXTS[:1]) == [1]  # and it works on


def test_async_functions_work_inside_a_running_loop(tmp_path: Path) -> None:
    """As in a notebook."""
    import asyncio

    made = function(tmp_path, "async def f(prompt, response):\n    return 1\n")

    async def cell() -> list[Any]:
        return made.judge(ROWS, TEXTS)

    assert asyncio.run(cell()) == [1, 1, 1]


# --------------------------------------------------------------------------- steps


def test_steps_are_judged_each(tmp_path: Path, said: list[str]) -> None:
    body = """
def f(prompts, steps, answer):
    seen.append(steps)
    return [[len(step) for step in each] for each in steps]
async def g(prompt, steps, answer):
    return [0.5, None] if answer == 1 else None
def h(prompts, steps):
    return [[1.0], [1.0, "x"], (1 / 0 for _ in "a")]
"""
    steps = [["a", "bcd"], ["e", "f"], ["g"]]
    made = function(tmp_path, body)
    assert made.judge(ROWS, steps) == [[1, 3], [1, 1], [1]]
    assert seen(made) == [steps]
    assert function(tmp_path, body, "g").judge(ROWS, steps) == [[0.5, None], None, None]
    assert said == []
    assert function(tmp_path, body, "h").judge(ROWS, steps) == [FAILED] * 3
    assert "f:1: 2 steps asked, 1 answered" in said[0]
    assert "f:2: the function gave 'x' instead of a finite number" in said[1]
    assert "f:3: ZeroDivisionError" in said[2]


# --------------------------------------------------------------------------- files


def test_a_file_is_run_once(tmp_path: Path) -> None:
    body = f"""
open({str(tmp_path / "log")!r}, "a").write("run\\n")
def f(prompts, responses): return [1] * len(prompts)
def g(prompts, responses): return [2] * len(prompts)
"""
    file = tmp_path / "own.py"
    file.write_text(body)
    for name in ("f", "g", "f"):
        UserFunction(f"{file}:{name}", 1.0).judge(ROWS, TEXTS)
    assert (tmp_path / "log").read_text() == "run\n"


def test_a_file_that_cannot_be_imported_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("def f(prompts, responses): ...\nimport nowhere_at_all\n")
    with pytest.raises(UserError, match="own.py: ModuleNotFoundError: No module named"):
        UserFunction(f"{file}:f", 1.0)


def test_a_file_may_hold_dataclasses(tmp_path: Path) -> None:
    body = """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Judge:
    level: float = 1.0
def f(prompts, responses): return [Judge().level] * len(prompts)
"""
    file = tmp_path / "own.py"
    file.write_text(body)
    assert UserFunction(f"{file}:f", 1.0).judge(ROWS, TEXTS) == [1, 1, 1]
