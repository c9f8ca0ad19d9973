"""How good labels are: who agrees with whom, how policies fare, what was shown, how long it took.

Everything is measured on pairs of responses within a task, but for thumbs, which are measured as
they are. Policies are rated by the Bradley-Terry maximum, with intervals by a bootstrap over tasks.
Where a rule has chosen tasks, all that would be another figure on them is measured on those alone
that were drawn: agreement, ties, biases, ratings.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, product
from statistics import median
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.labelling.answers import FLAG, SKIP, dense
from rlhf_cli.labelling.desk import Desk, Event
from rlhf_cli.labelling.rows import counted
from rlhf_cli.labelling.tasks import RANDOM, THUMBS, Task, writers_of
from rlhf_cli.objectives.agreement import ORDINAL, flip_rate, krippendorff_alpha
from rlhf_cli.objectives.comparisons import ratings
from rlhf_cli.reporting.grid import show, with_error

Figures = dict[str, Any]
Outcomes = dict[tuple[str, int, int], float]
"""What is said of each pair i < j of each task: 1 if i is better, 0 if j is, 0.5 of a tie. Of
thumbs the pair is (0, 0), and up is 1."""


def outcomes_of(answers: Iterable[tuple[Task, Event]]) -> Outcomes:
    """What answers say, pair by pair."""
    return {key: said for task, event in answers for key, said in _said(task.id, event)}


def _said(task: str, event: Event) -> Iterator[tuple[tuple[str, int, int], float]]:
    if event["kind"] == THUMBS:
        yield (task, 0, 0), float(event["label"])
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
    every = [each for said in of_task.values() for each in said]
    if not every:
        return None
    figures: Figures = {"agreement": sum(every) / len(every)}
    if (stderr := _clustered(list(of_task.values()))) is not None:
        figures["stderr"] = stderr
    figures |= {"outcomes": len(every), "tasks": len(of_task)}
    if decided:
        figures |= {"decided": sum(decided) / len(decided), "decided_outcomes": len(decided)}
    return figures


def _clustered(groups: Sequence[Sequence[float]]) -> float | None:
    """The standard error of the mean of all values, which are independent between groups only."""
    count, total = len(groups), sum(map(len, groups))
    if count < 2:
        return None
    mean = sum(map(sum, groups)) / total
    apart = sum(sum(value - mean for value in group) ** 2 for group in groups)
    return math.sqrt(apart * count / (count - 1)) / total


def between_people(said: Sequence[Outcomes]) -> Figures | None:
    """Agreement of annotators with each other, and Krippendorff's alpha."""
    figures = agreement_of(list(combinations(said, 2)))
    if figures is None:
        return None
    keys = sorted({key for each in said for key in each})
    table = torch.tensor([[each.get(key, math.nan) for each in said] for key in keys])
    alphas = {
        "alpha": krippendorff_alpha(table),
        "alpha_ordinal": krippendorff_alpha(table, ORDINAL),
    }
    known = {name: None if math.isnan(value) else value for name, value in alphas.items()}
    return figures | known


def report_of(desks: Sequence[Desk], tasks: Sequence[Task], seed: int) -> Figures:
    """Every figure of a label folder."""
    protocol = desks[0].terms.protocol
    answers = counted((each for desk in desks for each in desk.answered), protocol)
    drawn = at_random(answers)
    said = [outcomes_of(at_random(counted(desk.answered, protocol))) for desk in desks]
    events = [event for desk in desks for _, event in desk.answered]
    outcomes = [value for each in said for value in each.values()]
    by_reward, rewards = desks[0].terms.source == "reward", of_rewards(tasks, protocol)
    ties = {"ties": _share(value == 0.5 for value in outcomes)} if outcomes else {}
    return {
        "protocol": protocol,
        "source": desks[0].terms.source,
        "tasks": len(tasks),
        "labels": len(answers),
        "skipped": sum(event["kind"] == SKIP for event in events),
        "flagged": sum(event["kind"] == FLAG for event in events),
        "left": sum(desk.left for desk in desks),
        "selected": by_rule(tasks, answers),
        **(ties if protocol != THUMBS else {}),
        "annotators": {desk.who: of_one(desk) for desk in desks},
        "between_annotators": between_people(said),
        "with_themselves": agreement_of([_twice(desk) for desk in desks]),
        "with_reward": None if by_reward else agreement_of([(each, rewards) for each in said]),
        "bias": {} if protocol == THUMBS else bias_of(drawn),
        "ratings": rated(drawn, seed) if protocol != THUMBS else liked(drawn),
    }


