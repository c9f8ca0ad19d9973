"""What answers say, pair by pair."""

import math
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any, NamedTuple

from rlhf_cli.labelling.desk import Event
from rlhf_cli.labelling.tasks import STEPS, THUMBS, Task, key_of

Figures = dict[str, Any]
Places = tuple[int, int]  # of two responses in a task


class Asked(NamedTuple):
    """What is judged: of a task the responses first and second, or one of them by itself.

    prompt: as `key_of` has it.
    """

    prompt: str
    task: str
    first: int
    second: int


Outcomes = dict[Asked, float]
"""What is said of each pair i < j of each task: 1 if i is better, 0 if j is, 0.5 of a tie. Of a
response by itself the pair is (0, 0): thumbs up is 1; of steps it is the number of the first wrong
one, infinite for none: the later, the better.
"""


def outcomes_of(answers: Iterable[tuple[Task, Event]]) -> Outcomes:
    """What answers say, pair by pair."""
    found: Outcomes = {}
    for task, event in answers:
        found |= asked_of(task, said_of(event))
    return found


def asked_of(task: Task, said: Iterable[tuple[Places, float]]) -> Outcomes:
    """What is said of the pairs of a task."""
    prompt = key_of(task.prompt)
    return {Asked(prompt, task.id, *places): value for places, value in said}


def said_of(event: Event) -> Iterator[tuple[Places, float]]:
    """What an answer says of each pair."""
    if event["kind"] in (THUMBS, STEPS):
        said = event["label"] if event["kind"] == THUMBS else event["first_wrong"] or math.inf
        yield (0, 0), float(said)
        return
    ranks = event["ranks"]
    for i, j in combinations(range(len(ranks)), 2):
        yield (i, j), 0.5 * (1 + (ranks[i] < ranks[j]) - (ranks[i] > ranks[j]))


def is_good(event: Event) -> bool:
    """Whether a response that is judged by itself is good: thumbs up, or no step is wrong."""
    return bool(event["label"]) if "label" in event else event["first_wrong"] is None
