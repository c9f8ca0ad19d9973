"""Calls a user's reward function, so that nothing it does can end the run.

What it gets and gives is written in specs.Signature and in docs/rewards.md. An exception, a
time-out, or an answer that is no reward costs that response its reward and is told with the row's
source.
"""

import asyncio
import importlib.util
import math
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.reporting.console import say
from rlhf_cli.rewards.specs import function_of, signature_of

CONCURRENT = 64  # calls of an async function that run at once
TOLD = 3  # failures that are told one by one, per call

Given = str | list[str]
"""What is judged: a response, or its steps."""


class NoReward(Exception):
    """Why a response gets no reward."""


LARGEST = 3e38  # of a reward: float32 has no larger numbers
FAILED = math.inf
"""What a function says of a response that it failed at; no reward of its own is infinite."""


@dataclass
class Call:
    """One response to be judged: its row and its text, or its steps."""

    row: Prompt
    given: Given


class UserFunction:
    """The function that `path/to/file.py:function` names."""

    def __init__(self, spec: str, timeout: float) -> None:
        """Loads the file; `timeout` is in seconds, for each call of an async function.

        Raises:
            UserError: the file cannot be imported.
        """
        named = function_of(spec)
        assert named is not None
        file, name = named
        self.spec, self.timeout = spec, timeout
        self.signature = signature_of(file, name)
        self._function: Callable[..., Any] = getattr(loaded(file.resolve()), name)
        self._loop: asyncio.AbstractEventLoop | None = None

    def judge(self, rows: Sequence[Prompt], given: Sequence[Given]) -> list[Any]:
        """What the function says of each response: a number, or a list of one per step, or None.

        FAILED where it raised, was late or gave something else.

        Args:
            rows: of each response.
            given: responses, or the steps of each, as the function asks for.
        """
        calls = [Call(row, each) for row, each in zip(rows, given, strict=True)]
        names = self._columns(rows)
        run = self._concurrently if self.signature.is_async else self._together
        values: list[Any] = []
        failures: list[str] = []
        with redirect_stdout(sys.stderr):  # standard output is for the path of what was made
            answers = run(calls, names)
        for call, answer in zip(calls, answers, strict=True):
            try:
                values.append(read(answer, call.given))
            except NoReward as failure:
                values.append(FAILED)
                failures.append(f"{call.row.source or 'a row'}: {failure}")
        for line in failures[:TOLD]:
            say(f"reward={self.spec}: no reward: {line}")
        if len(failures) > TOLD:
            say(f"reward={self.spec}: no reward for {len(failures) - TOLD} more of {len(calls)}")
        return values

    def _columns(self, rows: Sequence[Prompt]) -> list[str]:
        """The columns to pass: those that it names, or all; its own default where no row has it."""
        present = {name: None for row in rows for name in row.columns}
        if self.signature.takes_all:
            own = [name for name in self.signature.required if name not in present]
            return [name for name in [*present, *own] if name not in self.signature.given]
        named = self.signature.columns
        return [name for name in named if name in present or name in self.signature.required]

    # ------------------------------------------------------------------ batches

    def _together(self, calls: list[Call], names: list[str]) -> list[Any]:
        """One call for all; if that raises, one for each, to find the rows that are to blame."""
        columns = {name: [call.row.columns.get(name) for call in calls] for name in names}
        prompts, given = [call.row.prompt for call in calls], [call.given for call in calls]
        count = len(calls)
        try:
            answer = self._function(prompts, given, **columns)
            if not isinstance(answer, Iterable) or isinstance(answer, str | bytes | dict):
                return [NoReward(f"the function gave {kind_of(answer)} instead of a list")] * count
            answers = list(answer)  # a generator may still fail
        except (Exception, SystemExit) as error:
            if count == 1:
                return [error]
            return [self._together([call], names)[0] for call in calls]
        if len(answers) != count:
            return [NoReward(f"{count} asked, {len(answers)} answered")] * count
        return answers

    # ------------------------------------------------------------------ one by one, at once

    def _concurrently(self, calls: list[Call], names: list[str]) -> list[Any]:
        """A call for each, CONCURRENT at once, each with the time limit."""
        late = NoReward(f"no answer within {self.timeout:g} s (reward_timeout)")
        stuck = NoReward(
            "no answer, for a call blocks the event loop (it must await what it waits for)"
        )
        answers: list[Any] = [stuck] * len(calls)

        async def one(place: int, gate: asyncio.Semaphore) -> None:
            call = calls[place]
            columns = {name: call.row.columns.get(name) for name in names}
            async with gate:
                ask = partial(self._function, call.row.prompt, call.given, **columns)
                answers[place] = await within(ask, self.timeout, late)

        async def every() -> None:
            gate = asyncio.Semaphore(CONCURRENT)
            await asyncio.gather(*(one(place, gate) for place in range(len(calls))))

        if self._loop is None:  # one loop for good, for the sake of the clients that live in it
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True).start()
        rounds = math.ceil(len(calls) / CONCURRENT)
        try:
            asyncio.run_coroutine_threadsafe(every(), self._loop).result(
                rounds * self.timeout + 1.0
            )
        except TimeoutError:  # nothing within a blocked loop can end it
            self._loop = None
        return list(answers)