def at_random(answers: Iterable[tuple[Task, Event]]) -> list[tuple[Task, Event]]:
    """The answers to tasks that no rule has chosen."""
    return [(task, event) for task, event in answers if task.selected == RANDOM]


def by_rule(tasks: Sequence[Task], answers: Sequence[tuple[Task, Event]]) -> Figures:
    """How many tasks and labels there are by each rule; nothing where all were drawn."""
    counts = Counter(task.selected for task in tasks)
    labels = Counter(task.selected for task, _ in answers)
    found = {rule: {"tasks": count, "labels": labels[rule]} for rule, count in counts.items()}
    return {} if found.keys() <= {RANDOM} else {RANDOM: {"tasks": 0, "labels": 0}, **found}


def labels_at_random(report: Figures) -> int:
    """The labels that agreement and ratings rest on."""
    selected = report["selected"]
    return int(selected[RANDOM]["labels"] if selected else report["labels"])


def crowd(report: Figures, flip: float) -> Figures:
    """Of errors that were planted: their chance, and what agreement tells of it."""
    between = report["between_annotators"] or {}
    told = {"recovered": flip_rate(between["decided"])} if "decided" in between else {}
    return {"chance": flip, **told}


def of_one(desk: Desk) -> Figures:
    """What one annotator did."""
    events = [event for _, event in desk.answered]
    seconds = [event["seconds"] for event in events if event.get("seconds")]
    again = agreement_of([_twice(desk)])
    return {
        "turns": len(desk.turns),
        "answered": len(events),
        "skipped": sum(event["kind"] == SKIP for event in events),
        "flagged": sum(event["kind"] == FLAG for event in events),
        **({"seconds_median": median(seconds)} if seconds else {}),
        **({"self_agreement": again["agreement"]} if again else {}),
    }


def _twice(desk: Desk) -> tuple[Outcomes, Outcomes]:
    """What was said of tasks the first time, and once more."""

    def at(showing: int) -> Outcomes:
        kept = [(turn.task, event) for turn, event in desk.answered if turn.showing == showing]
        known = [(task, event) for task, event in kept if event["kind"] not in (SKIP, FLAG)]
        return outcomes_of(at_random(known))

    return at(0), at(1)


def of_rewards(tasks: Sequence[Task], protocol: str) -> Outcomes:
    """What the rewards of responses say, of thumbs that they are above 0."""
    found: Outcomes = {}
    for task in tasks:
        if (rewards := task.rewards) is None:
            continue
        event: Event = {"kind": protocol, "ranks": dense(rewards), "label": rewards[0] > 0}
        found |= dict(_said(task.id, event))
    return found


def bias_of(answers: Sequence[tuple[Task, Event]]) -> Figures:
    """How often the first one shown, and the longer one, wins a pair that is decided."""
    first, longer = [], []
    for task, event in answers:
        for i, j in combinations(range(len(task.responses)), 2):
            ranks, shown = event["ranks"], event["shown"]
            if ranks[i] == ranks[j]:
                continue
            better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
            first.append(shown.index(better) < shown.index(worse))
            sizes = len(task.responses[better]), len(task.responses[worse])
            if sizes[0] != sizes[1]:
                longer.append(sizes[0] > sizes[1])
    told = {"first_shown_wins": first, "longer_wins": longer}
    return {
        name: {"share": _share(each), "pairs": len(each)} for name, each in told.items() if each
    }


def _share(values: Iterable[bool]) -> float:
    known = list(values)
    return sum(known) / len(known) if known else 0.0


# --------------------------------------------------------------------------- policies


def rated(answers: Sequence[tuple[Task, Event]], seed: int) -> Figures | None:
    """Ratings of the policies behind the responses; None where there is but one.

    apart: of each, those that it is above by more than chance has it; two of which neither is above
        the other are not separable by so many tasks.
    """
    wrote = (writers_of(origin) for task, _ in answers for origin in task.origins)
    names = sorted({name for writers in wrote for name in writers})
    if len(names) < 2:
        return None
    of_task: dict[str, Tensor] = {}  # several labels of a task are not several tasks
    for task, event in answers:
        points = points_of(task, event, names)
        of_task[task.id] = of_task.get(task.id, torch.zeros_like(points)) + points
    every = torch.stack(list(of_task.values()))
    games = every + every.mT
    every = (every / games.clamp(min=1))[games.sum((1, 2)) > 0]
    if not len(every):
        return None
    found = ratings(every, len(names) - 1, seed)
    return {
        name: {
            "rating": found.points[i].item(),
            "low": found.low[i].item(),
            "high": found.high[i].item(),
            "above": [other for j, other in enumerate(names) if found.apart[i, j]],
        }
        for i, name in enumerate(names)
    }


