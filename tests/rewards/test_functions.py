"""Users' functions: what they are given, what may go wrong, and that nothing ends the run."""

import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.rewards import functions
from rlhf_cli.rewards.functions import CONCURRENT, FAILED, TOLD, Response, UserFunction

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


def judged(made: UserFunction, rows: list[Prompt], given: list[Any]) -> list[Any]:
    """What it says of responses to these rows: texts, or the steps of each."""
    return made.judge(
        [
            Response(row, each, [i], None)
            if isinstance(each, str)
            else Response(row, "".join(each), [i], each)
            for i, (row, each) in enumerate(zip(rows, given, strict=True))
        ]
    )


def seen(made: UserFunction) -> Any:
    return made._function.__globals__["seen"]


def test_it_is_given_lists_of_what_it_names(tmp_path: Path, said: list[str]) -> None:
    body = """
def f(prompts, responses, answer, topic="none", missing="default"):
    seen.append((prompts, responses, answer, topic, missing))
    return [1, 2.5, None]
"""
    made = function(tmp_path, body)
    assert judged(made, ROWS, TEXTS) == [1.0, 2.5, None]
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
    judged(made, rows, ["", ""])
    assert seen(made) == [{"x": [1, None], "y": [None, 2]}]  # its own parameters aside


def test_numbers_of_other_libraries_are_numbers(tmp_path: Path, said: list[str]) -> None:
    body = """
import numpy, torch
def f(prompts, responses):
    return (True, numpy.float32(0.5), torch.tensor(2))
def g(prompts, responses):
    return numpy.array([1.0, 2.0, 3.0])
"""
    assert judged(function(tmp_path, body), ROWS, TEXTS) == [1.0, 0.5, 2.0]
    assert judged(function(tmp_path, body, "g"), ROWS, TEXTS) == [1.0, 2.0, 3.0]
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
    assert judged(made, ROWS, TEXTS) == [1.0, FAILED, 3.0]
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
    assert judged(made, ROWS, TEXTS) == [10, 5, FAILED]
    assert seen(made) == [3, 1, 1, 1]
    line, *trace = said
    assert "f:3: TypeError: unsupported operand" in line and "\n" not in line
    assert line.endswith(f"({made._file.name} line 6)")
    assert trace == [
        f"  {made._file} line 6 in {name}: return [10 / answer[i] for i in range(len(prompts))]"
        for name in ("f", "<listcomp>")
    ]
    assert judged(made, ROWS, TEXTS) == [10, 5, FAILED]
    assert len(said) == 4  # where it came from is said once


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
    found = judged(made, ROWS, TEXTS)
    assert found == [FAILED] * 3
    lines = [line for line in said if not line.startswith("  ")]
    assert [line.split(": ")[2] for line in lines] == ["f:1", "f:2", "f:3"]
    assert all(told in line and "\n" not in line for line in lines)


def test_only_a_few_failures_are_told(tmp_path: Path, said: list[str]) -> None:
    made = function(tmp_path, "def f(prompts, responses):\n    return [None, *prompts[1:]]\n")
    rows = [Prompt("x", {}, f"f:{i}") for i in range(10)]
    assert judged(made, rows, [""] * 10) == [None, *[FAILED] * 9]
    assert len(said) == TOLD + 1  # None is an answer, no failure
    assert said[-1] == f"reward={made.spec}: no reward for {9 - TOLD} more of 10"


# --------------------------------------------------------------------------- by name

SAID = [{"role": "assistant", "content": "r2"}]


def test_trl_gets_messages_where_the_prompt_has_them(tmp_path: Path, said: list[str]) -> None:
    body = """
def f(completions, topic, prompts, **kwargs):
    seen.append((completions, topic, prompts, kwargs))
    return [0.0] * len(completions)
def g(**kwargs):
    return [len(ids) for ids in kwargs["completion_ids"]]
async def h(completions, **kwargs):
    return [float(kwargs["prompts"][i] == "one") for i in range(len(completions))]
"""
    made = function(tmp_path, body)
    assert judged(made, ROWS, TEXTS) == [0, 0, 0]
    prompts = [row.prompt for row in ROWS]
    more = {"answer": [1, 2, None], "completion_ids": [[0], [1], [2]]}
    assert seen(made) == [(["r1", SAID, "r3"], ["a", None, "c"], prompts, more)]
    assert judged(function(tmp_path, body, "g"), ROWS, TEXTS) == [1, 1, 1]
    assert judged(function(tmp_path, body, "h"), ROWS, TEXTS) == [1, 0, 0]
    assert said == []


def test_verl_is_called_for_each_response(tmp_path: Path, said: list[str]) -> None:
    body = """
def f(data_source, solution_str, ground_truth, extra_info=None):
    seen.append((data_source, solution_str, ground_truth, extra_info))
    return {"score": float(ground_truth), "acc": 1} if data_source == "a" else None
def g(data_sources, solution_strs, ground_truths, extra_infos=None):
    return [{"score": 2 * float(truth)} for truth in ground_truths]
def h(solution_str, ground_truth):
    return {"3": {"acc": 1.0}, "4": {"score": None}}[ground_truth]
"""
    rows = [
        Prompt("x", {"data_source": "a", "reward_model": {"ground_truth": "3"}}, "f:1"),
        Prompt([], {"data_source": "b", "ground_truth": "4", "extra_info": {"i": 1}}, "f:2"),
    ]
    made = function(tmp_path, body)
    assert judged(made, rows, ["r1", "r2"]) == [3.0, None]
    assert seen(made) == [("a", "r1", "3", None), ("b", "r2", "4", {"i": 1})]
    assert judged(function(tmp_path, body, "g"), rows, ["r1", "r2"]) == [6, 8]
    assert said == []
    assert judged(function(tmp_path, body, "h"), [*rows, ROWS[0]], TEXTS) == [FAILED, None, FAILED]
    assert "f:1: the function gave a dict without a score" in said[0]
    assert "f:1: KeyError: None" in said[1]


