"""Calls a user's reward function, so that nothing it does can end the run.

What it gets and gives is written in specs.Signature and in docs/rewards.md. An exception, a
time-out, or an answer that is no reward costs that response its reward and is told with the row's
source, and once with the lines that it came from.
"""

import asyncio
import math
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

from rlhf_cli.config.own_code import function_in, said_by, trace_of
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.ranks.agreement import by_main, together
from rlhf_cli.ranks.world import world
from rlhf_cli.reporting.console import say
from rlhf_cli.rewards.specs import OF_ALL, OF_ONE, function_of, signature_of, value_of

CONCURRENT = 64  # calls of an async function that run at once
TOLD = 3  # failures that are told one by one, per call

Ask = Callable[[], Any]
"""A call with all that it is given; of an async function it gives what is to be awaited."""


class NoReward(Exception):
    """Why a response gets no reward."""


RAISED = (Exception, SystemExit)
"""What a function may raise without ending the run; Ctrl-C does."""

LARGEST = 3e38  # of a reward: float32 has no larger numbers
FAILED = math.inf
"""What a function says of a response that it failed at; no reward of its own is infinite."""


@dataclass
class Response:
    """One response to be judged: row, text and token ids, and steps where they are judged."""

    row: Prompt
    text: str
    ids: list[int]
    steps: list[str] | None = None

    def named(self, name: str) -> Any:
        """What a parameter is given; a copy, for a function may change what it gets."""
        match name:
            case "prompt":
                return deepcopy(self.row.prompt)
            case "completion":  # of messages a message, as TRL has it
                told = [{"role": "assistant", "content": self.text}]
                return self.text if isinstance(self.row.prompt, str) else told
            case "steps":
                return list(self.steps or [])
            case "completion_ids":
                return list(self.ids)
            case _:
                return self.text


class UserFunction:
    """The function that `path/to/file.py:function` names.

    Of several ranks the first alone runs it and its file, which may ask services or hold a model,
    and tells the others what it says.
    """

    def __init__(self, spec: str, timeout: float) -> None:
        """Loads the file; `timeout` is in seconds, for each call of an async function.

        Raises:
            UserError: the file cannot be imported.
        """
        named = function_of(spec)
        assert named is not None
        self._file, name = named
        self.spec, self.timeout = spec, timeout
        self.signature = signature_of(self._file, name)
        self._function: Any = together(
            lambda: function_in("reward", self._file, name) if world().is_main else None
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._shown: set[tuple[str, ...]] = set()  # what exceptions came from

    def judge(self, responses: Sequence[Response]) -> list[Any]:
        """What the function says of each response: a number, or a list of one per step, or None.

        FAILED where it raised, was late or gave something else.
        """
        if not responses:
            return []
        return by_main(lambda: self._judged(responses))

    def _judged(self, responses: Sequence[Response]) -> list[Any]:
        columns = self._columns(responses)
        with redirect_stdout(sys.stderr):  # standard output is for the path of what was made
            if self.signature.one_by_one:
                answers = self._asked([self._of_one(each, columns) for each in responses])
            else:
                answers = self._together(responses, columns)
        values: list[Any] = []
        failures: list[tuple[str, BaseException]] = []
        for response, answer in zip(responses, answers, strict=True):
            try:
                values.append(self._read(answer, response))
            except RAISED as error:  # a generator of steps may still fail
                values.append(FAILED)
                failures.append((response.row.source or "a row", error))
        self._tell(failures, len(responses))
        return values

    def _read(self, answer: Any, response: Response) -> Any:
        if isinstance(answer, RAISED):
            raise answer
        return read(answer, response.steps if self.signature.judges == "step" else None)

    def _tell(self, failures: Sequence[tuple[str, BaseException]], count: int) -> None:
        """What went wrong, row by row, and each new place that it came from."""
        for source, error in failures[:TOLD]:
            if isinstance(error, NoReward):
                say(f"reward={self.spec}: no reward: {source}: {error}")
                continue
            say(f"reward={self.spec}: no reward: {source}: {said_by(error, self._file)}")
            trace = tuple(trace_of(error, self._file))
            for line in trace if trace not in self._shown else ():
                say(f"  {line}")
            self._shown.add(trace)
        if len(failures) > TOLD:
            say(f"reward={self.spec}: no reward for {len(failures) - TOLD} more of {count}")

    # ------------------------------------------------------------------ what it is given

    def _columns(self, responses: Sequence[Response]) -> dict[str, str]:
        """The column of each parameter that is given one; without, it has its own default.

        What it needs is there, or refused before it runs; a batch may have none of it.
        """
        rows, signature = [response.row for response in responses], self.signature
        own = {name: signature.column(name) for name in signature.columns}
        chosen = {
            name: column
            for name, column in own.items()
            if name in signature.required or any(value_of(row, column) is not None for row in rows)
        }
        if signature.takes_all:
            every = {name: name for row in rows for name in row.columns}
            taken = {*signature.given, *own, *own.values()}
            chosen |= {name: column for name, column in every.items() if name not in taken}
        return chosen

    def _of_one(self, response: Response, columns: dict[str, str]) -> Ask:
        given = {name: response.named(name) for name in self.signature.given}
        values = {name: deepcopy(value_of(response.row, each)) for name, each in columns.items()}
        return partial(self._function, **values, **given)

    def _of_all(self, responses: Sequence[Response], columns: dict[str, str]) -> Ask:
        singular = dict(zip(OF_ALL, OF_ONE, strict=True))
        given = {
            name: [each.named(singular.get(name, name)) for each in responses]
            for name in self.signature.given
        }
        values = {
            name: [deepcopy(value_of(response.row, column)) for response in responses]
            for name, column in columns.items()
        }
        return partial(self._function, **values, **given)

    # ------------------------------------------------------------------ asking

    def _together(self, responses: Sequence[Response], columns: dict[str, str]) -> list[Any]:
        """One call for all; if that raises, one for each, to find the rows that are to blame."""
        (answer,) = self._asked([self._of_all(responses, columns)])
        answers = each_of(answer, len(responses))
        if len(responses) > 1 and all(
            isinstance(each, RAISED) and not isinstance(each, NoReward) for each in answers
        ):
            asks = [self._of_all([response], columns) for response in responses]
            return [each_of(answer, 1)[0] for answer in self._asked(asks)]
        return answers

    def _asked(self, asks: Sequence[Ask]) -> list[Any]:
        """The answer to each, or the exception that there was instead."""
        if self.signature.is_async:
            return self._concurrently(asks)
        return [answer_or_error(ask) for ask in asks]

    def _concurrently(self, asks: Sequence[Ask]) -> list[Any]:
        """Each of these, CONCURRENT at once, each with the time limit."""
        late = NoReward(f"no answer within {self.timeout:g} s (reward_timeout)")
        stuck = NoReward(
            "no answer, for a call blocks the event loop (it must await what it waits for)"
        )
        answers: list[Any] = [stuck] * len(asks)

        async def one(place: int, gate: asyncio.Semaphore) -> None:
            async with gate:
                answers[place] = await within(asks[place], self.timeout, late)

        async def every() -> None:
            gate = asyncio.Semaphore(CONCURRENT)
            await asyncio.gather(*(one(place, gate) for place in range(len(asks))))

        if self._loop is None:  # one loop for good, for the sake of the clients that live in it
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True).start()
        rounds = math.ceil(len(asks) / CONCURRENT)
        try:
            asyncio.run_coroutine_threadsafe(every(), self._loop).result(
                rounds * self.timeout + 1.0
            )
        except TimeoutError:  # nothing within a blocked loop can end it
            self._loop = None
        return list(answers)


