"""Labelled tasks among the samples of a page: prompts with their responses, and who said what.

Policies are named, and rewards and which answers are known are told, only once a folder is sealed:
those who label may look too.
"""

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from rlhf_cli.labelling.answers import BEST, FLAG, SKIP
from rlhf_cli.labelling.desk import Desk, Event
from rlhf_cli.labelling.outcomes import Places, is_good, said_of
from rlhf_cli.labelling.tasks import RANDOM, SINGLE, Task, Turn, writers_of
from rlhf_cli.views.labels import LABEL, desks_in, is_sealed
from rlhf_cli.views.records import Record
from rlhf_cli.views.samples import Shelf

REVIEW = "review"  # in the place of an annotator
HIDDEN = "not told until sealed"  # in the place of policies
MOST = 16  # responses of a policy in a task
APART, AGREED, LEFT_OUT, NOTED, OPEN = (
    *("annotators disagree", "annotators agree", "skipped or flagged", "with a note"),
    "not labelled yet",
)
"""By what tasks are filtered."""

Said = list[tuple[str, Turn, Event]]  # who, of what, what


def shelves_of(records: Sequence[Record]) -> list[Shelf]:
    """The tasks of each label folder."""
    return [shelf_of(record) for record in records if record.node.stage == LABEL]


def shelf_of(record: Record) -> Shelf:
    """The tasks of a label folder, in the order of the first who has each."""
    shelf = Shelf(str(record.folder), beside=True)
    desks = desks_in(record)
    of_task = said_of_each(desks)
    for task in {turn.task.id: turn.task for desk in desks for turn in desk.turns}.values():
        said = of_task.get(task.id, [])
        for place, line in enumerate(lines_of(task, said)):
            origin = task.origins[place]
            if not is_sealed(record):
                shelf.add(shelf.source(HIDDEN), line, MOST, task.id)
                continue
            told = {name: origin.get(name) for name in ("reward", "finish_reason")}
            told["response_tokens"] = origin.get("tokens")
            source = shelf.source(", ".join(writers_of(origin)))
            shelf.add(source, {**line, **told}, MOST, task.id)
        marks = [*marks_of(said), *(kinds_of(task) if is_sealed(record) else [])]
        shelf.about[task.id] = {"marks": marks, "said": remarks_of(said)}
    return shelf


def said_of_each(desks: Sequence[Desk]) -> dict[str, Said]:
    """By task what each annotator said of it, and at the end what a review put in its place."""
    of_task: dict[str, Said] = {}
    reviews: dict[str, Said] = {}
    for desk in desks:
        for turn, event in desk.own:
            of_task.setdefault(turn.task.id, []).append((desk.who, turn, event))
        for turn, event in desk.answered:
            if event.get("reviewed"):
                reviews[turn.task.id] = [(REVIEW, turn, event)]
    return {task: said + reviews.get(task, []) for task, said in of_task.items()}


def lines_of(task: Task, said: Said) -> Iterator[dict[str, Any]]:
    """Each response with what everybody says of it, and what it won of its comparisons; of one that
    is judged by itself, how often it is good.
    """
    judged = [each for each in said if each[2]["kind"] not in (SKIP, FLAG)]
    reviewed = [each for each in judged if each[0] == REVIEW]
    counted = [event for _, turn, event in reviewed or judged if not turn.showing]
    for place, response in enumerate(task.responses):
        won = [value for event in counted for value in won_of(event, place)]
        verdicts = [(named(who, turn), verdict(event, place)) for who, turn, event in judged]
        line = {"prompt": task.prompt, "response": response, "said": verdicts}
        yield line | ({"won": fmean(won)} if won else {})


def won_of(event: Event, place: int) -> Iterator[float]:
    """Of each comparison of a response whether it won, a tie is one half."""
    if event["kind"] in SINGLE:
        yield float(is_good(event))
        return
    for (i, j), value in said_of(event):
        if place in (i, j):
            yield value if i == place else 1 - value


def named(who: str, turn: Turn) -> str:
    """Who said something, and whether it was not the first time."""
    return f"{who}, once more" if turn.showing else who


def verdict(event: Event, place: int) -> str:
    """What an answer says of one response."""
    if "first_wrong" in event:
        wrong = event["first_wrong"]
        return "all steps right" if wrong is None else f"step {wrong} is the first wrong one"
    if "ranks" not in event:
        return "good" if event["label"] else "bad"
    ranks, strength = event["ranks"], event.get("strength")
    tied = ranks.count(ranks[place]) > 1
    if strength is None:
        rank = f"rank {ranks[place]}{', tied' if tied else ''}"
        return ", ".join([rank, *rating(event, place)])
    if tied:
        return "both bad" if event.get("both_bad") else "tie"
    return f"better, strength {strength}" if ranks[place] == 1 else "worse"


def rating(event: Event, place: int) -> list[str]:
    """The rating and the marks of one response, where it has them."""
    if "ratings" not in event:
        return []
    marks = [name.replace("_", " ") for name in event["marks"][place]]
    return [f"{event['ratings'][place]} of {BEST}", *marks]


def remarks_of(said: Said) -> list[str]:
    """What was said of a task as a whole: skipped, flagged, noted."""
    told = []
    for who, turn, event in said:
        if event["kind"] in (SKIP, FLAG):
            done = "skipped it" if event["kind"] == SKIP else "flagged it"
            reason = event.get("reason")
            told.append(f"{named(who, turn)} {done}{f': {reason}' if reason else ''}")
        if event.get("note"):
            told.append(f"{named(who, turn)} noted: {event['note']}")
    return told


def kinds_of(task: Task) -> list[str]:
    """Why a task is there, where it was not drawn."""
    if task.planted:
        return ["its answer is known"] if task.known is not None else ["an anchor"]
    return [] if task.selected == RANDOM else [f"chosen by {task.selected}"]


def marks_of(said: Said) -> list[str]:
    """By which of the filters a task is found."""
    kinds = [event["kind"] for _, _, event in said]
    of_one: dict[str, dict[Places, float]] = {}
    for who, turn, event in said:
        if event["kind"] not in (SKIP, FLAG) and not turn.showing and who != REVIEW:
            of_one[who] = dict(said_of(event))
    first, *others = of_one.values() or [None]
    found = []
    if others:
        found.append(AGREED if all(each == first for each in others) else APART)
    if {SKIP, FLAG} & set(kinds):
        found.append(LEFT_OUT)
    if any(event.get("note") for _, _, event in said):
        found.append(NOTED)
    return found if said else [OPEN]
