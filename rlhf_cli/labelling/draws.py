"""All tasks that the responses to prompts make, and which of them are drawn, with what chance."""

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, count

from rlhf_cli.config.schema.algorithms import LabelAlgo
from rlhf_cli.data.order import derived_seed, order_of
from rlhf_cli.labelling.tasks import (
    FEWEST,
    PAIR,
    RANDOM,
    SINGLE,
    Sample,
    Select,
    Task,
    distinct,
    task_of,
)

MOST = 200
"""Sets of responses to one prompt that a rule looks at; of more so many are drawn."""

Responses = tuple[int, ...]
"""What a task would show, by places among the responses to its prompt."""


@dataclass(frozen=True)
class Pick:
    """A task that is to be labelled: the prompt, which of its candidates, and why."""

    prompt: int
    place: int
    select: Select


@dataclass
class Pool:
    """All tasks that could be labelled.

    prompts: of each prompt the responses that differ.
    candidates: of each prompt what tasks would show, in an order that is drawn.
    size: responses in a task, where there are as many.
    most: tasks of one prompt.
    tasks: in all.
    """

    prompts: list[list[Sample]]
    candidates: list[list[Responses]]
    size: int
    most: int
    tasks: int


def pool_of(samples: Iterable[Sample], algo: LabelAlgo, seed: int) -> tuple[Pool, dict[str, int]]:
    """What can be labelled, and how many samples and prompts make no task."""
    keyed, dropped = distinct(samples)
    enough = {key: said for key, said in keyed.items() if len(said) >= FEWEST[algo.protocol]}
    dropped["prompts"] = len(keyed) - len(enough)
    size = {PAIR: 2, **dict.fromkeys(SINGLE, 1)}.get(algo.protocol, algo.responses)
    whole = [min(sets_of(len(said), size), max(MOST, len(said))) for said in enough.values()]
    asked = algo.tasks or (sum(whole) if algo.protocol in SINGLE else len(enough))
    wanted = min(asked, sum(whole))
    most = next(each for each in count() if sum(min(each, own) for own in whole) >= wanted)
    looked_at = most if algo.select == RANDOM else max(MOST, most)
    candidates = [
        candidates_of(said, size, min(own, looked_at), derived_seed(seed, "tasks", key))
        for (key, said), own in zip(enough.items(), whole, strict=True)
    ]
    return Pool(list(enough.values()), candidates, size, most, wanted), dropped


def tasks_in(pool: Pool, picks: Iterable[Pick]) -> list[Task]:
    """The tasks that are picked, in the order of their prompts."""
    tasks = []
    for pick in sorted(picks, key=lambda pick: (pick.prompt, pick.place)):
        said = pool.prompts[pick.prompt]
        shown = [said[i] for i in pool.candidates[pick.prompt][pick.place]]
        tasks.append(task_of(shown, pick.select))
    return tasks


# --------------------------------------------------------------------------- candidates


def sets_of(responses: int, size: int) -> int:
    """How many different tasks there are of so many responses."""
    return math.comb(responses, min(size, responses))


def candidates_of(said: Sequence[Sample], size: int, most: int, seed: int) -> list[Responses]:
    """What tasks of a prompt would show, in an order that is drawn, up to so many.

    In the first one policies take turns; the others are alike likely at each place.
    """
    draw = random.Random(seed)
    first = tuple(in_turn(policies_of(said), draw)[:size])
    found = {frozenset(first): first}
    if sets_of(len(said), size) <= MOST:
        others = list(combinations(range(len(said)), len(first)))
        draw.shuffle(others)
        for each in others:
            found.setdefault(frozenset(each), each)
    while len(found) < most:
        each = tuple(draw.sample(range(len(said)), len(first)))
        found.setdefault(frozenset(each), each)
    return list(found.values())[:most]


def policies_of(said: Sequence[Sample]) -> list[str]:
    """Who wrote each response, the first of several."""
    return [str(sample.origin.get("policy")) for sample in said]


def in_turn(policies: Sequence[str], draw: random.Random) -> list[int]:
    """Places in an order that is drawn, in which policies take turns as long as they have any."""
    of_policy: dict[str, list[int]] = {}
    for place, policy in enumerate(policies):
        of_policy.setdefault(policy, []).append(place)
    queues = list(of_policy.values())
    draw.shuffle(queues)
    for queue in queues:
        draw.shuffle(queue)
    longest = max(map(len, queues), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]


# --------------------------------------------------------------------------- at random


def at_random(pool: Pool, number: int, seed: int) -> list[Pick]:
    """So many tasks: one of each prompt before any has two, prompts in an order that is drawn."""
    order = order_of(len(pool.prompts), seed, "prompts", 0)
    taken: list[tuple[int, int]] = []
    shares: list[float] = []  # of each round, of the prompts that had a task left
    for turn in range(pool.most):
        left = [prompt for prompt in order if turn < len(pool.candidates[prompt])]
        now = left[: number - len(taken)]
        taken += [(prompt, turn) for prompt in now]
        shares.append(len(now) / len(left))
    return [
        Pick(prompt, place, selected(RANDOM, None, chance_of(pool, prompt, place, shares)))
        for prompt, place in taken
    ]


def selected(rule: str, score: float | None, probability: float) -> Select:
    """How a task came to be labelled, as tasks.jsonl has it."""
    return {"rule": rule, "score": score, "probability": probability}


def chance_of(pool: Pool, prompt: int, place: int, shares: Sequence[float]) -> float:
    """The chance with which a task was to be drawn.

    With chance a it is the first one of its prompt, else it is alike likely at each place after.

    Args:
        shares: of each round, the chance that a prompt was in it.
    """
    said, shown = pool.prompts[prompt], pool.candidates[prompt][place]
    whole = sets_of(len(said), pool.size)
    first = chance_to_be_first(policies_of(said), shown)
    later = (1 - first) / max(whole - 1, 1)
    return shares[0] * first + later * sum(shares[1:whole])


def chance_to_be_first(policies: Sequence[str], shown: Responses) -> float:
    """The chance that policies that take turns show these responses.

    In whole rounds each gives one as long as it has any; the last round is of some of those that
    have one left, any of them alike. Which of its own a policy gives is drawn alike, too.
    """
    whole = Counter(policies)
    ours = Counter(policies[place] for place in shown)
    given = [sum(min(own, each) for own in whole.values()) for each in range(len(shown) + 1)]
    rounds = max(each for each, so_far in enumerate(given) if so_far <= len(shown))
    more = [ours[each] - min(own, rounds) for each, own in whole.items()]
    if not all(0 <= each <= 1 for each in more):
        return 0.0
    left = sum(own > rounds for own in whole.values())
    ways = math.prod(math.comb(own, ours[each]) for each, own in whole.items())
    return 1 / (math.comb(left, sum(more)) * ways)
