"""How good labels are: who agrees with whom, how policies fare, what was shown, how long it took.

Everything is measured on pairs of responses within a task, but for what is said of a response by
itself. Policies are rated by the Bradley-Terry maximum, with intervals by a bootstrap over prompts.
Where a rule has chosen tasks, all that would be another figure on them is measured on those alone
that were drawn: agreement, ties, biases, ratings. Tasks that were planted count nowhere but there.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations, product
from statistics import median

import torch
from torch import Tensor

from rlhf_cli.labelling.answers import FLAG, SKIP
from rlhf_cli.labelling.automatic import by_rewards
from rlhf_cli.labelling.desk import Desk, Event
from rlhf_cli.labelling.outcomes import Figures, Outcomes, agreement_of, outcomes_of, said_of
from rlhf_cli.labelling.quality import anchors_of, contradictions_of, is_good, known_of, scores_of
from rlhf_cli.labelling.rows import counted
from rlhf_cli.labelling.tasks import INSTRUCTGPT, RANDOM, SINGLE, Task, key_of, writers_of
from rlhf_cli.objectives.agreement import ORDINAL, flip_rate, krippendorff_alpha
from rlhf_cli.objectives.comparisons import ratings
from rlhf_cli.objectives.estimates import Share, clustered_share

SEEN_HERE = ("page", "terminal")
"""Sources that see responses in the order of their turn."""


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
    tasks = [task for task in tasks if not task.planted]
    drawn = at_random(answers)
    own = [at_random(counted(desk.own, protocol)) for desk in desks]
    said = [outcomes_of(each) for each in own]
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
        "reviewed": sum(bool(event.get("reviewed")) for event in events),
        **(ties if protocol not in SINGLE else {}),
        "annotators": {desk.who: of_one(desk) for desk in desks},
        "between_annotators": between_people(said),
        "with_themselves": agreement_of([_twice(desk) for desk in desks]),
        "with_reward": None if by_reward else agreement_of([(each, rewards) for each in said]),
        "anchors": anchors_of(desks),
        "bias": {} if protocol in SINGLE else bias_of([each for said in own for each in said]),
        "ratings": rated(drawn, seed) if protocol not in SINGLE else liked(drawn),
        **(_rating_figures(drawn) if protocol == INSTRUCTGPT else {}),
    }


def _rating_figures(answers: Sequence[tuple[Task, Event]]) -> Figures:
    return {"scores": scores_of(answers), "contradictions": contradictions_of(answers)}


def at_random(answers: Iterable[tuple[Task, Event]]) -> list[tuple[Task, Event]]:
    """The answers to tasks that no rule has chosen."""
    return [(task, event) for task, event in answers if task.selected == RANDOM]


def by_rule(tasks: Sequence[Task], answers: Sequence[tuple[Task, Event]]) -> Figures:
    """How many tasks and labels there are by each rule; nothing where all were drawn."""
    counts = Counter(task.selected for task in tasks)
    labels = Counter(task.selected for task, _ in answers)
    found = {rule: {"tasks": count, "labels": labels[rule]} for rule, count in counts.items()}
    return {} if found.keys() <= {RANDOM} else {RANDOM: {"tasks": 0, "labels": 0}, **found}


def crowd(report: Figures, flip: float, desks: Sequence[Desk], tasks: Sequence[Task]) -> Figures:
    """Of errors that were planted: their chance, the share of pairs that they turned round, and
    what the agreement of annotators tells of it.
    """
    protocol, between = desks[0].terms.protocol, report["between_annotators"] or {}
    rewards = of_rewards(tasks, protocol)
    said = [outcomes_of(at_random(counted(desk.answered, protocol))) for desk in desks]
    meant = agreement_of([(each, rewards) for each in said]) or {}
    told = {"chance": flip}
    told |= {"planted": 1 - meant["decided"]} if "decided" in meant else {}
    return told | ({"recovered": flip_rate(between["decided"])} if "decided" in between else {})


def of_one(desk: Desk) -> Figures:
    """What one annotator did, whatever a review put in its place."""
    events = [event for _, event in desk.own]
    seconds = [event["seconds"] for event in events if event.get("seconds")]
    again, known = agreement_of([_twice(desk)]), known_of(desk)
    return {
        "turns": len(desk.turns),
        "answered": len(events),
        "skipped": sum(event["kind"] == SKIP for event in events),
        "flagged": sum(event["kind"] == FLAG for event in events),
        **({"seconds_median": median(seconds)} if seconds else {}),
        **({"self_agreement": again["agreement"]} if again else {}),
        **({"known": known} if known else {}),
    }


def _twice(desk: Desk) -> tuple[Outcomes, Outcomes]:
    """What was said of tasks the first time, and once more."""

    def at(showing: int) -> Outcomes:
        kept = [(turn.task, event) for turn, event in desk.own if turn.showing == showing]
        known = [(task, event) for task, event in kept if event["kind"] not in (SKIP, FLAG)]
        return outcomes_of(at_random(known))

    return at(0), at(1)


def of_rewards(tasks: Sequence[Task], protocol: str) -> Outcomes:
    """What the rewards of responses say, of thumbs and of steps that they are above 0."""
    said = ((task, by_rewards(task, protocol)) for task in tasks)
    return outcomes_of((task, answer) for task, answer in said if answer is not None)


def bias_of(answers: Sequence[tuple[Task, Event]]) -> Figures:
    """How often the first one shown, and the longer one, wins a pair that is decided, with 95%
    intervals over prompts. What was first is known of those alone who saw it here.
    """
    hits: dict[str, list[tuple[bool, str]]] = {"first_shown_wins": [], "longer_wins": []}
    for task, event in answers:
        for i, j in combinations(range(len(task.responses)), 2):
            ranks, shown = event["ranks"], event["shown"]
            if ranks[i] == ranks[j]:
                continue
            better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
            prompt = key_of(task.prompt)
            if event["source"] in SEEN_HERE:
                first = shown.index(better) < shown.index(worse)
                hits["first_shown_wins"].append((first, prompt))
            sizes = len(task.responses[better]), len(task.responses[worse])
            if sizes[0] != sizes[1]:
                hits["longer_wins"].append((sizes[0] > sizes[1], prompt))
    return {
        name: {"share": found.mean, **_ends(found), "pairs": len(each)}
        for name, each in hits.items()
        if each and (found := _shared(each))
    }


def _shared(hits: Sequence[tuple[bool, str]]) -> Share:
    """The share of hits, each with what it is not independent within."""
    return clustered_share(torch.tensor([hit for hit, _ in hits]), [place for _, place in hits])


def _ends(found: Share) -> Figures:
    return {"low": found.low, "high": found.high}


def _share(values: Iterable[bool]) -> float:
    known = list(values)
    return sum(known) / len(known) if known else 0.0


# --------------------------------------------------------------------------- policies


def rated(answers: Sequence[tuple[Task, Event]], seed: int) -> Figures | None:
    """Ratings of the policies behind the responses; None where there is but one.

    apart: of each, those that it is above by more than chance has it; two of which neither is above
        the other are not separable by so many labels.
    """
    wrote = (writers_of(origin) for task, _ in answers for origin in task.origins)
    names = sorted({name for writers in wrote for name in writers})
    if len(names) < 2:
        return None
    of_prompt: dict[str, Tensor] = {}  # several labels or tasks of a prompt are not several prompts
    for task, event in answers:
        points, prompt = points_of(task, event, names), key_of(task.prompt)
        of_prompt[prompt] = of_prompt.get(prompt, torch.zeros_like(points)) + points
    every = torch.stack(list(of_prompt.values()))
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
    for (_, i, j), won in said_of(task.id, event):
        met += [(*pair, won) for pair in product(writers[i], writers[j])]
    for ours, theirs, won in met:
        if ours != theirs:
            points[ours, theirs] += won
            points[theirs, ours] += 1 - won
    return points


def liked(answers: Sequence[tuple[Task, Event]]) -> Figures:
    """The share of responses that are good by themselves, by policy, with 95% intervals over
    prompts.
    """
    up: dict[str, list[tuple[bool, str]]] = {}
    for task, event in answers:
        for name in writers_of(task.origins[0]):
            up.setdefault(name, []).append((is_good(event), key_of(task.prompt)))
    found = {name: _shared(each) for name, each in sorted(up.items())}
    return {
        name: {"up": each.mean, **_ends(each), "labels": len(up[name])}
        for name, each in found.items()
    }
