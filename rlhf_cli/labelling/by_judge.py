"""Labels by a language model: each pair of a task in both orders, and what that shows of it.

RLAIF (2309.00267) trains a reward model on the probabilities of such a judge; they are kept as `p`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from statistics import mean
from typing import Any

from rlhf_cli.evaluation.beside import CONSISTENT
from rlhf_cli.evaluation.judge_asks import KeptJudge, Unasked, identity_of, paid_file
from rlhf_cli.evaluation.judge_questions import Ask, Questions, asked_text
from rlhf_cli.evaluation.judgements import Spending, name_of
from rlhf_cli.evaluation.pair_judge import (
    Pair,
    Text,
    agreement,
    biases,
    cost_of,
    judged_pairs,
    verdict,
)
from rlhf_cli.labelling.agreement import agreement_of, calibration_of
from rlhf_cli.labelling.answers import Answer
from rlhf_cli.labelling.desk import Desk
from rlhf_cli.labelling.outcomes import Figures, Outcomes, Places, asked_of, outcomes_of
from rlhf_cli.labelling.policies import Meeting, meetings_of, win_rates
from rlhf_cli.labelling.quality import by_people
from rlhf_cli.labelling.report import at_random
from rlhf_cli.labelling.rows import counted
from rlhf_cli.labelling.tasks import PAIR, Task, Turn, key_of
from rlhf_cli.objectives.estimates import numbered
from rlhf_cli.reporting.console import say

AT_ONCE = 64  # tasks that are asked, and then answered on disk


def label_by_judge(desk: Desk, judge: KeptJudge, tie: float, accept_partial: bool) -> None:
    """Answer all turns that are left; one whose judge failed in any pair stays unanswered.

    Args:
        tie: log-odds that neighbours of a ranking must be apart.
        accept_partial: whether what cannot be asked any more is left so, and no error.

    Raises:
        Unasked: it is one.
    """
    done = {(turn.task.id, turn.showing) for turn, _ in desk.answered}
    left = [turn for turn in desk.turns if (turn.task.id, turn.showing) not in done]
    try:
        for first in range(0, len(left), AT_ONCE):
            _label(desk, judge, tie, left[first : first + AT_ONCE])
    except Unasked as fault:
        if not accept_partial:
            raise
        say(str(fault))
    if desk.left:
        say(f"judge: {desk.left} tasks have no verdict and no label; the same command asks again")


def _label(desk: Desk, judge: KeptJudge, tie: float, turns: Sequence[Turn]) -> None:
    """Ask of some tasks together, and answer them."""
    of_task: dict[int, list[Pair]] = {}
    for pair in compared(judge, [turn.task for turn in turns]):
        of_task.setdefault(pair.place, []).append(pair)
    for place, turn in enumerate(turns):
        pairs = of_task[place]
        odds = [pair.log_odds for pair in pairs]
        known = [each for each in odds if each is not None]
        if len(known) < len(odds):
            continue
        ranks = ranks_of(known, len(turn.task.responses), tie)
        answer: Answer = {"kind": desk.terms.protocol, "ranks": ranks}
        if desk.terms.protocol == PAIR:
            answer |= {"strength": int(ranks != [1, 1]), "both_bad": False}
        answer["p"] = [1 / (1 + math.exp(-each)) for each in known]
        answer["log_odds"] = [[pair.as_first, pair.as_second] for pair in pairs]
        if judge.questions.principles:
            prompt = asked_text(turn.task.prompt)
            asks = [Ask(prompt, pair.ours.text, pair.theirs.text) for pair in pairs]
            answer["principles"] = [judge.questions.principle(ask) for ask in asks]
        desk.answer(turn, answer)


def compared(judge: KeptJudge, tasks: Sequence[Task]) -> list[Pair]:
    """Every pair of responses of each task, in the order of `combinations`, as the judge has it."""
    sides = [list(combinations(map(text_of, task.responses), 2)) for task in tasks]
    ours, theirs = ([[pair[side] for pair in of] for of in sides] for side in (0, 1))
    return judged_pairs(judge, [asked_text(task.prompt) for task in tasks], ours, theirs)


def text_of(response: str) -> Text:
    """A response, as long as it has characters: of samples=FILE no tokens are known."""
    return Text(response, len(response))


def ranks_of(log_odds: Sequence[float], count: int, tie: float) -> list[int]:
    """The ranking that the log-odds of all its pairs fit best; neighbours within `tie` tie.

    Under Bradley-Terry log-odds are differences of scores, l_ij = r_i - r_j. Of all r those with
    the least sum of (l_ij - r_i + r_j)^2 over all pairs are r_i = 1/K sum_j l_ij: a circle of
    preferences cancels out. Of two responses r_1 - r_2 is their log-odds.

    Args:
        log_odds: of i < j that i is better, in the order of `combinations`.
    """
    scores = [0.0] * count
    for (i, j), odds in zip(combinations(range(count), 2), log_odds, strict=True):
        scores[i] += odds / count
        scores[j] -= odds / count
    order = sorted(range(count), key=lambda i: -scores[i])
    ranks = [1] * count
    for above, below in zip(order, order[1:], strict=False):
        ranks[below] = ranks[above] + (scores[above] - scores[below] > tie)
    return ranks


# --------------------------------------------------------------------------- is it any good?


def of_labels(cfg: Any, desk: Desk) -> Figures:
    """Of the judge whose labels these are, in all starts of the run: what it goes by on the tasks
    that were drawn, and what all of them cost, whatever a review put in the place of its answers.
    Tasks planted among its own whose answer is known, or which people have judged before, tell how
    far it can be believed.
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
    """What a judge says of the tasks that others have labelled, of those that were drawn: its own
    figures, and how far it agrees with them, whatever a review put in the place of their answers; a
    pair of which it says nothing counts for neither.
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
