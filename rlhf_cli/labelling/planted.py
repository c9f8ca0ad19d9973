"""Tasks that everybody gets and that make no row: with known answers, or out of earlier runs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.files import find
from rlhf_cli.data.kinds import Feedback, Preference, Ranking, Row, Stepwise, reply_text
from rlhf_cli.data.order import order_of
from rlhf_cli.data.parse import rows_of_file
from rlhf_cli.data.raw import RowError
from rlhf_cli.data.readers import as_row
from rlhf_cli.folders.journal import Journal
from rlhf_cli.folders.manifest import EVENTS
from rlhf_cli.labelling.answers import FIELDS, FLAG, dense
from rlhf_cli.labelling.tasks import PAIR, RANKED, STEPS, THUMBS, Task, id_of, key_of, read_tasks

KNOWN = {
    **dict.fromkeys((*RANKED, PAIR), "prompt, responses and ranks, or prompt, chosen and rejected"),
    THUMBS: "prompt, completion and label",
    STEPS: "prompt, steps and labels",
}
"""The rows that tell what is right, by protocol."""


def with_planted(tasks: Sequence[Task], planted: Sequence[Task]) -> list[Task]:
    """Tasks with those that are planted, of which none asks what another one does."""
    asked = {asked_by(task): task for task in reversed(planted)}
    return [*(task for task in tasks if asked_by(task) not in asked), *asked.values()]


def asked_by(task: Task) -> tuple[str, frozenset[str]]:
    """What two tasks share that ask the same, in whatever order."""
    return key_of(task.prompt), frozenset(task.responses)


# --------------------------------------------------------------------------- known answers


def known_tasks(path: str, protocol: str, join: str) -> list[Task]:
    """The tasks of known=FILE, each with the answer that is right.

    Args:
        join: between the steps of a response.

    Raises:
        UserError: a row tells no answer of the protocol.
    """
    tasks = []
    for file in find(path).train:
        for raw, place in rows_of_file(file):
            if isinstance(raw, UserError):
                raise raw
            row = as_row(raw, place)
            task = task_of_row(row, protocol, join)
            if task is None:
                raise RowError(f"{place}: algo.protocol={protocol} needs {KNOWN[protocol]}")
            tasks.append(task)
    return tasks


def task_of_row(row: Row, protocol: str, join: str) -> Task | None:
    """What a row that judges responses asks, and its answer; None where a protocol has no such."""
    steps: list[str] = []
    known: dict[str, Any]
    if isinstance(row, Preference) and protocol not in (THUMBS, STEPS):
        texts, known = [reply_text(row.chosen), reply_text(row.rejected)], {"ranks": [1, 2]}
    elif isinstance(row, Ranking) and (
        protocol in RANKED or (protocol, len(row.ranks)) == (PAIR, 2)
    ):
        texts = [reply_text(each) for each in row.responses]
        known = {"ranks": dense([-rank for rank in row.ranks])}
    elif isinstance(row, Feedback) and protocol == THUMBS and row.label is not None:
        texts, known = [reply_text(row.completion)], {"label": row.label}
    elif isinstance(row, Stepwise) and protocol == STEPS:
        wrong = (number for number, label in enumerate(row.labels, 1) if label < 0.5)
        texts, steps, known = [join.join(row.steps)], row.steps, {"first_wrong": next(wrong, None)}
    else:
        return None
    origins = [{"policy": None} for _ in texts]
    said = id_of(row.prompt, texts), row.prompt, texts, origins, row.source
    return Task(*said, steps=steps, known=known)


# --------------------------------------------------------------------------- anchors


def anchor_tasks(folder: str, protocol: str, count: int, seed: int) -> list[Task]:
    """The anchors of an earlier label folder, or so many of its tasks where it has none.

    Each knows what earlier runs said of it. So the same ones go on from run to run.

    Raises:
        UserError: it is no label folder, or what was asked in it is not what is asked now.
    """
    answers = answers_in(Path(folder), protocol)
    tasks = [task for task in read_tasks(Path(folder)) if task.id in answers and not task.known]
    anchors = [task for task in tasks if task.earlier is not None]
    if not anchors:
        drawn = order_of(len(tasks), seed, "anchors", 0)[:count]
        anchors = [tasks[place] for place in drawn]
    if not anchors:
        raise UserError(f"anchors={folder} has no answers to tasks of algo.protocol={protocol}")
    return [
        replace(task, earlier=[*(task.earlier or []), {"out": folder, "answers": answers[task.id]}])
        for task in anchors
    ]


def answers_in(folder: Path, protocol: str) -> dict[str, list[dict[str, Any]]]:
    """By task what annotators answered at last, to its first showing, and did not take back."""
    found: dict[str, list[dict[str, Any]]] = {}
    left_out: set[str] = set()
    for file in sorted(folder.glob(EVENTS.format("*"))):
        last: dict[str, dict[str, Any]] = {}
        for block in Journal(file).blocks():
            last |= {event["task"]: event for event in block if event.get("showing") == 0}
        left_out |= {task for task, event in last.items() if event.get("kind") == FLAG}
        for task, event in last.items():
            if event.get("kind") == protocol:
                kept = (*FIELDS[protocol], "source", "reviewed")
                said = {name: event[name] for name in kept if name in event}
                found.setdefault(task, []).append(said)
    return {task: said for task, said in found.items() if task not in left_out}
