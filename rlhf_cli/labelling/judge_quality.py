"""How good a language model is that labels, or that stands beside people who do.

What it goes by beside the texts, how far it agrees with people, and how far it can be believed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from statistics import mean
from typing import Any

from rlhf_cli.evaluation.beside import CONSISTENT
from rlhf_cli.evaluation.judge_asks import KeptJudge, identity_of, paid_file
from rlhf_cli.evaluation.judge_questions import Ask, Questions, asked_text
from rlhf_cli.evaluation.judgements import Spending, name_of
from rlhf_cli.evaluation.pair_judge import Pair, agreement, biases, cost_of, verdict
from rlhf_cli.labelling.agreement import agreement_of, calibration_of
from rlhf_cli.labelling.by_judge import compared, text_of
from rlhf_cli.labelling.desk import Desk
from rlhf_cli.labelling.outcomes import Figures, Outcomes, Places, asked_of, outcomes_of
from rlhf_cli.labelling.policies import Meeting, meetings_of, win_rates
from rlhf_cli.labelling.quality import by_people
from rlhf_cli.labelling.report import at_random
from rlhf_cli.labelling.rows import counted
from rlhf_cli.labelling.tasks import Task, key_of
from rlhf_cli.objectives.estimates import numbered


def as_annotator(cfg: Any, desk: Desk) -> Figures:
    """Figures of the judge whose labels these are: what it goes by on the tasks that were drawn,
    what its calls cost in all starts of the run, and how far it can be believed.

    They are of its own answers, whatever a review put in their place. Belief goes by the tasks
    planted among them whose answer is known, or which people have judged before.
    """
    questions, spending = Questions.of(cfg), Spending(paid_file(cfg))
    protocol = desk.terms.protocol
    drawn = {task.id for task, _ in at_random(counted(desk.own, protocol))}
    pairs: list[Pair] = []
    people: list[Outcomes] = []
    log_odds: Outcomes = {}
    tasks = [turn.task for turn, _ in desk.own]
    for place, (turn, event) in enumerate(desk.own):
        task, prompt = turn.task, asked_text(turn.task.prompt)
        places = places_of(task)
        people += [outcomes_of([(task, answer)]) for answer in by_people(task, protocol)]
        log_odds |= asked_of(task, zip(places, map(mean, event["log_odds"]), strict=True))
        for (i, j), odds in zip(places, event["log_odds"], strict=True):
            ours, theirs = text_of(task.responses[i]), text_of(task.responses[j])
            if task.id in drawn:
                pairs.append(Pair(place, 0, ours, theirs, *odds))
            orders = Ask(prompt, ours.text, theirs.text), Ask(prompt, theirs.text, ours.text)
            spending.count_cached(name_of(questions.written(ask)) for ask in orders)
    found = of_pairs(cfg, spending.counts, by_prompt(pairs, tasks), desk.left)
    return found | {"calibration": calibration_of(people, log_odds)}


def of_pairs(cfg: Any, counts: Mapping[str, int], pairs: Sequence[Pair], failed: int) -> Figures:
    """Who judges, what it goes by beside the responses, what failed, and what it cost."""
    goes_by, cost = biases(pairs, cfg.judge_tie), cost_of(counts, cfg.judge_prices)
    return {**identity_of(cfg), **goes_by, "failed": failed, **cost}


def by_prompt(pairs: Sequence[Pair], tasks: Sequence[Task]) -> list[Pair]:
    """Pairs whose place is that of a task, each with that of its prompt."""
    prompts = numbered([key_of(task.prompt) for task in tasks]).tolist()
    return [replace(pair, place=prompts[pair.place]) for pair in pairs]


def beside_people(
    cfg: Any, judge: KeptJudge, desks: Sequence[Desk]
) -> tuple[Figures, Figures | None]:
    """Figures of a judge that is asked of the tasks which others have labelled, of those that were
    drawn, and how far it agrees with them.

    A pair of which it says nothing counts for neither. They are of what others answered,
    whatever a review put in the place of that.
    """
    answers = [at_random(counted(desk.own, desk.terms.protocol)) for desk in desks]
    tasks = list({task.id: task for own in answers for task, _ in own}.values())
    pairs = compared(judge, tasks)
    of_task: dict[int, list[tuple[Places, Pair]]] = {}
    for pair in pairs:
        places = places_of(tasks[pair.place])[pair.number]
        of_task.setdefault(pair.place, []).append((places, pair))
    judged: Outcomes = {}
    log_odds: Outcomes = {}
    met: list[Meeting] = []
    for place, compares in of_task.items():
        task = tasks[place]
        odds = [(places, pair.log_odds) for places, pair in compares if pair.log_odds is not None]
        said_so = ((places, verdict(pair, cfg.judge_tie)) for places, pair in compares)
        verdicts = [(places, (each + 1) / 2) for places, each in said_so if each is not None]
        judged |= asked_of(task, verdicts)
        log_odds |= asked_of(task, odds)
        met += meetings_of(task, verdicts)
    said = [outcomes_of(own) for own in answers]
    agrees = agreement_of([(each, judged) for each in said])
    if agrees is not None:
        agrees["preferred"] = agreement(*_signs(said, judged))
    failed = sum(pair.log_odds is None for pair in pairs)
    figures = of_pairs(cfg, judge.counts, by_prompt(pairs, tasks), failed)
    believed = {"calibration": calibration_of(said, log_odds), "win_rates": win_rates(met)}
    return figures | believed, agrees


def places_of(task: Task) -> list[Places]:
    """The pairs of a task, in the order in which a judge is asked."""
    return list(combinations(range(len(task.responses)), 2))


def _signs(
    said: Iterable[Outcomes], judged: Outcomes
) -> tuple[list[float], list[float], list[str]]:
    """Of each pair that both know the verdict, what others say, and its prompt."""
    both = [(each, key) for each in said for key in each if key in judged]
    verdicts = [judged[key] - 0.5 for _, key in both]
    return verdicts, [each[key] - 0.5 for each, key in both], [key.prompt for _, key in both]


def doubts(report: Mapping[str, Any]) -> list[str]:
    """Why the labels of a judge are worth little, a line for each reason."""
    lines = []
    same = report["judge"]["consistency"]
    if same and same["mean"] < CONSISTENT:
        lines.append(
            f"warning: both orders agree in {same['mean']:.2f} of the pairs alone: the judge often "
            "goes by the order, so what it says is little"
        )
    preferred = (report.get("with_judge") or {}).get("preferred") or {}
    if preferred.get("pairs") and preferred["low"] <= 0.5:
        lines.append(
            f"warning: the judge prefers what annotators do in {preferred['mean']:.2f} of "
            f"{preferred['pairs']} pairs ({preferred['low']:.2f} to {preferred['high']:.2f}), as a "
            "coin may"
        )
    return lines