def answer_or_error(ask: Ask) -> Any:
    """What a call gives, or what it raised instead."""
    try:
        return ask()
    except RAISED as error:
        return error


async def within(ask: Ask, seconds: float, late: NoReward) -> Any:
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
    except RAISED as error:
        return error


# --------------------------------------------------------------------------- what it gives


def each_of(answer: Any, count: int) -> list[Any]:
    """What a batch was answered, of each of `count` responses, or what went wrong, for each."""
    if isinstance(answer, RAISED):
        return [answer] * count
    if not isinstance(answer, Iterable) or isinstance(answer, str | bytes | dict):
        return [NoReward(f"the function gave {kind_of(answer)} instead of a list")] * count
    answers = answer_or_error(lambda: list(answer))  # a generator may still fail
    if isinstance(answers, RAISED):
        return [answers] * count
    if len(answers) != count:
        return [NoReward(f"{count} asked, {len(answers)} answered")] * count
    return list(answers)


def read(answer: Any, steps: Sequence[str] | None) -> Any:
    """A reward, or a list with one per step.

    Raises:
        NoReward: the answer is of another kind or number than was asked for.
    """
    if answer is None:
        return None
    if steps is None:
        return number(answer)
    if not isinstance(answer, Iterable) or isinstance(answer, str | bytes | dict):
        raise NoReward(f"the function gave {kind_of(answer)} instead of a list with one per step")
    values = [None if value is None else number(value) for value in answer]
    if len(values) != len(steps):
        raise NoReward(f"{len(steps)} steps asked, {len(values)} answered")
    return values


def number(value: Any) -> float | None:
    """A finite float; of a dict its `score`, as verl's functions give it."""
    if isinstance(value, dict):
        if "score" not in value:
            raise NoReward("the function gave a dict without a score")
        value = value["score"]
        if value is None:
            return None
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
