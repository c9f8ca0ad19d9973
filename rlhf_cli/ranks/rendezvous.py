"""Where ranks find each other: a store that rank 0, or the agent that started it, keeps.

Each says there that it has come, and looks whether all others have. It waits in short turns, so
that a signal ends it at once, and whoever is late can be named.
"""

import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]

from rlhf_cli.config.errors import RunError
from rlhf_cli.ranks.watch import PATIENCE

LOOKS = 0.1  # seconds between two looks, at first; each is half as long again, up to a second
TURN = 1.0  # seconds that a connection is waited for at once
NAMED = 8  # of ranks that have not come


class Rendezvous:
    """The store of a run's ranks, once all of them are there.

    Each of its clients is for one thread, since one that waits keeps others out.
    """

    def __init__(self, rank: int, size: int, seconds: float, say: Callable[[str], None]) -> None:
        """Wait for all.

        Args:
            seconds: that they are waited for.
            say: takes a line of who is late; of rank 0, or of one that does not find it.

        Raises:
            RunError: not all came.
        """
        self._host, self._port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._rank, self._size, self._seconds, self._say = rank, size, seconds, say
        self._began, self._told = time.monotonic(), False
        of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._keeps = rank == 0 and not of_agent
        if not self._keeps:
            self._wait(self._is_answered, lambda: "rank 0" if not of_agent else "the agent")
        self._store = self._connected(is_master=self._keeps)
        here = self.client("here")
        here.set(str(rank), "")
        everyone = [str(each) for each in range(size)]
        self._wait(
            lambda: bool(here.check(everyone)),
            lambda: _named([each for each in everyone if not here.check([each])]),
        )

    def client(self, name: str, own: bool = False) -> PrefixStore:
        """The part of the store that has this name; through a connection of its own, if asked."""
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = self._connected(is_master=False) if own else self._store
        return PrefixStore(f"rlhf-cli/{attempt}/{name}", store)

    def _connected(self, is_master: bool) -> TCPStore:
        limit = timedelta(seconds=self._seconds)
        try:
            return TCPStore(
                self._host,
                self._port,
                is_master=is_master,
                timeout=limit,
                wait_for_workers=False,
                multi_tenant=True,
            )
        except DistError as error:
            text = str(error).partition("\n")[0]
            raise RunError(f"{self._place()}: {text}") from error

    def _is_answered(self) -> bool:
        """Whether somebody listens there, by a plain socket: torch's would say what it misses."""
        try:
            socket.create_connection((self._host, self._port), TURN).close()
        except OSError as error:
            self._fault = str(error.strerror or error)
            return False
        return True

    def _wait(self, holds: Callable[[], bool], missing: Callable[[], str]) -> None:
        self._fault = ""
        pause = LOOKS
        while not holds():
            waited = time.monotonic() - self._began
            line = f"waited {waited:.0f} s for {missing()}"
            fault = f" ({self._fault})" if self._fault else ""
            if waited > self._seconds:
                raise RunError(
                    f"{self._place()} {line} (hardware.rank_timeout={self._seconds:.0f}){fault}"
                )
            patience = min(PATIENCE, self._seconds / 2)
            if waited > patience and not self._told and (self._rank == 0 or self._fault):
                self._told = True
                self._say(f"{line}{fault}; the run ends after {self._seconds:.0f} s")
            time.sleep(pause)
            pause = min(1.5 * pause, TURN)

    def _place(self) -> str:
        return f"rank {self._rank} of {self._size} at {self._host}:{self._port}"


def _named(ranks: Sequence[str]) -> str:
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks[:NAMED])}{more}"
