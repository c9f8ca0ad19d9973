"""Rows that reward, dpo and kto read as they are, from what was answered.

Columns beside those of the kind say where a row comes from: task, selected (by which rule),
annotator, labelled_by (what the key `source` said), instructions (a hash), policies (of a text that
several wrote all of them, in one), note. `reward` tells its accuracy by `selected`.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

from rlhf_cli.data.kinds import Turns
from rlhf_cli.labelling.answers import FLAG, MARKS, SURE
from rlhf_cli.labelling.desk import Event
from rlhf_cli.labelling.tasks import (
    INSTRUCTGPT,
    PAIR,
    RANK,
    RANKED,
    STEPS,
    THUMBS,
    Task,
    Turn,
    writers_of,
)

Row = dict[str, Any]
FILES = {
    RANK: ("rankings.jsonl", "preferences.jsonl"),
    PAIR: ("preferences.jsonl",),
    THUMBS: ("feedback.jsonl",),
    INSTRUCTGPT: ("rankings.jsonl", "preferences.jsonl", "feedback.jsonl"),
    STEPS: ("stepwise.jsonl",),
}
"""What each protocol gives, the kind with all that was said first."""


def counted(answered: Iterable[tuple[Turn, Event]], protocol: str) -> list[tuple[Task, Event]]:
    """The answers that make rows: given to the first showing of tasks that nobody has flagged, and
    that were not planted.
    """
    every = list(answered)
    flagged = {turn.task.id for turn, event in every if event["kind"] == FLAG}
    return [
        (turn.task, event)
        for turn, event in every
        if event["kind"] == protocol and turn.showing == 0
        if turn.task.id not in flagged and not turn.task.planted
    ]


def rows_of(answers: Sequence[tuple[Task, Event]], protocol: str) -> dict[str, list[Row]]:
    """The rows of each file; a tie is no preference.

    Where a judge says how sure it is of its answers, those of a review beside them are certain.
    """
    soft = any("p" in event for _, event in answers)
    made: dict[str, list[Row]] = {name: [] for name in FILES[protocol]}
    for task, event in answers:
        about = about_of(task, event)
        if protocol == STEPS:
            made["stepwise.jsonl"].append({"prompt": task.prompt, **stepwise(task, event), **about})
        elif protocol == THUMBS:
            label = {"completion": reply(task, 0), "label": event["label"]}
            made["feedback.jsonl"].append({"prompt": task.prompt, **label, **about})
        if protocol in RANKED:
            said = {"responses": task.responses, "ranks": event["ranks"]}
            made["rankings.jsonl"].append({"prompt": task.prompt, **said, **about})
        if "preferences.jsonl" in made:
            made["preferences.jsonl"] += preferences(task, event, about, soft)
        if protocol == INSTRUCTGPT:
            made["feedback.jsonl"] += rated(task, event, about)
    return made


def stepwise(task: Task, event: Event) -> Row:
    """The steps of a response, right while all up to them are: 1, 1, 0, 0.

    So label Uesato et al. (2211.14275), to whom a step is right if the solution is so far. Lightman
    et al. (2305.20050) end a response at its first wrong step, which then is the last one wherever
    a step is wrong: the model could go by that. first_wrong lets you cut there.
    """
    wrong = event["first_wrong"]
    labels = event.get("labels") or [
        float(wrong is None or number < wrong) for number in range(1, len(task.steps) + 1)
    ]
    return {"steps": task.steps, "labels": labels, "first_wrong": wrong}


def rated(task: Task, event: Event, about: Row) -> Iterator[Row]:
    """Each response with its rating as `score`, and each mark as a column."""
    for place, (score, marks) in enumerate(zip(event["ratings"], event["marks"], strict=True)):
        said = {"completion": reply(task, place), "score": score}
        has = {name: name in marks for name, _ in MARKS.values()}
        policies = about["policies"][place : place + 1]
        yield {"prompt": task.prompt, **said, **has, **about, "policies": policies}


def preferences(task: Task, event: Event, about: Row, soft: bool) -> Iterator[Row]:
    """The pairs of an answer that are no ties, the better side first.

    margin: of a pair, (strength - 1) / 3: none where it is slightly better, 1 where it is much
    better, as Llama 2 has it (2307.09288, table 28).
    p: where rows are soft, the chance that the chosen side is better: of a judge, how sure it is,
    below 0.5 where the other pairs of a ranking outweigh this one; 1 of anybody else.
    """
    places = list(combinations(range(len(task.responses)), 2))
    for better, worse in event.get("decided", decided(event["ranks"])):
        strength = event.get("strength")
        sure = {} if not strength else {"strength": strength, "margin": (strength - 1) / (SURE - 1)}
        sure |= {"margin": event["margin"]} if "margin" in event else {}
        policies = [about["policies"][better], about["policies"][worse]]
        sides = {"chosen": reply(task, better), "rejected": reply(task, worse)}
        if "p" in event:
            first = min(better, worse)
            p = event["p"][places.index((first, max(better, worse)))]
            sure |= {"p": p if better == first else 1 - p}
        elif soft:
            sure |= {"p": 1.0}
        yield {"prompt": task.prompt, **sides, **sure, **about, "policies": policies}


def decided(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """The pairs that are no ties, the better one first."""
    pairs = combinations(range(len(ranks)), 2)
    return [(i, j) if ranks[i] < ranks[j] else (j, i) for i, j in pairs if ranks[i] != ranks[j]]


def reply(task: Task, place: int) -> str | Turns:
    """A response as rows have it: of a dialogue it is a message, too."""
    text = task.responses[place]
    return text if isinstance(task.prompt, str) else [{"role": "assistant", "content": text}]


def about_of(task: Task, event: Event) -> Row:
    """Where a row comes from."""
    return {
        "task": task.id,
        "selected": task.selected,
        "annotator": event["annotator"],
        "labelled_by": event["source"],
        "instructions": event["instructions"],
        "policies": [", ".join(writers_of(origin)) for origin in task.origins],
        **{name: event[name] for name in ("votes", "reviewed", "note") if name in event},
    }
