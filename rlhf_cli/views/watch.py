"""What `rlhf-cli watch` shows: runs as their folders tell of them, read again while they go on."""

import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from rich.text import Text

from rlhf_cli.config.stages import place_in_chain
from rlhf_cli.reporting.grid import laid_out, show
from rlhf_cli.reporting.live import METRICS, SAMPLES, Course, View, clipped, clock, drawn
from rlhf_cli.runs.lineage import Node, command_of, read_node, runs_in
from rlhf_cli.runs.lock import writer_of
from rlhf_cli.runs.out_files import CONFIG
from rlhf_cli.runs.progress_file import Told, read_progress

FINISHED, RUNNING, STOPPED = "finished", "running", "stopped"  # as the state of a run begins
AWAY = 60.0  # seconds of silence after which a run that no process here has is taken for dead
STEPS = 3.0  # of its own, where those take longer
MOST = 4 << 20  # bytes of a log of samples that are read at its start, and as many at its end
FEWEST = 8  # lines for the run that goes on, beneath a list of runs


class Tail:
    """The objects of a log, each given once, while a run appends to it."""

    def __init__(self, file: Path, most: int | None = None) -> None:
        """`most`: bytes of either end that are read of a long file; None reads all."""
        self._file, self._most = file, most
        self._at = 0
        self._begun = b""  # of a line that is not whole yet

    def new(self) -> tuple[bool, list[dict[str, Any]]]:
        """Whether the file was cut back, so that all before is void, and the new objects."""
        try:
            size = self._file.stat().st_size
            cut = size < self._at
            if cut:
                self._at, self._begun = 0, b""
            with self._file.open("rb") as stream:
                text = self._read(stream, size)
        except OSError:
            return False, []
        *whole, self._begun = text.split(b"\n")
        return cut, [row for line in whole if (row := _object(line)) is not None]

    def _read(self, stream: BinaryIO, size: int) -> bytes:
        """What was appended, after the part of a line that was there before."""
        start, self._at = self._at, size
        stream.seek(start)
        if self._most is None or size - start <= 2 * self._most:
            return self._begun + stream.read(size - start)
        head = self._begun + stream.read(self._most)
        stream.seek(size - self._most)
        return head + b"\n" + stream.read(self._most)  # the lines that are cut there are no JSON


def _object(line: bytes) -> dict[str, Any] | None:
    with suppress(ValueError):
        row = json.loads(line)
        return row if isinstance(row, dict) else None
    return None


class Watched:
    """A run that is looked at again and again.

    node: its state when it was last looked at. told: how far it says that it is, if it does.
    heard: when it last wrote, in seconds since the epoch.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.node: Node = read_node(folder, lambda kind, place: None)
        self._begin_anew()
        self.look()

    def _begin_anew(self) -> None:
        self.course = Course(self.node.stage or "")
        self._tails = {METRICS: Tail(self.folder / METRICS)}
        self._tails[SAMPLES] = Tail(self.folder / SAMPLES, MOST)

    def look(self) -> None:
        """Read what is new."""
        self.node = read_node(self.folder, lambda kind, place: None)
        self.told: Told | None = read_progress(self.folder)
        self.heard = self.told.at if self.told else 0.0
        for name in (CONFIG, METRICS, SAMPLES):
            with suppress(OSError):
                self.heard = max(self.heard, (self.folder / name).stat().st_mtime)
        for name, tail in self._tails.items():
            cut, rows = tail.new()
            if cut:
                self._begin_anew()
                self.look()
                return
            for row in rows:
                self.course.hear(name, row)

    @property
    def silence(self) -> float:
        """Seconds since it last wrote."""
        return max(time.time() - self.heard, 0.0)

    @property
    def goes_on(self) -> bool:
        """Whether a process has it, or seems to on another machine, whose locks are not seen."""
        if self.node.state.startswith(RUNNING):
            return True
        host = writer_of(self.folder).rpartition(" on ")[2]
        if not host or host == socket.gethostname():
            return False
        bars = self.told.bars if self.told else []
        step = max((bar.seconds / max(bar.done - bar.before, 1) for bar in bars), default=0.0)
        return self.node.state.startswith("unfinished") and self.silence < max(AWAY, STEPS * step)

    @property
    def has_ended(self) -> bool:
        """Whether it wrote what it was to write."""
        return self.node.state.startswith((FINISHED, STOPPED))

    def state(self) -> str:
        """In words."""
        said = self.node.state
        if self.has_ended:
            return said if self.node.seconds is None else f"{said} in {clock(self.node.seconds)}"
        if said.startswith(RUNNING) or not said.startswith("unfinished"):
            return said
        if self.goes_on:
            return f"running ({writer_of(self.folder)}, which wrote {ago(self.silence)})"
        return f"{said}; no process has it, and it last wrote {ago(self.silence)}"

    def view(self) -> View:
        """All that is shown of it."""
        title = f"{self.folder}, {self.node.stage or 'no stage is known'}: {self.state()}"
        notes = []
        if not self.has_ended and not self.goes_on and (command := command_of(self.folder)):
            notes.append(f"the same command goes on: {command}")
        if not self.course.figures() and self.node.figures:
            notes.append(", ".join(f"{name} {show(v)}" for name, v in self.node.figures.items()))
        bars = []
        if self.told is not None and self.goes_on:
            here = self.node.state.startswith(RUNNING)  # else the clocks may be two
            since = max(time.time() - self.told.at, 0.0) if here else 0.0
            bars = [replace(bar, seconds=bar.seconds + since) for bar in self.told.bars]
        return View(title, notes, bars, self.course)

    def row(self, name: str) -> list[str]:
        """What a list of runs says of it."""
        bar = self.told.bars[0] if self.told and self.told.bars else None
        done = f"{bar.done}/{bar.total}" if bar and not self.has_ended else "-"
        left = bar.left() if bar and self.goes_on else None
        figures = [(each, show(series.last)) for each, series in self.course.figures()]
        figures = figures or [(each, show(value)) for each, value in self.node.figures.items()]
        figure = " ".join(figures[0]) if figures else "-"
        state = "running" if self.goes_on else self.node.state.partition(" (")[0]
        return [name, self.node.stage or "-", state, done, clock(left) if left else "-", figure]


def ago(seconds: float) -> str:
    """12 s ago, 14 min ago, 3 h ago, 2 days ago."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def absolute(folder: Path) -> str:
    """A folder by one name, however it was given."""
    return os.path.abspath(folder)


