"""Why a run of several processes ended: each says its own reason, and one of them is the first.

Once a process is gone, the others fail as well, a little later and for no other reason. Theirs are
echoes, of which nobody is told. A process leaves its reason in a file, in the form that torch's
elastic agents read.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.config.errors import EXIT_TRY_AGAIN

OURS = "rlhf-cli"  # our part of the file
# how torch says that another process did not answer, where we do not ask ourselves
_OF_PEERS = ("gloo", "closed by peer", "reset by peer", "NCCL", "ncclInternal", "Broken pipe")


@dataclass(frozen=True)
class Cause:
    """Why a rank ended.

    status: the exit status that it means for the run.
    line: for people.
    at: seconds since the epoch.
    echo: another rank was lost, and says why itself.
    again: whether the same command may well go on: it is no fault of the config or of the run.
    log: the file that has what the rank said beside it; empty where there is none.
    told: by the rank itself.
    """

    rank: int
    status: int
    line: str
    at: float
    echo: bool = False
    again: bool = False
    log: str = ""
    told: bool = True

    def shows_log(self) -> bool:
        """Whether more may be known by what the rank said before than by its line."""
        return bool(self.log) and (self.again or os.environ.get("RLHF_TRACEBACK") == "1")

    def named(self) -> str:
        """The line with the rank, but of rank 0: it speaks for all."""
        line = f"rank {self.rank}: {self.line}" if self.told and self.rank else self.line
        return f"{line} (what it said before: {self.log})" if self.shows_log() else line


def is_echo(error: BaseException) -> bool:
    """Whether an exception of torch's says that another process is gone or does not answer."""
    text = str(error)
    kind = type(error).__name__
    return kind.startswith("Dist") or (
        isinstance(error, RuntimeError) and any(words in text for words in _OF_PEERS)
    )


def write_cause(file: str, cause: Cause) -> None:
    """Leave it where an elastic agent looks, whole or not at all."""
    told = {"message": cause.line, "extraInfo": {"timestamp": str(int(cause.at))}}
    part = Path(f"{file}.part")
    part.write_text(json.dumps({"message": told, OURS: asdict(cause)}), encoding="utf-8")
    os.replace(part, file)


def cause_of(rank: int, exitcode: int, left: Mapping[str, Any], at: float) -> Cause:
    """Why a process ended that is gone.

    Args:
        exitcode: negative where a signal ended it.
        left: what its file holds; anything else where it left none.
        at: when it was seen.
    """
    if isinstance(left.get(OURS), dict):
        return Cause(**left[OURS])
    if exitcode >= 0:
        line = f"rank {rank} left with exit status {exitcode}"
        return Cause(rank, exitcode, line, at, again=True, told=False)
    name = signal.Signals(-exitcode).name
    line = f"rank {rank} was ended by {name}"
    if exitcode == -signal.SIGKILL:
        line += ", by hand or for want of memory"
    echo = name in ("SIGTERM", "SIGHUP", "SIGINT")
    return Cause(rank, 1, line, at, echo, again=True, told=False)


def first_cause(causes: Sequence[Cause], asked: bool) -> Cause:
    """The one that a run ended for.

    Args:
        asked: whether a signal asked the run to end; else it is an echo to have had one.
    """

    def is_own(cause: Cause) -> bool:
        return not cause.echo and (asked or cause.status != EXIT_TRY_AGAIN)

    own = [cause for cause in causes if is_own(cause)]
    own = own or [cause for cause in causes if not cause.echo] or list(causes)
    first = min(own, key=lambda cause: cause.at)
    alike = [cause for cause in own if cause.line == first.line]  # as all ranks say it
    return min(alike, key=lambda cause: cause.rank)
