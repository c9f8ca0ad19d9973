"""A limit to how long what other people wrote may take: templates and patterns need not end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 10.0  # of processor time, of which a sound one takes a thousandth
AGAIN = 0.5  # seconds until the next attempt, should the first be caught on its way


@contextmanager
def time_limit(seconds: float = SECONDS) -> Iterator[None]:
    """End the block with an error where it computes for longer.

    Processor time counts, so that a machine that is busy or asleep ends nothing. Only the main
    thread can be stopped; in others there is no limit.

    Raises:
        TimeoutError: the time is over.
    """

    def over(number: int, frame: Any) -> None:
        raise TimeoutError(f"it does not end within {seconds:g} s of processor time")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)
