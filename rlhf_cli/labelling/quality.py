"""What planted tasks tell of the people who label, and what ratings say beside rankings.

Tasks whose answer is known measure each of them; anchors, which came in earlier runs as well, tell
whether all of them judge as they did then (Stiennon et al. 2009.01325, C.6).
"""

from collections.abc import Iterable, Sequence
from itertools import product

from rlhf_cli.labelling.agreement import agreement_of, mean_of
from rlhf_cli.labelling.answers import FLAG, MARKS, SKIP
from rlhf_cli.labelling.desk import Desk, Event
from rlhf_cli.labelling.outcomes import Figures, Outcomes, is_good, outcomes_of, said_of
from rlhf_cli.labelling.tasks import SINGLE, Task, Turn, key_of, writers_of
from rlhf_cli.reporting.grid import with_error

MACHINES = ("judge", "reward")
"""Sources of labels that nobody gives."""

Said = Sequence[tuple[Task, Event]]


def known_of(desk: Desk) -> Figures | None:
    """How often somebody is right where that is known; None where nothing known was judged."""
    said = [(turn.task, event) for turn, event in judged(desk) if turn.task.known is not None]
    kind = desk.terms.protocol
    known = [(task, answer) for task, _ in said for answer in told_of(task, kind)]
    figures = agreement_of([(outcomes_of(said), outcomes_of(known))])
    return None if figures is None else {"right": figures.pop("agreement"), **figures}


def anchors_of(desks: Sequence[Desk]) -> Figures | None:
    """What anchors were said to be, run after run; None where there are none.

    same: how often the answers of now are those of the run before.
    runs: of each run, the oldest first, how often which policy is above which other one, or of
        responses that are judged by themselves how often they are good.
    """
    of_desk = [
        [(turn.task, event) for turn, event in judged(desk) if turn.task.earlier] for desk in desks
    ]
    now = [each for said in of_desk for each in said]
    tasks = {task.id: task for task, _ in now}
    if not tasks:
        return None
    kind = desks[0].terms.protocol
    runs: dict[str, list[tuple[Task, Event]]] = {}
    for task in tasks.values():
        for run in task.earlier or []:
            answers = ((task, {**answer, "kind": kind}) for answer in run["answers"])
            runs.setdefault(run["out"], []).extend(answers)
    before: list[Outcomes] = []
    for task in tasks.values():
        before += [outcomes_of([(task, answer)]) for answer in told_of(task, kind)]
    same = agreement_of([*product(map(outcomes_of, of_desk), before)])
    told = [{"out": out, **rates_of(said)} for out, said in runs.items()]
    return {"tasks": len(tasks), "same": same, "runs": [*told, {"out": "now", **rates_of(now)}]}


def told_of(task: Task, protocol: str) -> list[Event]:
    """What was known of a task before it was labelled here: its answer, or of an anchor all that
    the last run before said of it.
    """
    known = [] if task.known is None else [task.known]
    answers = known or (task.earlier or [{"answers": []}])[-1]["answers"]
    return [{**answer, "kind": protocol} for answer in answers]


def by_people(task: Task, protocol: str) -> list[Event]:
    """`told_of` without what a judge or a reward said, but where somebody has reviewed it."""
    said = told_of(task, protocol)
    return [each for each in said if each.get("source") not in MACHINES or each.get("reviewed")]


def rates_of(answers: Said) -> Figures:
    """How often which policy is above which other one, a tie one half; or how often it is good."""
    of_name: dict[str, dict[str, list[float]]] = {}

    def note(name: str, task: Task, value: float) -> None:
        of_name.setdefault(name, {}).setdefault(key_of(task.prompt), []).append(value)

    for task, event in answers:
        writers = [writers_of(origin) for origin in task.origins]
        if event["kind"] in SINGLE:
            for name in writers[0]:
                note(name, task, float(is_good(event)))
            continue
        for (i, j), won in said_of(event):
            for ours, theirs in product(writers[i], writers[j]):
                if ours != theirs:
                    first, second = sorted((ours, theirs))
                    note(f"{first} over {second}", task, won if ours == first else 1 - won)
    rates = {name: mean_of(each, "share", "outcomes") for name, each in sorted(of_name.items())}
    return {"rates": rates}


def judged(desk: Desk) -> Iterable[tuple[Turn, Event]]:
    """What somebody has answered and not left out."""
    return (each for each in desk.own if each[1]["kind"] not in (SKIP, FLAG))


def scores_of(answers: Said) -> Figures:
    """Of instructgpt, by policy: the mean rating, and how often each mark is there."""
    of_policy: dict[str, list[tuple[str, int, list[str]]]] = {}
    for task, event in answers:
        for origin, score, marks in zip(
            task.origins, event["ratings"], event["marks"], strict=True
        ):
            for name in writers_of(origin):
                of_policy.setdefault(name, []).append((key_of(task.prompt), score, marks))
    return {name: _scores(said) for name, said in sorted(of_policy.items())}


def _scores(said: Sequence[tuple[str, int, list[str]]]) -> Figures:
    of_prompt: dict[str, list[float]] = {}
    for prompt, score, _ in said:
        of_prompt.setdefault(prompt, []).append(score)
    shares = {
        name: sum(name in marks for _, _, marks in said) / len(said) for name, _ in MARKS.values()
    }
    return {**mean_of(of_prompt, "score", "ratings"), "marks": shares}


def contradictions_of(answers: Said) -> Figures | None:
    """How often the better ranked of two responses is the worse rated one; None without a pair.

    Equal ratings contradict nothing.
    """
    of_prompt: dict[str, list[float]] = {}
    for task, event in answers:
        ratings = event["ratings"]
        for (i, j), won in said_of(event):
            if won != 0.5:
                against = ratings[i] < ratings[j] if won else ratings[j] < ratings[i]
                of_prompt.setdefault(key_of(task.prompt), []).append(float(against))
    return mean_of(of_prompt, "share", "pairs") if of_prompt else None


def lines_of(report: Figures) -> list[str]:
    """Of each annotator how often they are right where it is known, and anchors now beside then."""
    lines = []
    for who, each in report["annotators"].items():
        if (known := each.get("known")) is not None:
            right = with_error(known["right"], known.get("stderr"))
            lines.append(f"{who} is right on {right} of {known['outcomes']} known outcomes")
    if (anchors := report["anchors"]) is None:
        return lines
    if (same := anchors["same"]) is not None:
        share = with_error(same["agreement"], same.get("stderr"))
        lines.append(f"anchors: {share} of {same['outcomes']} outcomes are as they were before")
    for name in anchors["runs"][-1]["rates"]:
        rates = ((run["out"], run["rates"].get(name)) for run in anchors["runs"])
        told = (
            f"{with_error(rate['share'], rate.get('stderr'))} {out}" for out, rate in rates if rate
        )
        lines.append(f"anchors: {name}: {', '.join(told)}")
    return lines
