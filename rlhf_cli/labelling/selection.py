"""Which tasks are labelled, of all that the responses to prompts make: drawn, or chosen by a rule.

    gap       responses that are far apart, or may be where scorers differ   (2603.09692)
    fisher    what tells most of the head of a reward model: D-optimal       (2502.04354)
    disagree  scorers differ on which is better                              (1706.03741)

A share algo.explore of the tasks is drawn before any rule is asked, prompts first, so that what is
measured on them holds for all. No prompt has more tasks than it takes to come to algo.tasks.
"""

import heapq
import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_cli.config.schema.algorithms import LabelAlgo
from rlhf_cli.config.selection_rules import REWARD
from rlhf_cli.labelling.draws import Pick, Pool, at_random, selected, tasks_in
from rlhf_cli.labelling.tasks import RANDOM, Sample, Task
from rlhf_cli.objectives.acquisition import (
    comparison_weights,
    information_gain,
    information_known,
    mean_over_pairs,
    optimistic_gaps,
    preference_variance,
)

SAME = 9
"""Decimals to which values are told apart: what differs by rounding alone is equal."""


def chosen(pool: Pool, algo: LabelAlgo, judges: Sequence[str], seed: int) -> list[Task]:
    """The tasks that are labelled, in the order of their prompts.

    Args:
        judges: whose scores a rule goes by, as origins name them.
    """
    drawn = pool.tasks if algo.select == RANDOM else round(algo.explore * pool.tasks)
    picks = at_random(pool, drawn, seed)
    if drawn < pool.tasks:
        by_head = algo.select == "fisher"
        picks += by_design(pool, picks) if by_head else by_scores(pool, picks, algo, judges)
    return tasks_in(pool, picks)


def room_in(pool: Pool, picks: Sequence[Pick]) -> list[int]:
    """How many tasks each prompt may have still."""
    had = Counter(pick.prompt for pick in picks)
    return [pool.most - had[prompt] for prompt in range(len(pool.prompts))]


def by_scores(
    pool: Pool, drawn: Sequence[Pick], algo: LabelAlgo, judges: Sequence[str]
) -> list[Pick]:
    """The tasks of the highest values by the scores of judges; the earlier one of equals."""
    known = {(pick.prompt, pick.place) for pick in drawn}
    valued = []
    for prompt, scores in enumerate(standardised(pool, judges)):
        gap = algo.select == "gap"
        pairs = optimistic_gaps(scores, algo.optimism) if gap else preference_variance(scores)
        values = mean_over_pairs(pairs, torch.tensor(pool.candidates[prompt]))
        values = values.round(decimals=SAME)
        valued += [(-value, prompt, place) for place, value in enumerate(values.tolist())]
    room, picks = room_in(pool, drawn), list[Pick]()
    for value, prompt, place in sorted(each for each in valued if not math.isnan(each[0])):
        if len(drawn) + len(picks) == pool.tasks:
            break
        if room[prompt] and (prompt, place) not in known:
            room[prompt] -= 1
            picks.append(Pick(prompt, place, selected(algo.select, -value, 1.0)))
    return picks


def standardised(pool: Pool, judges: Sequence[str]) -> list[Tensor]:
    """(E, n) of each prompt the scores of its responses, each judge's in units of its own standard
    deviation over the pool: scores of two reward models are not comparable. NaN where unknown.
    """
    samples = [sample for said in pool.prompts for sample in said]
    every = [[score_of(sample, judge) for sample in samples] for judge in judges]
    scores = torch.tensor(every, dtype=torch.double)
    centred = scores - scores.nanmean(-1, keepdim=True)
    spread = centred.square().nanmean(-1, keepdim=True).sqrt()
    same = torch.where(spread > 0, centred / spread, centred)
    return list(same.split([len(said) for said in pool.prompts], -1))


def score_of(sample: Sample, judge: str) -> float:
    """What a judge says of a response; NaN where it is not known."""
    origin = sample.origin
    value = origin.get("reward") if judge == REWARD else origin.get("scores", {}).get(judge)
    return math.nan if value is None else float(value)


def by_design(pool: Pool, drawn: Sequence[Pick]) -> list[Pick]:
    """The tasks that add most to what is known of a reward model's head, one after the other.

    What was drawn is known before. Gains only fall as more is known, so that an earlier one bounds
    a later one, and few are computed anew (lazy greedy).
    """
    design, room, picks = Design(pool), room_in(pool, drawn), list[Pick]()
    heap = [best for prompt in range(len(room)) if (best := design.best(prompt)) is not None]
    heapq.heapify(heap)
    for pick in drawn:
        design.add(pick.prompt, pick.place)
    while heap and len(drawn) + len(picks) < pool.tasks:
        _, prompt, _ = heapq.heappop(heap)
        best = design.best(prompt) if room[prompt] else None
        if best is None:
            continue
        heapq.heappush(heap, best)
        if best == heap[0]:
            design.add(*best[1:])
            room[prompt] -= 1
            picks.append(Pick(*best[1:], selected("fisher", -best[0], 1.0)))
    return picks


class Design:
    """The information on the head of a reward model, task by task: a D-optimal design maximises its
    determinant. That of an average task, spread evenly, is there before any.
    """

    def __init__(self, pool: Pool) -> None:
        self._sets = [torch.tensor(each) for each in pool.candidates]
        raw = [torch.tensor([sample.raw for sample in said]) for said in pool.prompts]
        every = zip(raw, self._sets, strict=True)
        self._weights = [comparison_weights(scores[sets]) for scores, sets in every]  # (C, K, K)
        states = [
            torch.stack([sample.state for sample in said if sample.state is not None])
            for said in pool.prompts
        ]
        self._states = pad_sequence(states, batch_first=True).double()  # (P, N, d)
        width = self._states.shape[-1]
        self._gram = self._states @ self._states.mT  # (P, N, N) Phi M^-1 Phi^T
        traces = [
            (weights * self._gram_of(prompt)).sum((-1, -2))
            for prompt, weights in enumerate(self._weights)
        ]
        ridge = (torch.cat(traces).nanmean().item() or 1.0) / width
        self._gram /= ridge
        self._covariance = torch.eye(width, dtype=torch.double) / ridge
        self._known = set[tuple[int, int]]()

    def _gram_of(self, prompt: int) -> Tensor:
        """(C, K, K) of each candidate of a prompt; NaN where a state is not known."""
        sets = self._sets[prompt]
        return self._gram[prompt][sets[:, :, None], sets[:, None]]

    def best(self, prompt: int) -> tuple[float, int, int] | None:
        """Of the task of a prompt that adds most to log det of the information, of those that are
        not known, minus what it adds, in nats, the prompt and its place; None where none is left.
        """
        gains = information_gain(self._weights[prompt], self._gram_of(prompt)).round(decimals=SAME)
        told = [
            (-gain, prompt, place)
            for place, gain in enumerate(gains.tolist())
            if not math.isnan(gain) and (prompt, place) not in self._known
        ]
        return min(told, default=None)

    def add(self, prompt: int, place: int) -> None:
        """Count a task among those that are known; one whose states are not known tells nothing."""
        self._known.add((prompt, place))
        places, weights = self._sets[prompt][place], self._weights[prompt][place]
        if weights.isnan().any():
            return
        gram = self._gram[prompt][places[:, None], places]
        known = information_known(weights, gram)
        seen = self._states[prompt][places] @ self._covariance  # (K, d)
        reached = self._states @ seen.mT  # (P, N, K)
        self._covariance -= seen.mT @ known @ seen
        self._gram -= reached @ known @ reached.mT
