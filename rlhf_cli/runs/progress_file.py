"""How far a run is, in its folder, for `rlhf-cli watch` in another terminal or on another machine.

Of use while the run goes on: it lies with the resume points, and goes with them.
"""

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_cli.config.errors import RunError
from rlhf_cli.folders.files import PART
from rlhf_cli.reporting.live import Progress
from rlhf_cli.runs.lock import check_lock
from rlhf_cli.runs.out_files import PROGRESS

EVERY = 1.0  # seconds between two writes, at least


class ProgressFile:
    """Hears of the bars of a run and writes them down; that it cannot ends no run."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._written = -EVERY

    def __call__(self, bars: Sequence[Progress]) -> None:
        """Write how far they are, unless that was done a moment ago."""
        if time.monotonic() - self._written < EVERY:
            return
        self._written = time.monotonic()
        file = self._out / PROGRESS
        part = file.with_name(f".{file.name}{PART}")
        with suppress(OSError, RunError):  # a folder that is another run's now: its logs will say
            check_lock(self._out)
            part.write_text(json.dumps([asdict(bar) for bar in bars]), encoding="utf-8")
            part.replace(file)


class Told(NamedTuple):
    """The bars of a run, the outermost first, and when they were written: seconds since the epoch,
    by the clock of the file system.
    """

    bars: list[Progress]
    at: float


def read_progress(out: Path) -> Told | None:
    """How far a run said that it is; None where it says nothing, or nothing that is understood."""
    file = out / PROGRESS
    try:
        at = file.stat().st_mtime
        said = json.loads(file.read_text(encoding="utf-8"))
        return Told([_bar(entry) for entry in said], at)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _bar(entry: dict[str, Any]) -> Progress:
    """Raises TypeError or KeyError for what is no bar."""
    bar = Progress(**{each.name: entry[each.name] for each in fields(Progress)})
    figures = (bar.total, bar.done, bar.before, bar.seconds)
    if not all(isinstance(each, int | float) for each in figures):
        raise TypeError("a count is no number")
    if not isinstance(bar.activity, str) or not isinstance(bar.note, str):
        raise TypeError("a text is no text")
    return bar
