"""Lines, progress bars and tables on stderr; plain lines where there is no terminal."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, TypeVar, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rlhf_cli.config.secrets import redacted
from rlhf_cli.reporting.grid import laid_out, show, wrapped
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


def say(line: str) -> None:
    """One line on stderr, fit to be seen: it may be what a user's function raised."""
    console.print(seen(line))


def seen(text: str) -> str:
    """A text as rich may show it: without secrets, controls and markup."""
    return escape(printable(redacted(text)))


class Bar:
    """Progress of one activity: count, rate and time left.

    Use as a context manager and call `advance`. An activity under a second leaves no line behind
    where there is no terminal.
    """

    def __init__(self, activity: str, total: int) -> None:
        self.activity = activity
        self.total = total
        self._done = 0
        self._before = 0
        self._note = ""
        self._began = self._shown = time.monotonic()
        self._progress: Progress | None = None

    def __enter__(self) -> "Bar":
        if console.is_terminal and self.total > 0:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._task = self._progress.add_task(
                seen(self.activity), total=self.total, rate="", note=""
            )
            self._progress.start()
            show_controls()  # of others, whose words now pass through rich
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        elif error[0] is None and self._seconds() >= 1.0:
            done = self._done - self._before
            rate = f" ({self._rate()})" if done else ""
            say(f"{self.activity}: {done} in {self._seconds():.1f} s{rate}")

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more are done; `note` is shown at the end of the line."""
        self._done += count
        self._note = note or self._note
        if self._progress is not None:
            self._progress.update(
                self._task, completed=self._done, rate=self._rate(), note=seen(self._note)
            )
        elif time.monotonic() - self._shown > PLAIN_SECONDS:
            self._shown = time.monotonic()
            rest = max(self.total - self._done, 0)  # a total may be a guess
            left = self._seconds() / max(self._done - self._before, 1) * rest
            rate = f"{self._rate()}, {left:.0f} s left" if self._rate() else "nothing done yet"
            say(f"{self.activity}: {self._done}/{self.total}, {rate}  {self._note}".rstrip())

    def skip(self, count: int) -> None:
        """`count` more were done before this run began, and took none of its time."""
        self._before += count
        self.advance(count)

    def _seconds(self) -> float:
        return max(time.monotonic() - self._began, 1e-9)

    def _rate(self) -> str:
        rate = (self._done - self._before) / self._seconds()
        if rate == 0:  # of a batch that takes long there is none yet
            return ""
        return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"


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
