"""SIGTERM, SIGHUP and SIGINT: a training step that is under way is finished and saved first.

Schedulers and CI send SIGTERM some time before they kill, a terminal that closes SIGHUP, people
press Ctrl-C. All end the run with status 75, upon which a queue runs the same command again. A
second Ctrl-C ends it at once.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rlhf_cli.config.errors import Interrupted
from rlhf_cli.reporting.console import console, say_at_once

EXIT_AT_ONCE = 130
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class _Stop:
    """waits: a step is under way, whose end is waited for. asked: the signal that came."""

    waits = False
    asked: str | None = None


@contextmanager
def handled() -> Iterator[None]:
    """Within this block signals stop a stage between steps; before the first step, at once.

    A signal that is ignored, as SIGHUP under nohup, stays so.
    """
    _Stop.waits, _Stop.asked = False, None
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    taken = [number for number in _SIGNALS if before[number] != signal.SIG_IGN]
    for number in taken:
        signal.signal(number, _on_signal)
    try:
        yield
    finally:
        _Stop.waits, _Stop.asked = False, None
        for number in taken:
            signal.signal(number, before[number])


def wait_for_steps() -> None:
    """From now on a signal only asks: the stage looks after each step."""
    _Stop.waits = True


def asked() -> str | None:
    """The name of the signal that asked for an end; None if none did."""
    return _Stop.asked


def _on_signal(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if _Stop.asked is not None:
        if number == signal.SIGINT:
            console.show_cursor(True)
            say_at_once("ended at once; what was saved before is whole")
            os._exit(EXIT_AT_ONCE)
        return
    _Stop.asked = name
    if not _Stop.waits:
        raise Interrupted(f"interrupted by {name}; run the same command again")
    again = "another Ctrl-C" if number == signal.SIGINT else "Ctrl-C"
    say_at_once(f"{name}: this step is finished and saved first; {again} ends at once")
