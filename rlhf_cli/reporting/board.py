"""The lower edge of a terminal: the bars that are under way, and what is known of their run.

Lines that are said meanwhile, whoever says them, pass above it. Where nobody looks on there is no
edge, and bars say plain lines instead (console.py).
"""

import os
from collections.abc import Callable, Sequence

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from rlhf_cli.reporting.live import Course, Progress, View, drawn, figure_lines

NO = ("", "0", "false")  # CI=..., as services set it
CUT_BY, LINUX = {"XTERM_VERSION", "STY"}, "linux"  # xterm, screen, and the console of Linux


class Board:
    """What this process shows.

    job: which one of a sweep it is; "" outside of one.
    heard_by: is told of the bars as they advance, the outermost first; None where nobody asks.
    """

    def __init__(self, console: Console) -> None:
        self.job = ""
        self.heard_by: Callable[[Sequence[Progress]], None] | None = None
        self._console = console
        self._view = View()
        self._bars: list[Callable[[], Progress]] = []
        self._edge: _Edge | None = None

    def is_live(self) -> bool:
        """Whether a person looks on: a terminal that can move its cursor, and no log of CI."""
        in_ci = os.environ.get("CI", "").lower() not in NO
        return self._console.is_interactive and self._console.file.isatty() and not in_ci

    def shows_samples(self) -> bool:
        """Whether responses are seen here as they are logged, so that no table need show them."""
        return self._view.course is not None

    def begin(self, title: str, stage: str) -> Course | None:
        """Bars belong to another run from now on; returns what is to hear its logs, if anything."""
        self.heard_by = None
        course = Course(stage) if self.is_live() else None
        self._view = View(", ".join(filter(None, (title, self.job))), course=course)
        return course

    def tell_of_signal(self, line: str, status: int | None) -> bool:
        """Show what a signal does to a run that goes on; False where there is no edge to show it.

        Nothing is drawn or waited for: whatever the signal interrupted may have the locks.
        """
        if self._edge is None or status is not None:
            return False
        self._view.notes.append(line)
        return True

    def open(self, bar: Callable[[], Progress]) -> bool:
        """A bar begins, inside those that are open already; returns whether it is shown here."""
        self._bars.append(bar)
        if self._edge is None and self.is_live():
            self._edge = _Edge(self._console, self._now)
            self._edge.start()
        return self._edge is not None

    def close(self, bar: Callable[[], Progress]) -> bool:
        """A bar has ended. After the last one the figures of its run stay; whether they do."""
        self._bars.remove(bar)
        if self._bars or self._edge is None:
            return False
        self._edge.stop()
        self._edge = None
        for note in self._view.notes:
            self._console.print(Text(note))
        self._view.notes = []
        course = self._view.course
        if course is None or not course.figures():
            return False
        self._view.course = None
        width, plain = self._console.width - 1, self._console.options.ascii_only
        for line in figure_lines(course, width, plain):
            self._console.print(line)
        return True

    def advanced(self) -> None:
        """Some bar did."""
        if self.heard_by is not None:
            self.heard_by([bar() for bar in self._bars])

    def _now(self) -> View:
        self._view.bars = [bar() for bar in self._bars]
        return self._view


class _Frame:
    """What rich draws.

    shape: the columns of the terminal, and those that each line took there.
    """

    def __init__(self, now: Callable[[], View]) -> None:
        self._now = now
        self.shape: tuple[int, list[int]] = (0, [])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width - 1  # some terminals break a line that is full
        lines = drawn(self._now(), width, options.size.height - 1, options.ascii_only)
        self.shape = (options.max_width, [line.cell_len for line in lines])
        yield from lines


class _Edge(Live):
    """A frame that is drawn again and again in its place, and gone once it is stopped."""

    def __init__(self, console: Console, now: Callable[[], View]) -> None:
        self._frame = _Frame(now)
        super().__init__(self._frame, console=console, transient=True)

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """What rich does, and before it: a terminal that was made narrower has broken the lines of
        the last frame, which begins further up then. Few cut them instead.
        """
        before, cells = self._frame.shape
        now = self.console.width
        breaks = now < before and not (CUT_BY & set(os.environ) or os.environ.get("TERM") == LINUX)
        more = sum((each - 1) // now for each in cells if each) if breaks else 0
        up = [(ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)] * more
        return [Control(*up), *super().process_renderables(renderables)]