def test_the_order_of_parameters_does_not_matter(tmp_path: Path) -> None:
    body = """
def f(answer, response, prompt):
    return len(response) + (answer or 0) if prompt == "one" else None
def g(*, responses, completions):
    return [float(text == said) for text, said in zip(responses, completions)]
"""
    assert judged(function(tmp_path, body), ROWS, TEXTS) == [3, None, None]
    assert judged(function(tmp_path, body, "g"), ROWS, TEXTS) == [1, 0, 1]


def test_what_a_function_does_to_its_lists_stays_its_own(tmp_path: Path) -> None:
    body = """
def f(prompts, completions, completion_ids, numbers):
    prompts[0].pop(), completion_ids[0].clear(), numbers[0].append(3)
    return [0.0]
"""
    row = Prompt([{"role": "user", "content": "two"}], {"numbers": [1]})
    given = Response(row, "r", [1, 2])
    function(tmp_path, body).judge([given])
    assert (len(row.prompt), row.columns, given.ids) == (1, {"numbers": [1]}, [1, 2])


def test_a_function_that_leaves_ends_nothing(tmp_path: Path, said: list[str]) -> None:
    body = "def f(completions):\n    raise SystemExit(3)\n"
    assert judged(function(tmp_path, body), ROWS, TEXTS) == [FAILED] * 3
    assert "f:1: SystemExit: 3" in said[0]


def test_lines_of_libraries_are_not_shown(tmp_path: Path, said: list[str]) -> None:
    body = """
import json
def inner(text):
    return json.loads(text)
def f(response):
    return inner(response)
"""
    made = function(tmp_path, body)
    judged(made, ROWS[:1], ["{"])
    assert said[0].endswith(f"({made._file.name} line 6)")
    assert [line.partition(" in ")[2] for line in said[1:]] == [
        "f: return inner(response)",
        "inner: return json.loads(text)",
    ]


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
    assert judged(made, rows, [""] * count) == list(range(count))  # in order
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
    judged(made, ROWS, TEXTS)
    judged(made, ROWS, TEXTS)
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
    assert judged(made, ROWS, TEXTS) == [1, FAILED, FAILED]
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
    assert judged(made, ROWS, TEXTS)[1] == FAILED
    assert time.monotonic() - began < 3
    assert any("f:2: no answer, for a call blocks the event loop" in line for line in said)
    assert judged(made, ROWS[:1], TEXTS[:1]) == [1]  # and it works on


def test_async_functions_work_inside_a_running_loop(tmp_path: Path) -> None:
    """As in a notebook."""
    import asyncio

    made = function(tmp_path, "async def f(prompt, response):\n    return 1\n")

    async def cell() -> list[Any]:
        return judged(made, ROWS, TEXTS)

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
    assert judged(made, ROWS, steps) == [[1, 3], [1, 1], [1]]
    assert seen(made) == [steps]
    assert judged(function(tmp_path, body, "g"), ROWS, steps) == [[0.5, None], None, None]
    assert said == []
    assert judged(function(tmp_path, body, "h"), ROWS, steps) == [FAILED] * 3
    assert "f:1: 2 steps asked, 1 answered" in said[0]
    assert "f:2: the function gave 'x' instead of a finite number" in said[1]
    assert "f:3: ZeroDivisionError" in said[2]
    body = """
def f(prompts, steps, responses):
    return [[0.0 if step in text else 1.0 for step in each] for each, text in zip(steps, responses)]
async def g(steps, completion_ids):
    return [completion_ids[0]] * len(steps)
"""
    assert judged(function(tmp_path, body), ROWS, steps) == [[0, 0], [0, 0], [0]]
    assert judged(function(tmp_path, body, "g"), ROWS, steps) == [[0, 0], [1, 1], [2]]


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
        judged(UserFunction(f"{file}:{name}", 1.0), ROWS, TEXTS)
    assert (tmp_path / "log").read_text() == "run\n"


def test_a_file_that_cannot_be_imported_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("def f(prompts, responses): ...\nimport nowhere_at_all\n")
    with pytest.raises(UserError, match=r"own.py: ModuleNotFoundError: No module.*own.py line 2\)"):
        UserFunction(f"{file}:f", 1.0)
    (tmp_path / "left.py").write_text("def f(responses): ...\nimport sys\nsys.exit(0)\n")
    with pytest.raises(UserError, match=r"left.py: SystemExit: 0 \(left.py line 3\)"):
        UserFunction(f"{tmp_path}/left.py:f", 1.0)
    (tmp_path / "gone.py").write_text("def f(responses): ...\nf = 3\n")
    with pytest.raises(UserError, match="f is no function once"):
        UserFunction(f"{tmp_path}/gone.py:f", 1.0)


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
    assert judged(UserFunction(f"{file}:f", 1.0), ROWS, TEXTS) == [1, 1, 1]