class Watch:
    """The runs in and below folders; those that begin meanwhile too."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self.runs: list[Watched] = []
        self.look()

    def look(self) -> None:
        """Read what is new. What has ended is read no more."""
        known = {absolute(run.folder) for run in self.runs}
        for run in self.runs:
            if not run.has_ended or not run.folder.is_dir():
                run.look()
        found = {absolute(each): each for each in runs_in(self._folders)}
        self.runs += [Watched(each) for place, each in found.items() if place not in known]
        self.runs.sort(key=lambda run: (place_in_chain(run.node.stage), str(run.folder)))

    @property
    def may_grow(self) -> bool:
        """Whether one may begin in a folder that is watched: the next of a chain or sweep."""
        known = {absolute(run.folder) for run in self.runs}
        return any(absolute(folder) not in known for folder in self._folders)

    @property
    def goes_on(self) -> bool:
        """Whether any run does."""
        return any(run.goes_on for run in self.runs)

    def lines(self, width: int, height: int, plain: bool = False) -> list[Text]:
        """Of one run all there is; of several a list, and beneath it the one that wrote last."""
        if len(self.runs) == 1:
            return drawn(self.runs[0].view(), width, height, plain)
        going = [run for run in self.runs if run.goes_on]
        room = height - 1 - (FEWEST if going else 0)
        lines = self._list(width, max(room, 1), plain)
        if going and height - len(lines) > 1:
            newest = max(going, key=lambda run: run.heard)
            below = drawn(newest.view(), width, height - len(lines) - 1, plain)
            lines = [*lines, Text(), *below]
        return lines[:height]

    def _list(self, width: int, room: int, plain: bool) -> list[Text]:
        """A line for each run; where there are more than fit, those that go on and the newest."""
        runs = self.runs
        if len(runs) > room - 2:  # beneath a title and the heads
            first = sorted(runs, key=lambda run: (run.goes_on, run.heard), reverse=True)
            kept = first[: max(room - 3, 0)]
            runs = [run for run in runs if run in kept]
        top = os.path.commonpath([os.path.dirname(absolute(run.folder)) for run in self.runs])
        heads = ["run", "stage", "state", "done", "left", "figure"]
        rows = [run.row(os.path.relpath(run.folder, top)) for run in runs]
        table = laid_out(heads, rows, max(width, 10_000))
        lines = [Text(clipped(line, width, plain)) for line in table]
        if left := len(self.runs) - len(runs):
            lines.append(Text(f"and {left} more", style="dim"))
        shown = min(top, os.path.relpath(top), key=len)
        title = clipped(f"{len(self.runs)} runs in {shown}", width, plain)
        return [Text(title, style="bold"), *lines][:room]
