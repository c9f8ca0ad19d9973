"""`rlhf-cli watch RUN`: a run, or several, seen from another terminal or machine."""

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.config.errors import RunError, UserError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

    from rlhf_cli.views.watch import Watch

USAGE = """\
rlhf-cli watch: how far a run is, from another terminal or on a mounted disk.

Usage: rlhf-cli watch RUN [RUN ...] [--once]

  RUN     the folder of a stage, or one that holds several, such as runs/demo or a sweep: a line for
          each, and beneath them the one that is under way
  --once  show it as it is now; so it is where standard output is no terminal

It shows what a terminal shows of the run itself: progress, rate, time left and peak memory, the
course of three metrics, and a response beside the first one to the same prompt. It only reads, and
ends with the runs, a minute later in a folder in which a next one may begin, and on Ctrl-C. The
status is 1 where a run has died before its end."""
ONCE = "--once"
EVERY = 1.0  # seconds between two looks at the folders
DRAWN = 0.25  # seconds between two pictures: clocks go on, and the terminal may be resized
UNBOUNDED = 1000  # lines where no terminal bounds them
BETWEEN = 60.0  # seconds that the next run of a chain or sweep may take to begin


def run(words: list[str]) -> None:
    """Show runs until they have ended.

    Raises:
        UserError: a flag or folder is wrong.
        RunError: a run has ended without what it was to write.
    """
    if {"--help", "-h"} & set(words):
        print(USAGE)
        return
    folders, once = parse(words)
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"watch: no folder {folder}; give one that a stage writes, or wrote")
    from rlhf_cli.views.watch import Watch

    watch = Watch(folders)
    if not watch.runs:
        raise UserError(f"watch: no run in {', '.join(map(str, folders))}")
    if not show(watch, once):
        return
    dead = [each for each in watch.runs if not each.has_ended and not each.goes_on]
    if dead:
        raise RunError(f"{dead[0].folder} is {dead[0].state()}")


def parse(words: list[str]) -> tuple[list[Path], bool]:
    """The folders, and whether they are shown once.

    Raises:
        UserError: there is none, or a flag does not exist.
    """
    if wrong := [word for word in words if word.startswith("-") and word != ONCE]:
        raise UserError(f"watch: unknown flag {wrong[0]}; see rlhf-cli watch --help")
    folders = [Path(word) for word in words if word != ONCE]
    if not folders:
        raise UserError("watch takes the folder of a run: rlhf-cli watch runs/demo/ppo")
    return folders, ONCE in words


def show(watch: "Watch", once: bool) -> bool:
    """On a terminal again and again, on a page of its own, then once more where one was before;
    returns whether nobody left before the end.
    """
    from rich.console import Console
    from rich.live import Live

    from rlhf_cli.reporting.terminal import obeyed, width

    left: list[int] = []  # signals; an exception could come amid what the terminal is told
    console = Console(file=obeyed(sys.stdout), highlight=False, emoji=False)
    is_page = console.is_interactive and console.file.isatty()
    if is_page and not once and watch.goes_on:
        signal.signal(signal.SIGINT, lambda number, frame: left.append(number))
        with Live(Picture(watch), console=console, screen=True, auto_refresh=False) as live:
            follow(watch, live.refresh, left)
    columns = console.width if is_page else width()
    height = console.height if is_page else UNBOUNDED
    for line in watch.lines(columns, height - 1, console.options.ascii_only):
        console.print(line, soft_wrap=True)
    return not left


class Picture:
    """What is watched, as large as the terminal is when it is drawn."""

    def __init__(self, watch: "Watch") -> None:
        self._watch = watch

    def __rich_console__(
        self, console: "Console", options: "ConsoleOptions"
    ) -> "Iterator[RenderableType]":
        width, height = options.max_width, options.size.height
        if self._watch.goes_on or not self._watch.may_grow:
            yield from self._watch.lines(width, height, options.ascii_only)
            return
        yield from self._watch.lines(width, height - 1, options.ascii_only)
        yield "none goes on; a minute for the next one to begin, Ctrl-C leaves"[:width]


def follow(watch: "Watch", draw: Callable[[], None], left: Sequence[int]) -> None:
    """Look and draw until nothing goes on, or a signal is in `left`; in a folder of runs the next
    one may be yet to begin.
    """
    looked = alive = time.monotonic()
    while not left:
        draw()
        now = time.monotonic()
        if watch.goes_on:
            alive = now
        elif not watch.may_grow or now - alive > BETWEEN:
            return
        time.sleep(DRAWN)
        if now - looked >= EVERY:
            watch.look()
            looked = time.monotonic()
