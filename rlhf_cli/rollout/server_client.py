"""A vLLM server over HTTP: JSON in, JSON out, tried again for as long as that may help.

The routes are those of vLLM 0.30 to 0.32; the ones that change weights are there where it was
started with VLLM_SERVER_DEV_MODE=1. A key of the server's comes from the variable VLLM_API_KEY.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, TypeVar
from urllib.parse import urlsplit

from rlhf_cli.config.errors import RunError
from rlhf_cli.reporting.console import say

Item = TypeVar("Item")
Answer = TypeVar("Answer")

IN_FLIGHT = 256  # requests at once; a server queues what it has no room for
OK = 200
BUSY = (408, 425, 429, 500, 502, 503, 504)  # what may pass
TRIES = 5  # of a request that a server answers so
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 15.0  # seconds between two; each is twice the one before
LONGEST_ANSWER = 300  # characters of a server's answer that are shown


class ServerFault(RunError):
    """A server did not do what it was asked for; a line that says what it answered.

    status: of its answer, 200 of one that is no JSON; None where there was none.
    """

    def __init__(self, line: str, status: int | None = None) -> None:
        super().__init__(line)
        self.status = status


class Unreachable(ServerFault):
    """A server was not there for as long as it is waited for."""


class Client:
    """Asks one server; may be used by many threads at once."""

    def __init__(
        self,
        url: str,
        timeout: float,
        alive: Callable[[], None] = lambda: None,
        starts: bool = False,
        *,
        key_of: str = "VLLM_API_KEY",
        limited_by: str = "hardware.rollout_timeout",
        at_once: int = IN_FLIGHT,
    ) -> None:
        """
        Args:
            url: of the server, as http://host:8000.
            timeout: seconds for a request with all that it is tried again.
            alive: called before each try; raises where none can help any more.
            starts: whether it has been started just now, so that it may not be there yet.
            key_of: the variable that its key comes from.
            limited_by: the key that the timeout comes from, for messages.
            at_once: requests at once.
        """
        self._key_of, self._limited_by, self.at_once = key_of, limited_by, at_once
        self.url, self.timeout, self._alive = url.rstrip("/"), timeout, alive
        self._told = starts
        self._parts = urlsplit(self.url)
        self._open: set[HTTPConnection] = set()
        self._given_up = threading.Event()
        self._guard = threading.Lock()

    def get(self, route: str) -> Any:
        """What GET of a route answers.

        Raises:
            ServerFault: it is not 200, or does not come in time.
        """
        return self._parsed(route, self._persistently("GET", route, None, TRIES))

    def post(self, route: str, body: Any = None, tries: int = TRIES) -> Any:
        """What POST of a JSON body answers.

        Args:
            tries: how often a fault that may pass is answered by asking again.

        Raises:
            ServerFault: it is not 200, or does not come in time.
        """
        return self._parsed(route, self.tell(route, body, tries))

    def tell(self, route: str, body: Any, tries: int = TRIES) -> str:
        """The text that POST of a JSON body answers; see `post`."""
        return self._persistently("POST", route, body, tries)

    def each(
        self, work: Callable[[Item], Answer], items: Sequence[Item]
    ) -> Iterator[tuple[int, Answer]]:
        """The place of each item and what `work`, which asks this server, gives, as they come.

        Raises:
            ServerFault: of the first that failed; the others are given up.
        """
        return each_of([self], lambda _, item: work(item), items)

    def give_up(self) -> None:
        """End what other threads ask, and have none ask again, until `go_on`."""
        self._given_up.set()
        with self._guard:
            self._hang_up(self._open)

    def go_on(self) -> None:
        """Ask again what may pass."""
        self._given_up.clear()

    def _persistently(self, method: str, route: str, body: Any, tries: int) -> str:
        """The answer to a request, which is sent again after faults that may pass.

        One that is not there is waited for as long as an answer is; it may be starting anew.
        """
        began, answered, pause = time.monotonic(), 0, FIRST_PAUSE
        while True:
            self._alive()
            if self._given_up.is_set():
                raise ServerFault(f"{self.url}{route} was given up")
            try:
                left = self.timeout - (time.monotonic() - began)
                return self._once(method, route, body, max(left, 0.1))
            except TimeoutError:
                raise ServerFault(
                    f"{self.url}{route} has not answered within {self.timeout:g} s "
                    f"({self._limited_by})"
                ) from None
            except ServerFault as error:
                fault, answered = error, answered + 1
                if fault.status not in BUSY or answered >= tries:
                    raise
            except (OSError, HTTPException) as error:
                fault = ServerFault(f"{self.url}{route} cannot be reached: {told(error)}")
                if tries == 1:
                    raise fault from None
                self._say_once(fault)
            late = time.monotonic() - began + pause > self.timeout
            if late and fault.status is None:
                raise Unreachable(f"{fault}; {self._limited_by}={self.timeout:g} is over")
            if late or self._given_up.wait(pause):
                raise fault
            pause = min(2 * pause, LONGEST_PAUSE)

    def _say_once(self, fault: ServerFault) -> None:
        """Say that a server is waited for."""
        with self._guard:
            told, self._told = self._told, True
        if not told:
            say(f"{fault}; it is waited for, up to {self.timeout:g} s")

    def _once(self, method: str, route: str, body: Any, timeout: float) -> str:
        headers = {"Accept": "application/json", "Connection": "close"}
        content = None
        if body is not None:
            content, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        if secret := os.environ.get(self._key_of):
            headers["Authorization"] = f"Bearer {secret}"
        with self._connected(timeout) as connection:
            connection.request(method, self._parts.path + route, content, headers)
            answer = connection.getresponse()
            return self._read(route, answer)

    def _read(self, route: str, answer: HTTPResponse) -> str:
        text = answer.read().decode("utf-8", "replace")
        if answer.status != OK:
            said = in_a_line(text) or answer.reason
            raise ServerFault(f"{self.url}{route} answered {answer.status}: {said}", answer.status)
        return text

    def _parsed(self, route: str, text: str) -> Any:
        if not text.strip():
            return None
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            line = f"{self.url}{route} answered no JSON: {in_a_line(text)}"
            raise ServerFault(line, OK) from None

    @contextmanager
    def _connected(self, timeout: float) -> Iterator[HTTPConnection]:
        kind = HTTPSConnection if self._parts.scheme == "https" else HTTPConnection
        assert self._parts.hostname is not None  # config/rollout_rules.py
        connection = kind(self._parts.hostname, self._parts.port, timeout=timeout)
        with self._guard:
            self._open.add(connection)
        try:
            yield connection
        finally:
            with self._guard:
                self._open.discard(connection)
            connection.close()

    def _hang_up(self, connections: Iterable[HTTPConnection]) -> None:
        """End requests that other threads wait for."""
        for connection in connections:
            with suppress(OSError, AttributeError):  # not connected yet, or no more
                connection.sock.shutdown(socket.SHUT_RDWR)


def each_of(
    clients: Sequence[Client],
    work: Callable[[Client, Item], Answer],
    items: Sequence[Item],
    samples: int = 1,
) -> Iterator[tuple[int, Answer]]:
    """The place of each item and what `work` gives of one of several servers, as they come.

    Items are dealt one by one, round and round; `samples` of them in a row are of one prompt, and
    go to one server, which computes the prompt once.

    Raises:
        ServerFault: of the first that failed; the others are given up.
    """
    with ExitStack() as stack:
        pools = []
        for client in clients:
            pool = ThreadPoolExecutor(min(client.at_once, max(1, len(items))), "requests")
            pools.append(pool)
            stack.callback(client.go_on)  # the last that is called is the first to be
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            stack.callback(client.give_up)
        places = {}
        for place, item in enumerate(items):
            turn = dealt_to(place, samples, len(clients))
            places[pools[turn].submit(work, clients[turn], item)] = place
        for future in as_completed(places):
            yield places[future], future.result()


def dealt_to(place: int, samples: int, servers: int) -> int:
    """Which of several servers is asked for an item, by its place."""
    return place // samples % servers


def told(error: BaseException) -> str:
    """What went wrong with a connection, in words."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def in_a_line(text: str) -> str:
    """The message in a server's answer: vLLM's own, FastAPI's, or the text itself."""
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
        for name in ("error", "message", "detail"):
            if isinstance(found, dict) and name in found:
                found = found[name]
        text = found if isinstance(found, str) else json.dumps(found)
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_ANSWER else f"{line[:LONGEST_ANSWER]} ..."
