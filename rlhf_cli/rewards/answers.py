"""Final answers of responses, compared with the row's `answer`: as text, number or mathematics.

It is the whole of an answer that is compared: 1/2 is not 1, 12:30 is not 12, 2 hours is not 2.
"""

import atexit
import json
import math
import queue
import re
import signal
import subprocess
import sys
import threading
from decimal import Decimal
from functools import cache
from pathlib import Path

from rlhf_cli.config.errors import RunError
from rlhf_cli.data.kinds import Prompt

MARK = "####"  # what follows the last one on its line is the answer
BOXED = r"\boxed{"
LATEX = {r"\$": "$", r"\%": "%", r"\!": "", "{,}": ",", r"\,": "\u2009"}
MINUS = str.maketrans(dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-"))
# Commas, or the spaces that typesetters use, stand between thousands only.
NUMBER = re.compile(
    r"([-+]?)\s?([$€£¥₹]?)\s?([-+]?)"
    r"((?:\d{1,3}(?:[,\u2009\u202f\xa0]\d{3})+|\d+)(?:\.\d*)?|\.\d+)((?:[eE][-+]?\d{1,3})?)"
    r"\s?([€£¥₹]?)"
)
THOUSANDS = str.maketrans("", "", ",\u2009\u202f\xa0")
WRAPPED = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"(?:\*{1,3}|__|`|[\"'\u201c\u2018])(.+?)(?:\*{1,3}|__|`|[\"'\u201d\u2019])",
        r"\${1,2}([^$]+)\${1,2}",
        r"\\\((.+)\\\)",
        r"\\\[(.+)\\\]",
        r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}",
    )
)
CLOSING_TAGS = re.compile(r"(?:\s*</[A-Za-z][^<>]*>)+\s*$")
# Between words: the 5 of `answer:5`, `x=5` and `<b>5</b>` is one, and so is 12:30.
BETWEEN = re.compile(r"</?[A-Za-z][^<>]*>|[\s=<>|\u2248\u2192\u21d2\u2014]+|(?<!\d):|:(?!\d)")
AROUND = ",;:!?\"'`*_~\u201c\u201d\u2018\u2019"  # of a word in a sentence
BRACKETS = (("(", ")"), ("[", "]"), ("{", "}"))

MATH_SECONDS = 5.0  # for one answer; what takes longer is not shown to be equal
START_SECONDS = 120.0
FOR_THE_RUN = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def exact_answer(row: Prompt, response: str) -> float:
    """1 where the response's final answer (the line after the last ####; without one the last
    \\boxed, the last word with a digit, or all of it) is the row's `answer` as text without case,
    or the whole of both is the same number; 0 elsewhere.
    """
    expected = str(row.columns["answer"])
    said_no_more = MARK not in response and same_text(response, expected)
    return float(said_no_more or same_answer(final_answer(response), expected))


def final_answer(response: str) -> str:
    """The line after the last ####, else what is in the last \\boxed, else the last word with a
    digit; empty where there is none.
    """
    if MARK in response:
        lines = response.rsplit(MARK, 1)[1].strip().splitlines() or [""]
        line = CLOSING_TAGS.sub("", lines[0]).strip()
        return line if (inside := boxed(line)) is None else inside
    if (inside := boxed(response)) is not None:
        return inside
    words = (word for word in reversed(BETWEEN.split(response)) if re.search(r"\d", word))
    return trimmed(next(words, ""))


def boxed(text: str) -> str | None:
    """What is within the last \\boxed{...}; None where there is none, or it has no end."""
    _, found, rest = text.rpartition(BOXED)
    depth = 1
    for place, mark in enumerate(rest if found else ""):
        depth += (mark == "{") - (mark == "}")
        if not depth:
            return rest[:place]
    return None


