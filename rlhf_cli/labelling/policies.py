"""How the policies behind the responses fare: their ratings, whom each beats, and by how much of
that by length; of responses that are judged by themselves, how often they are good.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, product
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_cli.evaluation.contest import corrected, head_to_head
from rlhf_cli.labelling.agreement import share_of
from rlhf_cli.labelling.desk import Event
from rlhf_cli.labelling.outcomes import Figures, Places, is_good, said_of
from rlhf_cli.labelling.tasks import Task, key_of, writers_of
from rlhf_cli.objectives.comparisons import ratings

Answers = Sequence[tuple[Task, Event]]


class Meeting(NamedTuple):
    """Responses of two policies that were compared.

    won: by ours, 1 or 0, or one half at a tie.
    longer: by how many characters the response of ours is the longer one.
    prompt: as `key_of` has it.
    """

    ours: str
    theirs: str
    won: float
    longer: int
    prompt: str


def meetings_of(task: Task, said: Iterable[tuple[Places, float]]) -> Iterator[Meeting]:
    """Who met whom in a task, by what is said of its pairs.

    What is said of a text is said of all who wrote it. Two who wrote the same tie by it: as it is
    in evaluate, responses that are alike are no reason to put one policy above the other.
    """
    prompt, writers = key_of(task.prompt), [writers_of(origin) for origin in task.origins]
    met = [(*pair, 0.5, 0) for each in writers for pair in combinations(each, 2)]
    for (i, j), won in said:
        longer = len(task.responses[i]) - len(task.responses[j])
        met += [(*pair, won, longer) for pair in product(writers[i], writers[j])]
    for ours, theirs, won, longer in met:
        if ours != theirs:
            yield Meeting(ours, theirs, won, longer, prompt)


def win_rates(meetings: Iterable[Meeting]) -> dict[str, dict[str, Figures]]:
    """Wins, ties and losses of each policy over each that comes after it by name, raw and at equal
    length; p_holm corrects for their number.
    """
    of_two: dict[tuple[str, str], list[Meeting]] = {}
    for each in meetings:
        if each.ours > each.theirs:
            each = Meeting(each.theirs, each.ours, 1 - each.won, -each.longer, each.prompt)
        of_two.setdefault((each.ours, each.theirs), []).append(each)
    found = corrected({two: _wins(met) for two, met in sorted(of_two.items())})
    told: dict[str, dict[str, Figures]] = {}
    for (ours, theirs), wins in found.items():
        told.setdefault(ours, {})[theirs] = wins
    return told


def _wins(met: Sequence[Meeting]) -> Figures:
    points = torch.tensor([each.won for each in met], dtype=torch.double)
    longer = torch.tensor([each.longer for each in met])
    return head_to_head(points, longer, [each.prompt for each in met])


def rated(answers: Answers, seed: int) -> Figures | None:
    """Ratings of the policies behind the responses by the Bradley-Terry maximum; None where there
    is but one.

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
    """(P, P) what each policy took from each other one in a task: a win is 1, a tie one half."""
    points = torch.zeros(len(names), len(names), dtype=torch.double)
    for each in meetings_of(task, said_of(event)):
        ours, theirs = names.index(each.ours), names.index(each.theirs)
        points[ours, theirs] += each.won
        points[theirs, ours] += 1 - each.won
    return points


def liked(answers: Answers) -> Figures:
    """The share of responses that are good by themselves, by policy, with 95% intervals over
    prompts.
    """
    up: dict[str, list[tuple[bool, str]]] = {}
    for task, event in answers:
        for name in writers_of(task.origins[0]):
            up.setdefault(name, []).append((is_good(event), key_of(task.prompt)))
    found = {name: share_of(each) for name, each in sorted(up.items())}
    return {
        name: {"up": each.mean, "low": each.low, "high": each.high, "labels": len(up[name])}
        for name, each in found.items()
    }
