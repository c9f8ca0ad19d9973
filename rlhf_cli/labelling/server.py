"""A local web page on which annotators label, each under an address of their own.

It listens on this machine alone; `ssh -L` leads to it from another one. An address holds a random
token, which is exchanged for a cookie at once, so that it stays in no history; every route asks for
it. Requests with another Host are refused (DNS rebinding), and so is what another site may send:
answers are JSON with a header of ours, from our own origin. Nothing is loaded from anywhere else,
and what models wrote is text, never markup. No name, path or score of a policy leaves the server.
"""

import asyncio
import contextlib
import errno
import hmac
import json
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from rlhf_cli.config.errors import UserError
from rlhf_cli.labelling.answers import Wrong, read
from rlhf_cli.labelling.desk import Desk
from rlhf_cli.labelling.tasks import Turn, spoken
from rlhf_cli.reporting.console import say
from rlhf_cli.reporting.terminal import printable

HOST = "127.0.0.1"
PAGE = Path(__file__).parent / "page"
FILES = ("label.js", "label.css")
LARGEST = 100_000  # bytes of an answer, whose note is the only long thing in it
LONGEST = 24 * 3600.0  # seconds that are kept of how long a task was looked at
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
OURS = "x-label"
"""A header that no form of another site can send."""


class Page:
    """The routes, and whose desk a request is for.

    instructions: the text that annotators judge by.
    ends: whether what is labelled is sealed where tasks are left.
    """

    def __init__(
        self, desks: Mapping[str, Desk], instructions: str | None, ends: bool, port: int
    ) -> None:
        self.desks, self._instructions, self._ends, self._port = desks, instructions, ends, port
        self.tokens = {who: secrets.token_urlsafe(24) for who in desks}
        self.finished = asyncio.Event()
        self.app = Starlette(
            routes=[
                Route("/", self._index),
                *(Route(f"/{name}", self._file) for name in FILES),
                Route("/turn", self._turn),
                Route("/answer", self._answer, methods=["POST"]),
                Route("/undo", self._undo, methods=["POST"]),
                Route("/finish", self._finish, methods=["POST"]),
            ],
            middleware=[Middleware(BaseHTTPMiddleware, dispatch=self._guarded)],
        )

    def address(self, who: str) -> str:
        """Where an annotator begins."""
        return f"http://{HOST}:{self._port}/?token={self.tokens[who]}"

    # ------------------------------------------------------------------ who may come in

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
        if host not in (f"{HOST}:{self._port}", f"localhost:{self._port}"):
            return 400
        if request.method != "POST":
            return None
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        same = request.headers.get("origin") == f"http://{host}"
        return None if same and kind == "application/json" and OURS in request.headers else 403

    @property
    def _cookie(self) -> str:
        """Cookies are shared by all ports of a machine."""
        return f"label-{self._port}"

    def _owner(self, token: str) -> str | None:
        given = token.encode(errors="replace")
        held = ((who, own) for who, own in self.tokens.items())
        return next((who for who, own in held if hmac.compare_digest(own.encode(), given)), None)

    def _desk(self, request: Request) -> Desk:
        """The desk of whoever asks."""
        who = self._owner(request.cookies.get(self._cookie, ""))
        if who is None:
            raise HTTPException(403)
        return self.desks[who]

    # ------------------------------------------------------------------ routes

    async def _index(self, request: Request) -> Response:
        token = request.query_params.get("token")
        if token is None:
            self._desk(request)
            return FileResponse(PAGE / "label.html")
        if self._owner(token) is None:
            raise HTTPException(403)
        response = RedirectResponse("/", status_code=303)
        response.set_cookie(self._cookie, token, httponly=True, samesite="strict")
        return response

    async def _file(self, request: Request) -> Response:
        self._desk(request)
        return FileResponse(PAGE / request.url.path.removeprefix("/"))

    async def _turn(self, request: Request) -> Response:
        return JSONResponse(self._shown(self._desk(request)))

    async def _answer(self, request: Request) -> Response:
        desk, said = self._desk(request), await _object(request)
        turn = desk.current
        if turn is None or [said.get("task"), said.get("showing")] != [turn.task.id, turn.showing]:
            return JSONResponse({"fault": "answered already", **self._shown(desk)}, 409)
        line, note, seconds = said.get("line"), said.get("note", ""), said.get("seconds", 0)
        if not isinstance(line, str) or not isinstance(note, str):
            raise HTTPException(422)
        if not isinstance(seconds, int | float) or not seconds >= 0:
            raise HTTPException(422)
        try:
            answer = read(line, turn, desk.terms.protocol)
        except Wrong as why:
            return JSONResponse({"fault": str(why)}, 422)
        desk.answer(turn, answer, note.strip(), float(min(seconds, LONGEST)))
        return JSONResponse(self._shown(desk))

    async def _undo(self, request: Request) -> Response:
        desk = self._desk(request)
        undone = desk.undo() is not None
        return JSONResponse({"undone": undone, **self._shown(desk)})

    async def _finish(self, request: Request) -> Response:
        if not self._shown(self._desk(request))["may_finish"]:
            return JSONResponse({"fault": "tasks are left"}, 409)
        self.finished.set()
        return JSONResponse({"finished": True})

    def _shown(self, desk: Desk) -> dict[str, Any]:
        """What the page needs to know, and no more."""
        turn = desk.current
        return {
            "who": desk.who,
            "protocol": desk.terms.protocol,
            "instructions": None if self._instructions is None else printable(self._instructions),
            "done": len(desk.turns) - desk.left,
            "turns": len(desk.turns),
            "others_left": sum(each.left for each in self.desks.values()) - desk.left,
            "may_finish": self._ends or not any(each.left for each in self.desks.values()),
            "turn": None if turn is None else _as_json(turn),
        }


def _as_json(turn: Turn) -> dict[str, Any]:
    """A turn as the page shows it; controls are escapes, so that nothing hides or turns round."""
    origins, texts = turn.task.origins, turn.task.responses
    return {
        "task": turn.task.id,
        "showing": turn.showing,
        "prompt": [{"role": role, "text": printable(text)} for role, text in spoken(turn.task)],
        "responses": [
            {
                "text": printable(texts[place]),
                "cut": origins[place].get("finish_reason") == "length",
            }
            for place in turn.order
        ],
    }


async def _object(request: Request) -> dict[str, Any]:
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


def label(desks: Mapping[str, Desk], instructions: str | None, ends: bool, port: int) -> None:
    """Serve the page until somebody who may finishes.

    Args:
        ends: whether what is labelled is sealed where tasks are left.
        port: 0 takes a free one.

    Raises:
        UserError: the port is taken.
    """
    with listening(port) as listener:
        page = Page(desks, instructions, ends, listener.getsockname()[1])
        say("label on this page, each at an address of their own; Ctrl-C stops, labels are kept:")
        for who, desk in desks.items():
            say(f"{who} ({desk.left} of {len(desk.turns)} left): {page.address(who)}")
        asyncio.run(_serve(page, listener))


@contextlib.contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """A socket on this machine alone.

    Raises:
        UserError: the port is taken, or not for us.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise UserError(f"port={port}: {error.strerror}; port=0 takes a free one") from None
        yield listener


async def _serve(page: Page, listener: socket.socket) -> None:
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
