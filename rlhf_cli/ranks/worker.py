"""A process that is one of several: what it does otherwise than one that runs alone.

It ends with the process that started it, and only rank 0 speaks: what others write to standard
output and error goes to a file.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from contextlib import suppress

from rlhf_cli.ranks.environment import Place, place


def become() -> Place | None:
    """Be the rank that the environment says; None where there is only this process."""
    own = place()
    if own is None:
        return None
    _end_with(os.getppid())
    if own.rank:
        _say_nothing(own)
    return own


def _end_with(parent: int) -> None:
    """Be killed once the parent is gone, however that ended."""
    with suppress(ImportError, OSError, AttributeError):  # Linux alone has it
        import ctypes

        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it went meanwhile
        os.kill(os.getpid(), signal.SIGKILL)


def _say_nothing(own: Place) -> None:
    """Let standard output and error go to a file of this rank."""
    handle, _ = tempfile.mkstemp(prefix=f"rlhf-cli-rank-{own.rank}-", suffix=".log")
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    for number in (1, 2):
        os.dup2(handle, number)
    os.close(handle)