def trimmed(word: str) -> str:
    """A word without the punctuation of its sentence, and without brackets that are not its own."""
    before = None
    while word != before:
        before = word
        word = word.strip(AROUND).rstrip(".").removeprefix("\\(").removesuffix("\\)")
        for opening, closing in BRACKETS:
            if word.endswith(closing) and (word.startswith(opening) or opening not in word):
                word = word[:-1]
            if word.startswith(opening) and closing not in word:
                word = word[1:]
    return word


def same_answer(given: str, expected: str) -> bool:
    """Equal as text, or as numbers where the whole of both is one."""
    return same_text(given, expected) or same_number(given, expected)


def same_text(given: str, expected: str) -> bool:
    """Equal but for case, blanks, marks around and a full stop at the end; nothing is no answer."""
    return bool(plain(given)) and squeezed(given) == squeezed(expected)


def squeezed(text: str) -> str:
    """An answer in lower case, with no blanks but single ones between words."""
    words = " ".join(plain(text).split())
    return re.sub(r"\s*([^\w\s.])\s*", r"\1", words).casefold()


def plain(text: str) -> str:
    """An answer without what only marks it as one: bold, quotes, formula, box, a full stop."""
    for marked, meant in LATEX.items():
        text = text.replace(marked, meant)
    text, before = text.translate(MINUS), None
    while text != before:
        before = text = text.strip()
        if text.startswith(BOXED) and text.endswith("}") and boxed(text) == text[len(BOXED) : -1]:
            text = text[len(BOXED) : -1]
        for wrapped in WRAPPED:
            if (match := wrapped.fullmatch(text)) is not None:
                text = match[1]
        text = text.rstrip(".,;:!")
    return text


# --------------------------------------------------------------------------- numbers


def same_number(given: str, expected: str) -> bool:
    """Whether the whole of both is one number: 1,234.50 is 1234.5 and $5 is 5, but not €5."""
    ours, theirs = number_of(given), number_of(expected)
    if ours is None or theirs is None or (ours[1] and theirs[1] and ours[1] != theirs[1]):
        return False
    if ours[0] == theirs[0]:
        return True
    whole = all(value == value.to_integral_value() for value in (ours[0], theirs[0]))
    return not whole and math.isclose(ours[0], theirs[0], rel_tol=1e-9)


def number_of(text: str) -> tuple[Decimal, str] | None:
    """The number that the whole of an answer is, and its currency sign, if it has one."""
    match = NUMBER.fullmatch(plain(text))
    if match is None or (match[1] and match[3]) or (match[2] and match[6]):
        return None
    sign, currency = match[1] or match[3], match[2] or match[6]
    return Decimal(sign + match[4].translate(THOUSANDS) + match[5]), currency


def quantity_of(text: str) -> float | None:
    """The number that a text is, as 1,234.5, -.5 or 6e23, with a currency sign or a full stop; None
    where the text is anything else, or too large for a float.
    """
    number = number_of(text)
    value = math.inf if number is None else float(number[0])
    return value if math.isfinite(value) else None


def close_answer(row: Prompt, response: str, tolerance: float) -> float:
    """1 where the final answer is a number within tolerance times the size of the row's `answer`,
    else 0.
    """
    given = quantity_of(final_answer(response))
    expected = quantity_of(str(row.columns["answer"]))
    if given is None or expected is None:
        return 0.0
    return float(abs(given - expected) <= tolerance * abs(expected))


# --------------------------------------------------------------------------- mathematics


def math_answer(row: Prompt, response: str) -> float | None:
    r"""1 where the response's answer (the line after the last ####, else \boxed, else its last
    formula or number) equals the row's `answer` as text or mathematics, else 0; none where `answer`
    is no mathematics.
    """
    expected = str(row.columns["answer"])
    marked = MARK in response
    equal = _judge().equal(expected, formula(final_answer(response)) if marked else response)
    if equal is None:
        return None
    return float(equal or same_text(final_answer(response) if marked else response, expected))


def formula(answer: str) -> str:
    """An answer marked as one formula, so that the whole of it is read."""
    return f"${plain(answer)}$"


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
