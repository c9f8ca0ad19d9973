"""A local web page of what annotators disagree on, or a judge with itself, for whoever settles it.

Here alone are names told, of annotators and of policies. An answer that is given here takes the
place of those of all annotators, as a new event of each; theirs stay in their files, and what tells
how far people agree goes by these.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_cli.labelling.answers import FLAG, SKIP, Wrong, as_typed, read
from rlhf_cli.labelling.automatic import by_rewards
from rlhf_cli.labelling.desk import Desk, Event
from rlhf_cli.labelling.gate import Gate, listening, posted, serve
from rlhf_cli.labelling.outcomes import Places, said_of
from rlhf_cli.labelling.tasks import Task, Turn, spoken, writers_of
from rlhf_cli.labelling.terminal import HOW
from rlhf_cli.reporting.console import say
from rlhf_cli.reporting.terminal import printable

FILES = ("common.js", "review.js", "label.css")
REVIEWER = "review"
Said = list[tuple[Desk, Turn, Event]]


def disagreements(desks: Mapping[str, Desk]) -> list[tuple[Task, Said]]:
    """The tasks of which annotators say different things, then those of which all of them say what
    the reward does not, then those of which a judge says another thing in the other order; each
    with what was said at its first showing. Planted ones make no rows.
    """
    of_task: dict[str, Said] = {}
    for desk in desks.values():
        for turn, event in desk.answered:
            if turn.showing == 0 and not turn.task.planted:
                of_task.setdefault(turn.task.id, []).append((desk, turn, event))
    apart, against, doubted = [], [], []
    for said in of_task.values():
        task = said[0][1].task
        meant = [meaning_of(event) for _, _, event in said]
        verdict = by_rewards(task, said[0][0].terms.protocol)
        if any(each != meant[0] for each in meant):
            apart.append((task, said))
        elif verdict is not None and meant[0] not in (SKIP, FLAG, meaning_of(verdict)):
            against.append((task, said))
        elif any(goes_by_order(event) for _, _, event in said):
            doubted.append((task, said))
    return apart + against + doubted


def goes_by_order(event: Event) -> bool:
    """Whether a judge prefers no response of some pair in both orders."""
    return any(first * second <= 0 for first, second in event.get("log_odds", []))


def meaning_of(event: Event) -> dict[Places, float] | str:
    """What an answer says, pair by pair, or that it says nothing."""
    return event["kind"] if event["kind"] in (SKIP, FLAG) else dict(said_of(event))


class Review(Gate):
    """The routes of the page.

    before_first: is called before the first answer is written.
    """

    def __init__(
        self, desks: Mapping[str, Desk], port: int, before_first: Callable[[], None]
    ) -> None:
        self.desks, self._before_first = desks, before_first
        self.changed = False
        self.shown = {task.id: (task, said) for task, said in disagreements(desks)}
        super().__init__([REVIEWER], port, "review.html", FILES)

    def routes(self) -> list[Route]:
        """What is looked at and said."""
        return [
            Route("/disagreements", self._list),
            Route("/review", self._review, methods=["POST"]),
            Route("/finish", self._finish, methods=["POST"]),
        ]

    async def _list(self, request: Request) -> Response:
        self.owner(request)
        protocol = next(iter(self.desks.values())).terms.protocol
        tasks = [_as_json(*each, protocol) for each in self._now()]
        return JSONResponse({"protocol": protocol, "how": HOW[protocol], "tasks": tasks})

    def _now(self) -> list[tuple[Task, Said]]:
        """What was disagreed on as the page began, with what is said of it now."""
        answers = {
            (desk.who, turn.task.id): (desk, turn, event)
            for desk in self.desks.values()
            for turn, event in desk.answered
            if turn.showing == 0
        }
        return [
            (task, [answers[desk.who, task.id] for desk, _, _ in said])
            for task, said in self.shown.values()
        ]

    async def _review(self, request: Request) -> Response:
        self.owner(request)
        said = await posted(request)
        found = self.shown.get(str(said.get("task")))
        line = said.get("line")
        if found is None or not isinstance(line, str):
            raise HTTPException(422)
        task, answers = found
        protocol = answers[0][0].terms.protocol
        try:
            answer = read(line, Turn(task, 0, list(range(len(task.responses)))), protocol)
        except Wrong as why:
            return JSONResponse({"fault": str(why)}, 422)
        if not self.changed:
            self._before_first()
            self.changed = True
        for desk, turn, _ in answers:
            desk.review(turn, answer)
        return await self._list(request)

    async def _finish(self, request: Request) -> Response:
        self.owner(request)
        self.finished.set()
        return JSONResponse({"finished": True, "changed": self.changed})


def _as_json(task: Task, said: Said, protocol: str) -> dict[str, Any]:
    """A task with all that is said of it, responses by their places in the task."""
    verdict = by_rewards(task, protocol)
    answers = [
        {
            "who": desk.who,
            "line": as_typed(event),
            "note": printable(str(event.get("note") or event.get("reason") or "")),
            "reviewed": bool(event.get("reviewed")),
        }
        for desk, _, event in said
    ]
    if verdict is not None:
        answers.append(
            {"who": "the reward", "line": as_typed(verdict), "note": "", "reviewed": False}
        )
    return {
        "task": task.id,
        "steps": [printable(step) for step in task.steps],
        "prompt": [{"role": role, "text": printable(text)} for role, text in spoken(task)],
        "responses": [
            {
                "text": printable(text),
                "policy": printable(", ".join(writers_of(origin))),
                "reward": origin.get("reward"),
            }
            for text, origin in zip(task.responses, task.origins, strict=True)
        ],
        "answers": answers,
    }


def show(desks: Mapping[str, Desk], port: int, before_first: Callable[[], None]) -> bool:
    """Serve the page until it is finished with; returns whether an answer was given.

    Args:
        port: 0 takes a free one.
        before_first: is called before the first answer is written.

    Raises:
        UserError: the port is taken.
    """
    with listening(port) as listener:
        page = Review(desks, listener.getsockname()[1], before_first)
        if not page.shown:
            say("review: nobody disagrees")
            return False
        say(f"{len(page.shown)} tasks to review on this page; Ctrl-C stops, answers are kept:")
        say(page.address(REVIEWER))
        asyncio.run(serve(page, listener))
    return page.changed
