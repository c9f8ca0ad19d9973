"""What is shown of texts that others wrote: rows, model output, templates, names of folders.

A terminal obeys escape sequences, and so do the pages that show logs of CI. They can hide lines,
change what was said before, and fill the clipboard. So control characters are shown, not sent.
"""

import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

LINE_ENDS = "\n\t"
# C0 and C1 controls; what turns the direction of writing; what ends a line for some readers; halves
# of characters, which no stream takes
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str, keep: str = LINE_ENDS) -> str:
    """A text with control characters as escapes: ESC is shown as \\x1b.

    Args:
        keep: control characters that stay.
    """
    return _CONTROLS.sub(lambda found: _escape(found[0], keep), text)


def on_one_line(text: str) -> str:
    """`printable`, for what must not begin a line of its own, such as a name."""
    return printable(text, keep="")


def _escape(character: str, keep: str) -> str:
    return character if character in keep else character.encode("unicode_escape").decode()


class Shown:
    """A stream whose controls are shown, whoever writes: libraries, and functions of users.

    Bars of other libraries begin a line anew with a carriage return, which stays.
    """

    def __init__(self, stream: IO[str]) -> None:
        self.obeyed = stream

    def write(self, text: str) -> int:
        start = "\r" * text.startswith("\r")
        self.obeyed.write(start + printable(text[len(start) :]))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        if name == "obeyed":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.obeyed, name)


def show_controls() -> None:
    """From now on controls are shown on stdout and stderr; what cannot be encoded is shown too."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Shown):
            with suppress(AttributeError, ValueError):  # no file, as in tests; or closed
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, cast(IO[str], Shown(stream)))


def obeyed(stream: IO[str]) -> IO[str]:
    """The stream below, for colours and bars of our own.

    Rich puts a stream of its own in the place of standard ones while it shows a bar, so that what
    others write lands above it.
    """
    while True:
        below = stream.obeyed if isinstance(stream, Shown) else proxied(stream)
        if below is None:
            return stream
        stream = below


def proxied(stream: IO[str]) -> IO[str] | None:
    """What rich has put a stream of its own in the place of; None where it has not."""
    below: IO[str] | None = getattr(stream, "rich_proxied_file", None)
    return below


def width(default: int = 100) -> int:
    """Columns of the terminal that somebody reads, or `default` where there is none.

    COLUMNS comes first. A pager reads standard output while the other streams still are the
    terminal's, and tables may go to a file that is opened in it.
    """
    said = os.environ.get("COLUMNS", "")
    if said.isdigit() and int(said):
        return int(said)
    for number in (1, 2, 0):
        with suppress(OSError):
            if columns := os.get_terminal_size(number).columns:
                return columns
    return default


def print_path(path: Path) -> None:
    """A path on stdout, for $(...) byte by byte; shown on a terminal."""
    raw = getattr(sys.stdout, "buffer", None)
    if raw is None or sys.stdout.isatty():  # no file; or closed from the start
        print(path, flush=True)
        return
    sys.stdout.flush()
    raw.write(os.fsencode(path) + b"\n")
    raw.flush()
