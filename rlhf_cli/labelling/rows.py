"""Rows that reward, dpo and kto read as they are, from what was answered.

Columns beside those of the kind say where a row comes from: task, selected (by which rule),
annotator, labelled_by (what the key `source` said), instructions (a hash), policies (of a text that
several wrote all of them, in one), note. `reward` tells its accuracy by `selected`.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

from rlhf_cli.data.kinds import Turns
from rlhf_cli.labelling.answers import FLAG, SURE
from rlhf_cli.labelling.desk import Event
from rlhf_cli.labelling.tasks import PAIR, RANK, THUMBS, Task, Turn, writers_of

Answered = Sequence[tuple[Turn, Event]]
Row = dict[str, Any]
FILES = {
    RANK: ("rankings.jsonl", "preferences.jsonl"),
    PAIR: ("preferences.jsonl",),
    THUMBS: ("feedback.jsonl",),
}
"""What each protocol gives, the kind with all that was said first."""


def counted(answered: Iterable[tuple[Turn, Event]], protocol: str) -> list[tuple[Task, Event]]:
    """The answers that make rows: given to the first showing of tasks that nobody has flagged."""
    every = list(answered)
    flagged = {turn.task.id for turn, event in every if event["kind"] == FLAG}
    return [
        (turn.task, event)
        for turn, event in every
        if event["kind"] == protocol and turn.showing == 0 and turn.task.id not in flagged
    ]


def rows_of(answers: Sequence[tuple[Task, Event]], protocol: str) -> dict[str, list[Row]]:
    """The rows of each file; a tie is no preference."""
    made: dict[str, list[Row]] = {name: [] for name in FILES[protocol]}
    for task, event in answers:
        about = about_of(task, event)
        if protocol == THUMBS:
            label = {"completion": reply(task, 0), "label": event["label"]}
            made["feedback.jsonl"].append({"prompt": task.prompt, **label, **about})
            continue
        if protocol == RANK:
            said = {"responses": task.responses, "ranks": event["ranks"]}
            made["rankings.jsonl"].append({"prompt": task.prompt, **said, **about})
        made["preferences.jsonl"] += preferences(task, event, about)
    return made


def preferences(task: Task, event: Event, about: Row) -> Iterator[Row]:
    """The pairs of an answer that are no ties, the better side first.

    margin: of a pair, (strength - 1) / 3: none where it is slightly better, 1 where it is much
    better, as Llama 2 has it (2307.09288, table 28).
    p: of a judge, how sure it is that the chosen side is better; below 0.5 where the other pairs of
    a ranking outweigh this one.
    """
    for place, (i, j) in enumerate(combinations(range(len(task.responses)), 2)):
        if event["ranks"][i] == event["ranks"][j]:
            continue
        better, worse = (i, j) if event["ranks"][i] < event["ranks"][j] else (j, i)
        strength = event.get("strength")
        sure = {} if not strength else {"strength": strength, "margin": (strength - 1) / (SURE - 1)}
        policies = [about["policies"][better], about["policies"][worse]]
        sides = {"chosen": reply(task, better), "rejected": reply(task, worse)}
        soft = {"p": _likely(event["p"][place], better == i)} if "p" in event else {}
        yield {"prompt": task.prompt, **sides, **sure, **soft, **about, "policies": policies}


def _likely(p: float, as_said: bool) -> float:
    """The chance of the chosen side, where p is that of the first."""
    return p if as_said else 1 - p


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
        **({"note": event["note"]} if "note" in event else {}),
    }
