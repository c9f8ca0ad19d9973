"""Lines, progress bars and tables on stderr; plain lines where there is no terminal.

On a terminal bars keep its lower edge, with what is known of the run that they belong to.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, TypeVar, cast

from rich.console import Console
from rich.markup import escape

from rlhf_cli.config.secrets import redacted
from rlhf_cli.reporting.board import Board
from rlhf_cli.reporting.grid import laid_out, show, wrapped
from rlhf_cli.reporting.live import Progress
from rlhf_cli.reporting.terminal import obeyed, printable, show_controls, width

PLAIN_SECONDS = 10.0  # without a terminal, a line at most this often

Item = TypeVar("Item")


class _Listeners:
    """sys.stderr while anybody reads it, then nothing: a run outlives its terminal and its `tee`.

    Rich asks for more than is written here, such as whether it is a terminal.
    """

    @property
    def rich_proxied_file(self) -> "_Listeners":
        """Rich asks for the stream below the one that it writes to: it is here that ours begins."""
        return self

    def write(self, text: str) -> int:
        with outliving_stderr():
            obeyed(sys.stderr).write(text)
        return len(text)

    def flush(self) -> None:
        with outliving_stderr():
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


@contextmanager
def outliving_stderr() -> Iterator[None]:
    """Where nothing can be written to stderr any more, all that is said from now on is dropped."""
    try:
        yield
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


console = Console(file=cast(IO[str], _Listeners()), highlight=False, soft_wrap=True, emoji=False)
board = Board(console)


def say(line: str) -> None:
    """One line on stderr, fit to be seen: it may be what a user's function raised."""
    console.print(seen(line))


def seen(text: str) -> str:
    """A text as rich may show it: without secrets, controls and markup."""
    return escape(printable(redacted(text)))


class Bar:
    """Progress of one activity: count, rate and time left.

    Use as a context manager and call `advance`. An activity under a second leaves no line behind.
    """

    def __init__(self, activity: str, total: int) -> None:
        self.activity = activity
        self.total = total
        self._done = 0
        self._before = 0
        self._note = ""
        self._began = self._shown = time.monotonic()
        self._on_board = False

    def __enter__(self) -> "Bar":
        if self.total > 0:
            self._on_board = board.open(self.progress)
        if self._on_board:
            show_controls()  # of others, whose words now pass through rich
        return self

    def __exit__(self, *error: object) -> None:
        told = self.total > 0 and board.close(self.progress)
        state = self.progress()
        if not told and error[0] is None and state.seconds >= 1.0:
            rate = f" ({state.rate()})" if state.rate() else ""
            say(f"{self.activity}: {self._done - self._before} in {state.seconds:.1f} s{rate}")

    def progress(self) -> Progress:
        """How far it is now."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        return Progress(self.activity, self.total, self._done, self._before, seconds, self._note)

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more are done; `note` is shown at the end of the line."""
        self._done += count
        self._note = note or self._note
        board.advanced()
        if not self._on_board and time.monotonic() - self._shown > PLAIN_SECONDS:
            self._shown = time.monotonic()
            state = self.progress()
            left = state.left()
            rate = "nothing done yet" if left is None else f"{state.rate()}, {left:.0f} s left"
            say(f"{self.activity}: {self._done}/{self.total}, {rate}  {self._note}".rstrip())

    def skip(self, count: int) -> None:
        """`count` more were done before this run began, and took none of its time."""
        self._before += count
        self.advance(count)


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table as wide as the terminal takes; floats with four digits, None as a dash.

    Args:
        title: stands above it; "" where its heads say enough.
    """
    cells = [[printable(redacted(show(value))) for value in row] for row in rows]
    names = [printable(redacted(head)) for head in heads]
    above = wrapped(printable(redacted(title)), width()) if title else []
    lines = [f"[bold]{escape(line)}[/bold]" for line in above]
    console.print("\n".join([*lines, *map(escape, laid_out(names, cells, width()))]))
