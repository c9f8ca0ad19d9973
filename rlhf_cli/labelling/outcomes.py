"""What answers say pair by pair, and how often two say the same."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

from rlhf_cli.labelling.desk import Event
from rlhf_cli.labelling.tasks import STEPS, THUMBS, Task

Figures = dict[str, Any]
Outcomes = dict[tuple[str, int, int], float]
"""What is said of each pair i < j of each task: 1 if i is better, 0 if j is, 0.5 of a tie. Of a
response by itself the pair is (0, 0): thumbs up is 1; of steps it is the number of the first wrong
one, infinite for none: the later, the better.
"""


def outcomes_of(answers: Iterable[tuple[Task, Event]]) -> Outcomes:
    """What answers say, pair by pair."""
    return {key: said for task, event in answers for key, said in said_of(task.id, event)}


def said_of(task: str, event: Event) -> Iterator[tuple[tuple[str, int, int], float]]:
    """What an answer says, pair by pair."""
    if event["kind"] in (THUMBS, STEPS):
        said = event["label"] if event["kind"] == THUMBS else event["first_wrong"] or math.inf
        yield (task, 0, 0), float(said)
        return
    ranks = event["ranks"]
    for i, j in combinations(range(len(ranks)), 2):
        yield (task, i, j), 0.5 * (1 + (ranks[i] < ranks[j]) - (ranks[i] > ranks[j]))


def agreement_of(pairs: Sequence[tuple[Outcomes, Outcomes]]) -> Figures | None:
    """How often two say the same, over all pairs of those who judged the same things.

    agreement: of all outcomes, with a standard error over tasks; decided: of those where neither
        says that it is a tie. None where nothing was judged by two.
    """
    of_task: dict[str, list[float]] = {}
    decided = []
    for ours, theirs in pairs:
        for key in ours.keys() & theirs.keys():
            of_task.setdefault(key[0], []).append(float(ours[key] == theirs[key]))
            if 0.5 not in (ours[key], theirs[key]):
                decided.append(ours[key] == theirs[key])
    if not of_task:
        return None
    figures = mean_of(of_task, "agreement", "outcomes") | {"tasks": len(of_task)}
    if decided:
        figures |= {"decided": sum(decided) / len(decided), "decided_outcomes": len(decided)}
    return figures


def mean_of(of_task: dict[str, list[float]], name: str, counted: str) -> Figures:
    """The mean of what tasks say, with its standard error, and how many values it is of."""
    groups = list(of_task.values())
    every = [each for said in groups for each in said]
    figures: Figures = {name: sum(every) / len(every)}
    if (stderr := clustered(groups)) is not None:
        figures["stderr"] = stderr
    return figures | {counted: len(every)}


def clustered(groups: Sequence[Sequence[float]]) -> float | None:
    """The standard error of the mean of all values, which are independent between groups only."""
    count, total = len(groups), sum(map(len, groups))
    if count < 2:
        return None
    mean = sum(map(sum, groups)) / total
    apart = sum(sum(value - mean for value in group) ** 2 for group in groups)
    return math.sqrt(apart * count / (count - 1)) / total
