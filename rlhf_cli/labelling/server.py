"""A local web page on which annotators label, each under an address of their own.

What models wrote is text, never markup. No name, path or score of a policy leaves the server.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_cli.labelling.answers import MARKS, Wrong, read
from rlhf_cli.labelling.desk import Desk
from rlhf_cli.labelling.gate import Gate, listening, posted, serve
from rlhf_cli.labelling.tasks import INSTRUCTGPT, Turn, spoken
from rlhf_cli.reporting.console import say
from rlhf_cli.reporting.terminal import printable

FILES = ("common.js", "label.js", "compare.js", "instructgpt.js", "single.js", "label.css")
LONGEST = 24 * 3600.0  # seconds that are kept of how long a task was looked at


class Page(Gate):
    """The routes, and whose desk a request is for.

    instructions: the text that annotators judge by.
    ends: whether what is labelled is sealed where tasks are left.
    """

    def __init__(
        self, desks: Mapping[str, Desk], instructions: str | None, ends: bool, port: int
    ) -> None:
        self.desks, self._instructions, self._ends = desks, instructions, ends
        super().__init__(list(desks), port, "label.html", FILES)

    def routes(self) -> list[Route]:
        """What annotators read and say."""
        return [
            Route("/turn", self._turn),
            Route("/answer", self._answer, methods=["POST"]),
            Route("/undo", self._undo, methods=["POST"]),
            Route("/finish", self._finish, methods=["POST"]),
        ]

    def _desk(self, request: Request) -> Desk:
        """The desk of whoever asks."""
        return self.desks[self.owner(request)]

    async def _turn(self, request: Request) -> Response:
        return JSONResponse(self._shown(self._desk(request)))

    async def _answer(self, request: Request) -> Response:
        desk, said = self._desk(request), await posted(request)
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
            "marks": _marks() if desk.terms.protocol == INSTRUCTGPT else [],
            "turn": None if turn is None else _as_json(turn),
        }


def _marks() -> list[dict[str, str]]:
    return [{"key": key, "text": text} for key, (_, text) in MARKS.items()]


def _as_json(turn: Turn) -> dict[str, Any]:
    """A turn as the page shows it; controls are escapes, so that nothing hides or turns round."""
    origins, texts = turn.task.origins, turn.task.responses
    return {
        "task": turn.task.id,
        "showing": turn.showing,
        "steps": [printable(step) for step in turn.task.steps],
        "prompt": [{"role": role, "text": printable(text)} for role, text in spoken(turn.task)],
        "responses": [
            {
                "text": printable(texts[place]),
                "cut": origins[place].get("finish_reason") == "length",
            }
            for place in turn.order
        ],
    }


def label(desks: Mapping[str, Desk], instructions: str | None, ends: bool, port: int) -> None:
    """Serve the page until somebody who may finishes; where nothing is left nobody is asked to.

    Args:
        ends: whether what is labelled is sealed where tasks are left.
        port: 0 takes a free one.

    Raises:
        UserError: the port is taken.
    """
    if not any(desk.left for desk in desks.values()):
        say("all tasks are labelled")
        return
    with listening(port) as listener:
        page = Page(desks, instructions, ends, listener.getsockname()[1])
        say("label on this page, each at an address of their own; Ctrl-C stops, labels are kept:")
        for who, desk in desks.items():
            say(f"{who} ({desk.left} of {len(desk.turns)} left): {page.address(who)}")
        asyncio.run(serve(page, listener))
