"""The trackers of a run, each in a process of its own, so that none can stop or slow it.

What a tracker imports, waits for, retries or breaks is its process's affair: the run puts rows into
a queue and goes on. Of a tracker that hangs the queue fills up, and its process is ended with the
run. However the run ends, its pipe closes, and the tracker notes that it came to no end.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from queue import Full, Queue
from threading import Thread
from typing import Any

from rlhf_cli.reporting.console import say
from rlhf_cli.reporting.trackers.about import COLUMNS, About

PATIENCE = 30.0  # seconds that the end of a run waits for all of its trackers
UNFINISHED = 5.0  # and the end of one that fails; its trackers may go on for a while
SILENT = 2.0  # of them pass without a word
MOST_WAITING = 10_000  # rows
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"  # the logs that trackers hear
# sys.path is ours: what lies in the working folder, such as `wandb`, is no package
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); "
    "from rlhf_cli.reporting.trackers.process import main; main()"
)


class Trackers:
    """The trackers of a run; they are told of it from `start` to `finish` or `leave`."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._outlets: list[_Outlet] = []
        self._owner = os.getpid()

    def start(self, about: About) -> None:
        """Tell them of the run, whose folder is its own now."""
        for name in self._names:
            try:
                self._outlets.append(_Outlet(replace(about, tracker=name)))
            except OSError as error:
                say(f"note: tracker {name} did not start: {error}; the run goes on without it")
        _open.append(self)

    def hear(self, file: str, row: dict[str, Any]) -> None:
        """A listener of the logs."""
        if file == METRICS:
            message: dict[str, Any] = {"step": row["step"], "figures": row}
        elif file == SAMPLES:
            sample = [row.get(column) for column in COLUMNS]
            message = {"step": row["step"], "sample": sample}
        else:
            return
        for outlet in self._outlets:
            outlet.put(message)

    def finish(self, figures: Mapping[str, Any]) -> None:
        """Tell them what the run ended with, and wait until they have taken all, but not for ever.

        Args:
            figures: as stage.json has them.
        """
        self._close({"end": figures})
        if self._wait(SILENT):
            return
        names = ", ".join(outlet.name for outlet in self._outlets if not outlet.ended(0.0))
        say(f"waiting for {names} to take what was logged, {PATIENCE:.0f} s at most")
        self._wait(PATIENCE - SILENT)
        for outlet in self._outlets:
            outlet.kill()

    def leave(self) -> None:
        """The run has not come to its end: let them note that, and wait a little."""
        if os.getpid() == self._owner:
            self._close(None)
            self._wait(UNFINISHED)

    def _close(self, last: dict[str, Any] | None) -> None:
        with suppress(ValueError):  # never started
            _open.remove(self)
        for outlet in self._outlets:
            outlet.close(last)

    def _wait(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        return all(outlet.ended(until - time.monotonic()) for outlet in self._outlets)


_open: list[Trackers] = []


@atexit.register
def leave_all() -> None:
    """Close the trackers of runs that have failed, or were interrupted."""
    for trackers in list(_open):
        trackers.leave()


class _Outlet:
    """The process of one tracker, what waits to be sent to it, and what it says."""

    def __init__(self, about: About) -> None:
        self.name = about.tracker
        self._given_up = self._closed = False
        self._waiting: Queue[dict[str, Any] | None] = Queue(MOST_WAITING)
        loud = os.environ.get("RLHF_TRACEBACK") == "1"
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if loud else subprocess.DEVNULL,
            start_new_session=True,  # a signal to our group is ours to answer
        )
        self.put(asdict(about))
        self._listener = Thread(target=self._listen, daemon=True)
        self._listener.start()
        Thread(target=self._send, daemon=True).start()

    def put(self, message: dict[str, Any]) -> None:
        """Let a message be sent when the tracker takes it; never waits."""
        try:
            if not self._given_up:
                self._waiting.put_nowait(message)
        except Full:
            self._give_up(f"has left {MOST_WAITING} rows lying")

    def close(self, last: dict[str, Any] | None) -> None:
        """Send what waits, then `last`, and nothing more."""
        self._closed = True
        if last is not None:
            self.put(last)
        with suppress(Full):
            self._waiting.put_nowait(None)

    def ended(self, seconds: float) -> bool:
        """Whether the process ends within so many seconds."""
        if self._given_up:
            self.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(seconds, 0.0))
            self._listener.join(1.0)  # what it has said last
            return True
        return False

    def kill(self) -> None:
        """End it, and what it has started, if it has not ended."""
        if self._process.poll() is None:
            self._give_up(f"had not taken all within {PATIENCE:.0f} s, and was ended")
            with suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _give_up(self, why: str) -> None:
        if not self._given_up:
            self._given_up = True
            rest = "" if self._closed else "; the run goes on without it"
            say(f"note: tracker {self.name} {why}{rest}")

    def _send(self) -> None:
        stream = self._process.stdin
        assert stream is not None
        with suppress(OSError):  # it has ended, as `_listen` says
            while (message := self._waiting.get()) is not None:
                stream.write(json.dumps(message, default=str).encode() + b"\n")
                stream.flush()
            stream.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            if "place" in told:
                say(f"{self.name}: {told['place']}")
            elif "left_out" in told:
                say(f"note: tracker {self.name} left something out: {told['left_out']}")
            else:
                self._give_up(f"failed: {told['failed']}")
        status = self._process.wait()
        if status and not self._closed:
            self._give_up(f"has ended with status {status}")
