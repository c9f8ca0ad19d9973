"""Local web pages that only those may see who were given an address.

They listen on this machine alone; `ssh -L` leads to it from another one. An address holds a random
token, which is exchanged for a cookie at once, so that it stays in no history; every route asks for
it. Requests with another Host are refused (DNS rebinding), and so is what another site may send:
what is posted is JSON with a header of ours, from our own origin. Nothing is loaded from anywhere
else.
"""

import asyncio
import contextlib
import errno
import hmac
import json
import secrets
import socket
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import Route

from rlhf_cli.config.errors import UserError

HOST = "127.0.0.1"
PAGE = Path(__file__).parent / "page"
LARGEST = 100_000  # bytes of what is posted, in which a note is the only long thing
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
OURS = "x-label"
"""A header that no form of another site can send."""


class Gate(ABC):
    """Who may come in to which pages.

    Subclasses add routes, and ask `owner` of each request whose it is.
    """

    def __init__(self, names: Sequence[str], port: int, index: str, files: Sequence[str]) -> None:
        """With a random token for each name.

        Args:
            names: those who get an address each.
            index: what an address shows, of PAGE.
            files: what that loads.
        """
        self.port, self._index_file = port, index
        self.tokens = {name: secrets.token_urlsafe(24) for name in names}
        self.finished = asyncio.Event()
        self.app = Starlette(
            routes=[
                Route("/", self._index),
                *(Route(f"/{name}", self._file) for name in files),
                *self.routes(),
            ],
            middleware=[Middleware(BaseHTTPMiddleware, dispatch=self._guarded)],
        )

    @abstractmethod
    def routes(self) -> list[Route]:
        """What there is beside the page and its files."""

    def address(self, name: str) -> str:
        """Where somebody begins."""
        return f"http://{HOST}:{self.port}/?token={self.tokens[name]}"

    def owner(self, request: Request) -> str:
        """Who asks."""
        name = self._named_by(request.cookies.get(self._cookie, ""))
        if name is None:
            raise HTTPException(403)
        return name

    async def _guarded(
        self, request: Request, go_on: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        fault = self._fault(request)
        response = await go_on(request) if fault is None else Response(status_code=fault)
        response.headers.update(HEADERS)
        return response

    def _fault(self, request: Request) -> int | None:
        """The status with which a request is refused; None lets it in."""
        host = request.headers.get("host", "")
        if host not in (f"{HOST}:{self.port}", f"localhost:{self.port}"):
            return 400
        if request.method != "POST":
            return None
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        same = request.headers.get("origin") == f"http://{host}"
        return None if same and kind == "application/json" and OURS in request.headers else 403

    @property
    def _cookie(self) -> str:
        """Cookies are shared by all ports of a machine."""
        return f"label-{self.port}"

    def _named_by(self, token: str) -> str | None:
        given = token.encode(errors="replace")
        held = ((who, own) for who, own in self.tokens.items())
        return next((who for who, own in held if hmac.compare_digest(own.encode(), given)), None)

    async def _index(self, request: Request) -> Response:
        token = request.query_params.get("token")
        if token is None:
            self.owner(request)
            return FileResponse(PAGE / self._index_file)
        if self._named_by(token) is None:
            raise HTTPException(403)
        response = RedirectResponse("/", status_code=303)
        response.set_cookie(self._cookie, token, httponly=True, samesite="strict")
        return response

    async def _file(self, request: Request) -> Response:
        self.owner(request)
        return FileResponse(PAGE / request.url.path.removeprefix("/"))


async def posted(request: Request) -> dict[str, Any]:
    """The JSON object in the body of a request."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > LARGEST:
            raise HTTPException(413)
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(422) from None
    if not isinstance(said, dict):
        raise HTTPException(422)
    return said


# --------------------------------------------------------------------------- the server


class _Server(uvicorn.Server):
    """Signals are the command line's: what was answered is on disk, so the process may end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """A socket on this machine alone.

    Raises:
        UserError: the port is taken, or not for us.
    """
    # with its protocol by name asyncio sends answers at once (TCP_NODELAY), not 40 ms later
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
            listener.listen()  # whoever is quick waits, and is not refused
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise UserError(f"port={port}: {error.strerror}; port=0 takes a free one") from None
        yield listener


async def serve(page: Gate, listener: socket.socket) -> None:
    """Answer requests until the page is finished with."""
    config = uvicorn.Config(
        page.app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2
    )
    server = _Server(config)

    async def end() -> None:
        await page.finished.wait()
        server.should_exit = True

    ending = asyncio.create_task(end())
    await server.serve(sockets=[listener])
    ending.cancel()
