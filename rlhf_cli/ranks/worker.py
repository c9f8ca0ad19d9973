"""A process that is one of several: what it does otherwise than one that runs alone.

It ends with the agent that started it. Only rank 0 speaks: what others write to standard output
and error goes to a file. Why a run ended is said by our own agent, which hears it of all ranks, or
without one, as under torchrun, by the rank that it happened to.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from rlhf_cli.config.errors import EXIT_TRY_AGAIN, PeerLost, RunError, UserError
from rlhf_cli.ranks import environment
from rlhf_cli.ranks.causes import Cause, is_echo, write_cause
from rlhf_cli.ranks.world import enter

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from rlhf_cli.ranks.watch import Watch

AGENT, LOGS, STDIN = "RLHF_CLI_AGENT", "RLHF_CLI_LOGS", "RLHF_CLI_STDIN"
"""What our own agent says: that there is one, a folder for logs, a file to read in place of stdin.
"""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
AFTER_RANK_0 = (
    0.5  # seconds that others wait before they leave: rank 0 may fail for the same reason
)


class _Self:
    """place: where this process stands; None where it is alone.

    shown: the standard error that it was given; logged: the file that has taken its place.
    watch: on the meetings of the ranks, once there is a group.
    status: with which it ends, once it has said why.
    """

    place: environment.Place | None = None
    shown = 2
    logged = ""
    watch: Watch | None = None
    status: int | None = None


def become() -> None:
    """Be the rank that the environment says, if it says one.

    Raises:
        UserError: it says what cannot be.
    """
    environment.map_scheduler()
    own = _Self.place = environment.place()
    if own is None:
        return
    atexit.register(_end_at_once)
    if environment.has_keeper():
        _end_with(os.getppid())
    if file := os.environ.get(STDIN):
        handle = os.open(file, os.O_RDONLY)
        os.dup2(handle, 0)
        os.close(handle)
    if own.rank:
        _say_nothing(own.rank)


def is_one() -> bool:
    """Whether this process is one of several."""
    return _Self.place is not None


def join_others(device: torch.device, seconds: int, say: Callable[[str], None]) -> None:
    """Where this process is one of several, wait for all of them: from here on they work together.

    What was checked before was seen by each alone, so that none has yet written anything.

    Args:
        device: of this rank.
        seconds: that ranks then wait for each other at most.
        say: takes a line of rank 0.
    """
    if (own := environment.place()) is not None:
        from rlhf_cli.ranks.group import join  # torch.distributed, which one process needs not

        group = join(device, seconds, _show if own.rank else say, end)
        _Self.watch = group.watch
        enter(group)


def leave(status: int) -> None:
    """Take leave of the others at the end of a command."""
    if _Self.watch is not None:
        _Self.watch.end()
        _Self.watch.join(1.0)  # threads that are in torch as Python ends abort it, with a line
        import torch.distributed as dist

        if status == 0 and dist.is_initialized():
            dist.destroy_process_group()
    if status == 0 and _Self.logged and AGENT not in os.environ:
        os.unlink(_Self.logged)


def tell(line: str, status: int, error: BaseException | None = None, again: bool = False) -> None:
    """Say why this rank ends, once: to the agent, or where there is none to people.

    Args:
        status: the exit status that it means for the run.
        error: what was raised; an echo of another rank's end is not shown.
        again: see `Cause`; of an exception it is told by its kind.
    """
    assert _Self.place is not None
    if _Self.status is not None:
        return
    _Self.status = status
    rank = _Self.place.rank
    echo = error is not None and (isinstance(error, PeerLost) or is_echo(error))
    again = again or echo or not (error is None or isinstance(error, (UserError, RunError)))
    cause = Cause(rank, status, line, time.time(), echo, again, _Self.logged)
    if file := os.environ.get(ERROR_FILE):
        with suppress(OSError):
            write_cause(file, cause)
    if AGENT not in os.environ:
        if _Self.watch is None:  # nobody knows of the others yet, who were checked alike
            speaks = _Self.place.local_rank == 0
        else:
            speaks = _Self.watch.is_first(line, echo)
        if speaks:
            kind = "" if status == EXIT_TRY_AGAIN else "error: "
            _show(f"rlhf-cli: {kind}{cause.named()}")
        elif _Self.logged:
            os.unlink(_Self.logged)
    elif rank and error is not None and not echo:
        time.sleep(AFTER_RANK_0)


def tells_of_signal(line: str, status: int | None) -> bool:
    """Whether what a signal does to this rank is told, or need not be.

    Our own agent was told of the signal and has said so itself. torchrun sends one to all that are
    left once a rank has failed.

    Args:
        status: with which the rank ends; None where it goes on.
    """
    if AGENT in os.environ:
        if status is not None:
            tell(line.removeprefix("rlhf-cli: "), status)
        return True
    return status is not None and _Self.watch is not None and _Self.watch.knows_cause()


def end(line: str) -> None:
    """End this rank from any of its threads, as its main thread waits for what never comes."""
    tell(line, 1, again=True)
    os._exit(1)


def _end_at_once() -> None:
    """Called as Python ends, after all else that is: a rank that failed leaves no more to be taken
    down, for torch's threads, still at what broke, would abort it, with a line of their own.
    """
    if _Self.status is not None and _Self.watch is not None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(_Self.status)


def _show(line: str) -> None:
    """A line of a rank that else says nothing, on the standard error that it was given."""
    with suppress(OSError):
        os.write(_Self.shown, f"{line}\n".encode())


def _end_with(parent: int) -> None:
    """Be killed once the parent is gone, however that ended."""
    with suppress(ImportError, OSError, AttributeError):  # Linux alone has it
        import ctypes

        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it went meanwhile
        os.kill(os.getpid(), signal.SIGKILL)


def _say_nothing(rank: int) -> None:
    """Let standard output and error go to a file of this rank."""
    folder = os.environ.get(LOGS)
    handle, _Self.logged = tempfile.mkstemp(
        prefix=f"rlhf-cli-rank-{rank}-", suffix=".log", dir=folder
    )
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    _Self.shown = os.dup(2)
    for number in (1, 2):
        os.dup2(handle, number)
    os.close(handle)
