"""One answer of several to a task, by what most of them say."""

from collections.abc import Iterable, Sequence
from itertools import combinations
from statistics import mean

from rlhf_cli.labelling.answers import MARKS, SURE, dense
from rlhf_cli.labelling.desk import Event
from rlhf_cli.labelling.tasks import INSTRUCTGPT, PAIR, STEPS, THUMBS, Task

EACH, MAJORITY = "each", "majority"


def by_majority(answers: Sequence[tuple[Task, Event]]) -> list[tuple[Task, Event]]:
    """An answer to each task; one that is alone stays as it is.

    Pair by pair counts what more than half of the labels say, else it is a tie. Such pairs may run
    in a circle (Condorcet): preferences have them as they are, a ranking orders responses by the
    pairs they win less those they lose (Copeland), so that all of a circle tie. Thumbs that are
    split make no answer; of a split over a step its label is one half. Ratings are averaged.
    """
    of_task: dict[str, list[tuple[Task, Event]]] = {}
    for task, event in answers:
        of_task.setdefault(task.id, []).append((task, event))
    merged = (
        (said[0][0], merge(said[0][0], [event for _, event in said])) for said in of_task.values()
    )
    return [(task, event) for task, event in merged if event is not None]


def merge(task: Task, events: Sequence[Event]) -> Event | None:
    """What most of the answers to a task say; None where they are split over thumbs."""
    if len(events) == 1:
        return events[0]
    kind = events[0]["kind"]
    about = {
        "kind": kind,
        "task": task.id,
        "annotator": [event["annotator"] for event in events],
        "source": events[0]["source"],
        "instructions": events[0]["instructions"],
        "votes": len(events),
        **({"reviewed": True} if all(event.get("reviewed") for event in events) else {}),
    }
    if kind == THUMBS:
        up = sum(event["label"] for event in events)
        return None if 2 * up == len(events) else {**about, "label": 2 * up > len(events)}
    if kind == STEPS:
        return {**about, **steps_of(len(task.steps), [event["first_wrong"] for event in events])}
    said = {**about, **pairs_of(len(task.responses), [event["ranks"] for event in events])}
    if kind == PAIR:
        said |= {"margin": margin_of(said["ranks"], events)}
    if kind == INSTRUCTGPT:
        places = range(len(task.responses))
        said |= {
            "ratings": [mean(event["ratings"][place] for event in events) for place in places],
            "marks": [
                [
                    name
                    for name, _ in MARKS.values()
                    if most(name in each["marks"][place] for each in events)
                ]
                for place in places
            ],
        }
    return said


def most(said: Iterable[bool]) -> bool:
    """Whether more than half say so."""
    votes = list(said)
    return 2 * sum(votes) > len(votes)


def pairs_of(count: int, rankings: Sequence[Sequence[int]]) -> Event:
    """The pairs that most rankings decide alike, the better one first, and ranks by them."""
    decided = []
    for i, j in combinations(range(count), 2):
        if most(ranks[i] < ranks[j] for ranks in rankings):
            decided.append((i, j))
        elif most(ranks[i] > ranks[j] for ranks in rankings):
            decided.append((j, i))
    points = [
        sum(i == a for a, _ in decided) - sum(i == b for _, b in decided) for i in range(count)
    ]
    return {"decided": decided, "ranks": dense(points)}


def margin_of(ranks: Sequence[int], events: Sequence[Event]) -> float:
    """The mean margin of those who say of a pair what most say; 0 of a tie."""
    sure = [event["strength"] for event in events if event["ranks"] == ranks]
    return mean((strength - 1) / (SURE - 1) for strength in sure) if ranks != [1, 1] else 0.0


def steps_of(count: int, wrong: Sequence[int | None]) -> Event:
    """Of each step whether most hold all up to it to be right, one half where they are split."""
    labels = []
    for number in range(1, count + 1):
        right = sum(each is None or number < each for each in wrong)
        labels.append(0.5 if 2 * right == len(wrong) else float(2 * right > len(wrong)))
    first = next((number for number, label in enumerate(labels, 1) if label < 0.5), None)
    return {"labels": labels, "first_wrong": first}
