"""Final answers of responses, compared with the row's `answer`: as text, number or mathematics."""

import atexit
import json
import math
import queue
import re
import signal
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

from rlhf_cli.config.errors import RunError
from rlhf_cli.data.kinds import Prompt

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
# with an exponent; a sign is one only where nothing stands before it, a comma only before thousands
QUANTITY = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?"
    r"|(?<![\w.])[-+]?\.\d+(?:[eE][-+]?\d+)?"
)

MATH_SECONDS = 5.0  # for one answer; what takes longer is not shown to be equal
START_SECONDS = 120.0
FOR_THE_RUN = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def exact_answer(row: Prompt, response: str) -> float:
    """1 where the response's final answer (after the last ####, else its last number) equals the
    row's `answer` as a number, or else as text without case; 0 elsewhere.
    """
    return float(same_answer(final_answer(response), str(row.columns["answer"])))


def final_answer(response: str, pattern: re.Pattern[str] = NUMBER) -> str:
    """The number after the last ####, or that line where it holds none; else the last number."""
    if "####" in response:
        line = (response.rsplit("####", 1)[1].strip().splitlines() or [""])[0].strip()
        match = pattern.search(line)
        return match[0] if match else line
    numbers = pattern.findall(response)
    return numbers[-1] if numbers else ""


def same_answer(given: str, expected: str) -> bool:
    """Equal as numbers where both are, else as text without case and outer spaces."""
    values = [number_of(text) for text in (given, expected)]
    if None not in values:
        return math.isclose(*values, rel_tol=1e-9)  # type: ignore[arg-type]
    return bool(given.strip()) and given.strip().casefold() == expected.strip().casefold()


def number_of(text: str) -> float | None:
    """A number, thousands separators and a currency sign allowed."""
    plain = text.strip().strip("$.").replace(",", "")
    return float(plain) if NUMBER.fullmatch(plain) else None


# --------------------------------------------------------------------------- numbers


def quantity_of(text: str) -> float | None:
    """A number as numeric_answer reads it: 1,234.5, -.5, 6e23, with a currency sign or a full stop;
    None where the text is anything else, or too large for a float.
    """
    plain = text.strip().lstrip("$").removesuffix(".")
    value = float(plain.replace(",", "")) if QUANTITY.fullmatch(plain) else math.inf
    return value if math.isfinite(value) else None


def close_answer(row: Prompt, response: str, tolerance: float) -> float:
    """1 where the final number is within tolerance times the size of the row's `answer`, else 0."""
    given = quantity_of(final_answer(response, QUANTITY))
    expected = quantity_of(str(row.columns["answer"]))
    if given is None or expected is None:
        return 0.0
    return float(abs(given - expected) <= tolerance * abs(expected))


# --------------------------------------------------------------------------- mathematics


def math_answer(row: Prompt, response: str) -> float | None:
    r"""1 where the response's answer (\boxed, else its last formula or number) equals the row's
    `answer` as mathematics, else 0; none where `answer` is no mathematics.
    """
    equal = _judge().equal(str(row.columns["answer"]), response)
    return None if equal is None else float(equal)


class MathJudge:
    """Asks the math-verify library, in a process of its own.

    Simplifying can take for ever (a tower of powers is enough), and a process is what can be ended
    from any thread of any system; the library's own limit is a signal to the main thread.
    """

    def __init__(self, seconds: float = MATH_SECONDS) -> None:
        self.seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str] = queue.Queue()
        self._lock = threading.Lock()
        atexit.register(self._end)

    def equal(self, expected: str, response: str) -> bool | None:
        """Whether the answers are equal, and known to be within the time limit; None where
        `expected` is no mathematics.
        """
        with self._lock:
            try:
                answer = self._answer(expected, response) or self._answer(expected, response)
            except queue.Empty:  # too slow
                answer = None
                self._end()
            if not answer:  # or it broke down over this answer twice
                return False
            equal: bool | None = json.loads(answer)
            return equal

    def _answer(self, expected: str, response: str) -> str:
        """The worker's line; empty where it broke down, after which another one is started."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([expected, response]) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=self.seconds)
        except OSError:
            line = ""
        if not line:
            self._end()
        return line

    def _start(self) -> None:
        worker = Path(__file__).with_name("math_worker.py")
        # Signals to all processes of a run are for the run, which finishes its step: the worker has
        # them blocked from its first instruction on, and SIGKILL ends it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_RUN)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(worker)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                process_group=0,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._lines = queue.Queue()
        threading.Thread(target=_read, args=(self._process, self._lines), daemon=True).start()
        try:
            ready = self._lines.get(timeout=START_SECONDS)
        except queue.Empty:
            ready = ""
        if not ready:
            self._end()
            raise RunError(
                "math_answer cannot start math-verify; try `python -c 'import math_verify'`"
            )

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                assert stream is not None
                stream.close()
        self._process = None


def _read(process: "subprocess.Popen[str]", lines: "queue.Queue[str]") -> None:
    """Lines of the worker as they come; an empty one at its end."""
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.put(line)
    except ValueError:  # closed meanwhile
        pass
    lines.put("")


@cache
def _judge() -> MathJudge:
    return MathJudge()
