"""Labels by a language model, which is asked each pair of a task in both orders.

RLAIF (2309.00267) trains a reward model on the probabilities of such a judge; they are kept as `p`.
"""

import math
from collections.abc import Sequence
from itertools import combinations

from rlhf_cli.evaluation.judge_asks import KeptJudge, Unasked
from rlhf_cli.evaluation.judge_questions import Ask, asked_text
from rlhf_cli.evaluation.pair_judge import Pair, Text, judged_pairs
from rlhf_cli.labelling.answers import Answer
from rlhf_cli.labelling.desk import Desk
from rlhf_cli.labelling.tasks import PAIR, Task, Turn
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
