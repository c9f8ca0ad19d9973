"""Labels by lines that are typed: over ssh, in a terminal, through a pipe.

Tasks are shown on stderr, with control characters as escapes: what a model wrote is never sent to
the terminal as it is.
"""

import sys
import time
from collections.abc import Iterator, Sequence

from rlhf_cli.labelling.answers import MARKS, Wrong, rating, read
from rlhf_cli.labelling.desk import Desk
from rlhf_cli.labelling.tasks import INSTRUCTGPT, PAIR, RANK, SINGLE, STEPS, THUMBS, Turn, spoken
from rlhf_cli.reporting.console import console, outliving_stderr, say

BEST_FIRST = "best first, = for ties, as in 2 1=3 4"
HOW = {
    RANK: BEST_FIRST,
    PAIR: "1 2 3 4: A is much, clearly, somewhat, slightly better; 5: a tie; 6: both bad; "
    "7 8 9 0: B is slightly, somewhat, clearly, much better",
    THUMBS: "y: good; n: bad",
    INSTRUCTGPT: "a line for each response, 1 to 7 and the marks that it has, as in 6 h o; then "
    f"all of them {BEST_FIRST}. " + "; ".join(f"{key}: {text}" for key, (_, text) in MARKS.items()),
    STEPS: "the number of the first step that is wrong; 0: none is",
}
ALWAYS = (
    "s [WHY]: skip; f [WHY]: flag what should enter no data; m TEXT: a note with the next answer; "
    "u: take the last line or answer back; ?: instructions; q: stop here, the same command goes on"
)
LEFT_OUT = ("s", "f")  # what is skipped or flagged
NUMBERS = "123456789"
NAMES = {RANK: NUMBERS, PAIR: "AB", THUMBS: " ", INSTRUCTGPT: NUMBERS, STEPS: " "}


def label(desk: Desk, instructions: str | None, lines: Iterator[str] | None = None) -> None:
    """Ask for answers until there is no turn left, or nothing more is typed.

    Args:
        lines: what is typed; None reads standard input.
    """
    typed = stdin_lines() if lines is None else lines
    if desk.current is not None:
        say(f"{desk.who}: {desk.left} of {len(desk.turns)} tasks to label")
        help_on(desk.terms.protocol, instructions)
    while (turn := desk.current) is not None:
        show(turn, desk)
        if not _answered(desk, turn, instructions, typed):
            return


def _answered(desk: Desk, turn: Turn, instructions: str | None, typed: Iterator[str]) -> bool:
    """Read lines until a turn is answered or the answer before taken back; False at the end."""
    began, note = time.monotonic(), ""
    ratings: list[str] = []  # of instructgpt, a line for each response
    for line in next_lines(desk, turn, ratings, typed):
        word, _, rest = line.strip().partition(" ")
        if not word:
            continue
        if word == "q":
            return False
        if word == "?":
            help_on(desk.terms.protocol, instructions)
        elif word == "m":
            note = rest.strip()
        elif word == "u" and ratings:
            ratings.pop()
        elif word == "u":
            if desk.undo() is not None:
                return True
            say("nothing to take back")
        else:
            try:
                if word not in LEFT_OUT and rates(desk, turn, ratings):
                    rating(line)
                    ratings.append(line.strip())
                    continue
                said = [line] if word in LEFT_OUT else [*ratings, line]
                answer = read("\n".join(said), turn, desk.terms.protocol)
            except Wrong as why:
                say(f"{why}; ? shows what can be typed")
                continue
            desk.answer(turn, answer, note, time.monotonic() - began)
            return True
    return False


def rates(desk: Desk, turn: Turn, ratings: Sequence[str]) -> bool:
    """Whether the next line is to rate a response."""
    return desk.terms.protocol == INSTRUCTGPT and len(ratings) < len(turn.order)


def next_lines(
    desk: Desk, turn: Turn, ratings: Sequence[str], typed: Iterator[str]
) -> Iterator[str]:
    """Lines as they are typed; where several make an answer, which one is next is said before."""
    while True:
        if rates(desk, turn, ratings):
            say(f"response {len(ratings) + 1}: 1 to 7, and marks")
        elif desk.terms.protocol == INSTRUCTGPT:
            say(f"all: {BEST_FIRST}")
        line = next(typed, None)
        if line is None:
            return
        yield line


def show(turn: Turn, desk: Desk) -> None:
    """A task: its prompt, and its responses under names that say nothing."""
    protocol = desk.terms.protocol
    number = len(desk.turns) - desk.left + 1
    say(f"\n── {number} of {len(desk.turns)} " + "─" * 30)
    for role, text in spoken(turn.task):
        say(f"{role}: {text}" if role else text)
    for name, place in zip(NAMES[protocol], turn.order, strict=False):
        origin = turn.task.origins[place]
        cut = "  [cut at the most tokens]" if origin.get("finish_reason") == "length" else ""
        head = "response" if protocol in SINGLE else name
        say(f"\n[{head}]{cut}")
        steps = [f"{number}: {step}" for number, step in enumerate(turn.task.steps, 1)]
        say("\n".join(steps) or turn.task.responses[place])


def help_on(protocol: str, instructions: str | None) -> None:
    """What to judge by, and what can be typed."""
    if instructions is not None:
        say(instructions)
    say(HOW[protocol])
    say(ALWAYS)


def stdin_lines() -> Iterator[str]:
    """Lines of standard input as they come, each asked for by a mark where somebody sits there."""
    if sys.stdin is None:
        return
    while True:
        if sys.stdin.isatty():
            with outliving_stderr():
                console.print("> ", end="")
        line = sys.stdin.readline()
        if not line:
            return
        yield line
