"""How good labels are: who agrees with whom, how policies fare, what was shown, how long it took.

Everything is measured on pairs of responses within a task, but for what is said of a response by
itself. All errors and intervals are over prompts, of which several tasks may be one.
Where a rule has chosen tasks, all that would be another figure on them is measured on those alone
that were drawn: agreement, ties, biases, ratings. Tasks that were planted count nowhere but there.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from statistics import median

from rlhf_cli.labelling.agreement import agreement_of, between_people, calibration_of, share_of
from rlhf_cli.labelling.answers import FLAG, SKIP, dense
from rlhf_cli.labelling.automatic import by_rewards
from rlhf_cli.labelling.desk import Desk, Event
from rlhf_cli.labelling.outcomes import Figures, Outcomes, asked_of, outcomes_of, said_of
from rlhf_cli.labelling.policies import liked, meetings_of, rated, win_rates
from rlhf_cli.labelling.quality import anchors_of, contradictions_of, known_of, scores_of
from rlhf_cli.labelling.rows import counted, decided
from rlhf_cli.labelling.tasks import INSTRUCTGPT, RANDOM, SINGLE, Task, key_of
from rlhf_cli.objectives.agreement import flip_rate

SEEN_HERE = ("page", "terminal")
"""Sources that see responses in the order of their turn."""


def report_of(
    desks: Sequence[Desk], tasks: Sequence[Task], seed: int, scale: float | None
) -> Figures:
    """Every figure of a label folder.

    Args:
        scale: how many log-odds a unit of the reward is; None where it tells no probabilities.
    """
    protocol = desks[0].terms.protocol
    answers = counted((each for desk in desks for each in desk.answered), protocol)
    tasks = [task for task in tasks if not task.planted]
    drawn = at_random(answers)
    own = [at_random(counted(desk.own, protocol)) for desk in desks]
    said = [outcomes_of(each) for each in own]
    events = [event for desk in desks for _, event in desk.answered]
    outcomes = [value for each in said for value in each.values()]
    by_reward = desks[0].terms.source == "reward"
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
        "between_annotators": between_people(said, protocol, seed),
        "with_themselves": agreement_of([_twice(desk) for desk in desks]),
        "with_reward": None if by_reward else with_reward(said, tasks, protocol, scale),
        "anchors": anchors_of(desks),
        "bias": {} if protocol in SINGLE else bias_of([each for said in own for each in said]),
        "win_rates": {} if protocol in SINGLE else wins_of(drawn),
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


def planted_errors(
    report: Figures, flip: float, desks: Sequence[Desk], tasks: Sequence[Task]
) -> Figures:
    """Of errors that were planted: their chance, the share of pairs that they turned round, and
    what the agreement of annotators tells of it, with a 95% interval over prompts; all of what they
    said, whatever a review put in its place.
    """
    protocol, between = desks[0].terms.protocol, report["between_annotators"] or {}
    rewards = of_rewards(tasks, protocol)
    said = [outcomes_of(at_random(counted(desk.own, protocol))) for desk in desks]
    meant = agreement_of([(each, rewards) for each in said]) or {}
    told = {"chance": flip}
    told |= {"planted": 1 - meant["decided"]} if "decided" in meant else {}
    ends = {"": "decided", "_low": "decided_high", "_high": "decided_low"}
    told |= {
        f"recovered{end}": flip_rate(between[share])
        for end, share in ends.items()
        if share in between
    }
    return told


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


def with_reward(
    said: Sequence[Outcomes], tasks: Sequence[Task], protocol: str, scale: float | None
) -> Figures | None:
    """How far rewards agree with annotators, and on what these have judged how policies fare by
    them, what length has to do with it, and how far it can be believed how sure they are.

    Args: as of `report_of`.
    """
    rewards = of_rewards(tasks, protocol)
    agrees = agreement_of([(each, rewards) for each in said])
    if agrees is None or protocol in SINGLE:
        return agrees
    labelled = {key.task for each in said for key in each}
    known = [(task, task.rewards) for task in tasks if task.id in labelled and task.rewards]
    answers = [
        (task, {"kind": protocol, "ranks": dense(found), "source": "reward"})
        for task, found in known
    ]
    agrees |= {**bias_of(answers), "win_rates": wins_of(answers)}
    if scale is None:
        return agrees
    log_odds: Outcomes = {}
    for task, found in known:
        places = combinations(range(len(found)), 2)
        log_odds |= asked_of(task, (((i, j), scale * (found[i] - found[j])) for i, j in places))
    return agrees | {"calibration": calibration_of(said, log_odds)}


def wins_of(answers: Sequence[tuple[Task, Event]]) -> Figures:
    """`win_rates` of what answers say."""
    return win_rates(met for task, event in answers for met in meetings_of(task, said_of(event)))


def bias_of(answers: Sequence[tuple[Task, Event]]) -> Figures:
    """How often the first one shown, and the longer one, wins a pair that is decided, with 95%
    intervals over prompts. What was first is known of those alone who saw it here.
    """
    hits: dict[str, list[tuple[bool, str]]] = {"first_shown_wins": [], "longer_wins": []}
    for task, event in answers:
        prompt = key_of(task.prompt)
        for better, worse in decided(event["ranks"]):
            if event["source"] in SEEN_HERE:
                first = event["shown"].index(better) < event["shown"].index(worse)
                hits["first_shown_wins"].append((first, prompt))
            sizes = len(task.responses[better]), len(task.responses[worse])
            if sizes[0] != sizes[1]:
                hits["longer_wins"].append((sizes[0] > sizes[1], prompt))
    return {
        name: {"share": found.mean, "low": found.low, "high": found.high, "pairs": len(each)}
        for name, each in hits.items()
        if each and (found := share_of(each))
    }


def _share(values: Iterable[bool]) -> float:
    known = list(values)
    return sum(known) / len(known) if known else 0.0