def points_of(task: Task, event: Event, names: Sequence[str]) -> Tensor:
    """(P, P) what each policy took from each other one in a task: a win is 1, a tie one half.

    What is said of a text is said of all who wrote it. Two who wrote the same tie by it: as it is
    in evaluate, responses that are alike are no reason to put one policy above the other.
    """
    points = torch.zeros(len(names), len(names), dtype=torch.double)
    writers = [[names.index(name) for name in writers_of(origin)] for origin in task.origins]
    met = [(*pair, 0.5) for each in writers for pair in combinations(each, 2)]
    for (_, i, j), won in _said(task.id, event):
        met += [(*pair, won) for pair in product(writers[i], writers[j])]
    for ours, theirs, won in met:
        if ours != theirs:
            points[ours, theirs] += won
            points[theirs, ours] += 1 - won
    return points


def liked(answers: Sequence[tuple[Task, Event]]) -> Figures:
    """The share of thumbs that are up, by policy."""
    up: dict[str, list[bool]] = {}
    for task, event in answers:
        for name in writers_of(task.origins[0]):
            up.setdefault(name, []).append(event["label"])
    return {name: {"up": _share(each), "labels": len(each)} for name, each in sorted(up.items())}


# --------------------------------------------------------------------------- in words


def table_of(report: Figures) -> list[tuple[object, ...]]:
    """A line for each policy: its rating with its interval, and whom it is above."""
    lines: list[tuple[object, ...]] = []
    for name, each in (report["ratings"] or {}).items():
        if "up" in each:
            lines.append((name, each["up"], each["labels"]))
        else:
            interval = f"{each['low']:.0f} to {each['high']:.0f}"
            lines.append(
                (name, round(each["rating"]), interval, ", ".join(each["above"]) or "none")
            )
    return lines


def inseparable(report: Figures) -> list[tuple[str, str]]:
    """Pairs of policies that the labels do not tell apart."""
    found = {name: each for name, each in (report["ratings"] or {}).items() if "above" in each}
    return [
        (ours, theirs)
        for ours, theirs in combinations(found, 2)
        if theirs not in found[ours]["above"] and ours not in found[theirs]["above"]
    ]


def headline(report: Figures) -> Figures:
    """The figures that stage.json has."""
    between, again = report["between_annotators"] or {}, report["with_themselves"] or {}
    reward, judge = report["with_reward"] or {}, report.get("with_judge") or {}
    told = {
        "labels": report["labels"],
        "left": report["left"],
        "ties": report.get("ties"),
        "agreement": between.get("agreement"),
        "agreement_stderr": between.get("stderr"),
        "alpha": between.get("alpha"),
        "self_agreement": again.get("agreement"),
        "reward_agreement": reward.get("agreement"),
        "judge_agreement": judge.get("agreement"),
    }
    return {name: value for name, value in told.items() if value is not None}


def sentence(report: Figures) -> str:
    """What was labelled, and how far it can be relied on."""
    told = f"{report['labels']} labels of {report['tasks']} tasks"
    if report["left"]:
        told += f", {report['left']} left"
    if report["selected"]:
        told += f"; ratings and agreement are of the {labels_at_random(report)} drawn at random"
    between, reward = report["between_annotators"], report["with_reward"]
    if between is not None:
        share = with_error(between["agreement"], between.get("stderr"))
        told += f"; annotators agree on {share} of {between['outcomes']} outcomes"
        told += f" (alpha {show(between['alpha'])})" if between["alpha"] is not None else ""
    if reward is not None:
        share = with_error(reward["agreement"], reward.get("stderr"))
        told += f"; the reward agrees with them on {share}"
    if (judge := report.get("with_judge")) is not None:
        share = with_error(judge["agreement"], judge.get("stderr"))
        told += f"; the judge agrees with them on {share}"
    return told