async def within(ask: Callable[[], Awaitable[Any]], seconds: float, late: NoReward) -> Any:
    """The answer, or what went wrong; a call that ignores being cancelled is left behind."""
    try:
        task = asyncio.ensure_future(ask())
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            task.cancel()
            return late
        return task.result()
    except asyncio.CancelledError as error:  # by the function itself
        return NoReward(f"cancelled {error}".strip())
    except (Exception, SystemExit) as error:
        return error


def read(answer: Any, given: Given) -> Any:
    """A reward, or a list with one per step.

    Raises:
        NoReward: the answer is an exception, or of another kind or number than was asked for.
    """
    if isinstance(answer, NoReward):
        raise answer
    if isinstance(answer, Exception | SystemExit):
        raise NoReward(f"{type(answer).__name__}: {first_line(answer)}")
    if answer is None:
        return None
    if isinstance(given, str):
        return number(answer)
    if not isinstance(answer, Iterable) or isinstance(answer, str | bytes | dict):
        raise NoReward(f"the function gave {kind_of(answer)} instead of a list with one per step")
    try:
        listed = list(answer)
    except Exception as error:  # a generator may still fail
        raise NoReward(f"{type(error).__name__}: {first_line(error)}") from None
    values = [None if value is None else number(value) for value in listed]
    if len(values) != len(given):
        raise NoReward(f"{len(given)} steps asked, {len(values)} answered")
    return values


def number(value: Any) -> float:
    """A finite float."""
    try:
        reward = math.nan if isinstance(value, str | bytes) else float(value)
    except Exception:  # whatever a foreign type raises
        raise NoReward(f"the function gave {kind_of(value)} instead of a number") from None
    if not abs(reward) <= LARGEST:
        raise NoReward(f"the function gave {value!r} instead of a finite number")
    return reward


def kind_of(value: Any) -> str:
    """The type of a value, for a message."""
    return "None" if value is None else f"a {type(value).__name__}"


def first_line(error: BaseException) -> str:
    """The first line of what an exception says."""
    return (str(error).strip().splitlines() or ["no message"])[0]


@cache
def loaded(file: Path) -> ModuleType:
    """The module of a file, run once.

    Raises:
        UserError: it raises.
    """
    name = f"rlhf_reward_{file.stem}_{abs(hash(file))}"
    made = importlib.util.spec_from_file_location(name, file)
    assert made is not None and made.loader is not None
    module = importlib.util.module_from_spec(made)
    sys.modules[name] = module  # dataclasses and pickle look modules up
    try:
        with redirect_stdout(sys.stderr):
            made.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"{file}: {type(error).__name__}: {first_line(error)}") from None
    return module
