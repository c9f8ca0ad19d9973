"""Who keeps whom waiting: ranks meet in the same order, and each counts its meetings.

A thread of each rank writes the count to the store that they share, and where its main thread is.
A meeting itself costs a counter. Who has been at one for long, and sees a rank that has not come,
says which and where that is; in the end the run ends with that line rather than never. Ranks that
do work for all are waited for without end, as long as their threads are heard of.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType

from torch.distributed.distributed_c10d import Store

from rlhf_cli.config.errors import PeerLost
from rlhf_cli.ranks.causes import is_echo
from rlhf_cli.ranks.environment import has_keeper

PACKAGE = Path(__file__).parents[1]
PATIENCE = 60.0  # seconds, after which a rank that waits says so
OFTEN = 5.0  # seconds between two looks
WORK = 0.2  # seconds of a processor by which a process shows that it does not only wait
DISTRIBUTED = os.path.join("torch", "distributed", "")
TO_HEAR = 3.0  # seconds within which a rank that failed is heard of


class Watch(threading.Thread):
    """The watch of one rank."""

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        seconds: float,
        say: Callable[[str], None],
        end: Callable[[str], None],
    ) -> None:
        """Start it.

        Args:
            store: of this watch alone, for a thread that waits in one keeps others out.
            seconds: that a rank is waited for.
            say: takes a line, of the first rank that waits.
            end: ends the process with a line.
        """
        super().__init__(daemon=True, name="rlhf-cli watch")
        self.store, self.rank, self.size, self.seconds = store, rank, size, seconds
        self._say, self._end = say, end
        self._count, self._what, self._since = 0, "the start", time.monotonic()
        self._main = threading.get_ident()
        self._idle, self._spent = time.monotonic(), 0.0
        self._leads = False
        self._heard: dict[int, tuple[bytes, float]] = {}  # by rank: what it wrote last, since when
        self._done = threading.Event()
        self._keeper = os.getppid() if has_keeper() else None
        self.start()

    @contextmanager
    def leading(self) -> Iterator[None]:
        """This rank is at work that others wait for, however long it takes."""
        self._leads = True
        try:
            yield
        finally:
            self._leads = False

    @contextmanager
    def meeting(self, what: str) -> Iterator[None]:
        """A meeting of all ranks.

        Raises:
            PeerLost: another rank is gone, or did not come.
        """
        self._count, self._what, self._since = self._count + 1, what, time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if not is_echo(error):
                raise
            text = str(error).partition("\n")[0].partition(". This is typically")[0]
            raise PeerLost(f"the ranks could not meet ({what}): {text}") from error

    def end(self) -> None:
        """No more of it."""
        self._done.set()

    def knows_cause(self) -> bool:
        """Whether a rank has said why it failed."""
        with suppress(RuntimeError):
            return bool(self.store.check(["cause"]))
        return False

    def is_first(self, line: str, echo: bool) -> bool:
        """Whether this rank is the one to say why the run ends; all that fail ask.

        An echo is said by rank 0, and only where no rank is heard of that failed by itself; what
        all ranks say is said by rank 0.
        """
        with suppress(RuntimeError):
            if not echo:
                self.store.set(f"cause/{self.rank}", line)
                self.store.set("cause", line)
            key = "cause" if echo else "cause/0"
            if echo and self.rank:
                return False
            if not echo and self.rank == 0:
                return True
            try:
                self.store.wait([key], timedelta(seconds=TO_HEAR))
            except RuntimeError:
                return True
            return not echo and self.store.get(key).decode() != line
        return self.rank == 0

    def run(self) -> None:
        """Look around until the end."""
        told_at = -1
        patience = min(PATIENCE, self.seconds / 2)
        while not self._done.wait(min(OFTEN, patience / 4)):
            if (
                self._keeper is not None and os.getppid() != self._keeper
            ):  # where no signal of the kernel's tells it
                os._exit(1)
            count, what = self._count, self._what
            at_it, stuck = time.monotonic() - self._since, self._stuck_for()
            missing: dict[int, str] = {}
            try:
                self._write(stuck is not None)
                if (waited := at_it) > patience:
                    missing = self._missing(count, met=True)
                if not missing and stuck is not None and (waited := stuck) > patience:
                    missing = self._missing(count, met=False)
            except RuntimeError:  # the store is gone with its rank, of which others tell
                continue
            if not missing or count != self._count:
                continue
            line = f"waited {waited:.0f} s for {', '.join(missing.values())} ({what})"
            at_work = {*map(self._is_at_work, missing)} == {True}
            if waited > self.seconds and not at_work:
                self._end(f"{line}; hardware.rank_timeout={self.seconds:.0f} is over")
            elif told_at != count:
                told_at = count
                if self.rank == min(set(range(self.size)) - missing.keys()):
                    until = "" if at_work else f"; the run ends after {self.seconds:.0f} s"
                    self._say(f"{line}{until}")

    def _stuck_for(self) -> float | None:
        """Seconds for which nothing was done but to be in a collective of torch's, such as those of
        sharded weights, which are no meetings; None where the main thread is in none.
        """
        spent = time.process_time()
        inside = is_in_collective(sys._current_frames().get(self._main))
        if not inside or spent - self._spent > WORK:
            self._spent, self._idle = spent, time.monotonic()
        return time.monotonic() - self._idle if inside else None

    def _write(self, inside: bool) -> None:
        place = place_of(sys._current_frames().get(self._main))
        told = {"count": self._count, "place": place, "inside": inside, "at": time.time()}
        told["leads"] = self._leads
        self.store.set(f"rank/{self.rank}", json.dumps(told))

    def _is_at_work(self, rank: int) -> bool:
        """Whether it does what all wait for, and was heard of within the time of a meeting."""
        key = f"rank/{rank}"
        told = self.store.get(key) if self.store.check([key]) else b""
        before, since = self._heard.get(rank, (b"", 0.0))
        if told != before:
            since = time.monotonic()
        self._heard[rank] = told, since
        lately = time.monotonic() - since < self.seconds
        return bool(told) and lately and bool(json.loads(told).get("leads"))

    def _missing(self, count: int, met: bool) -> dict[int, str]:
        """The ranks that this one waits for, in words that say where they are.

        Args:
            met: at its meeting of this number: for those that have met less often. Else in a
                collective that is no meeting: for those that are in none.
        """
        missing = {}
        for rank in range(self.size):
            if not self.store.check([f"rank/{rank}"]):
                missing[rank] = f"rank {rank}, not heard of"
                continue
            told = json.loads(self.store.get(f"rank/{rank}"))
            behind = told["count"] < count
            elsewhere = told["count"] == count and not told["inside"] and rank != self.rank
            if behind if met else elsewhere:
                ago = time.time() - told["at"]
                silent = f", not heard of for {ago:.0f} s" if ago > 4 * OFTEN else ""
                missing[rank] = f"rank {rank}, which is in {told['place']}{silent}"
        return missing


def is_in_collective(frame: FrameType | None) -> bool:
    """Whether a thread is in torch.distributed."""
    while frame is not None:
        if DISTRIBUTED in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def place_of(frame: FrameType | None) -> str:
    """Where a thread is, by the innermost line of ours, or of whatever it runs."""
    first = frame
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE) and file.parent.name != "ranks":
            return f"{file.relative_to(PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    if first is None:
        return "no code"
    return f"{first.f_code.co_filename}:{first.f_lineno} {first.f_code.co_name}"
