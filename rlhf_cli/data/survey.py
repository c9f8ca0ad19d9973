"""What tokenised rows are like: how long, how often the same, how near to each other."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from rlhf_cli.data.dataset import Dataset
from rlhf_cli.data.tokens import Answers, Tokens

SHINGLE = 3  # tokens in a row that two prompts may share
NEAR = 0.6  # Jaccard similarity of their shingles (Broder 1997) from which they are near
USUAL = 0.2  # share of held-out prompts that have a shingle, from which it says nothing
COMPARED = 50_000  # training prompts that are compared with held-out ones


@dataclass
class Side:
    """The items of one side of the split.

    prompts, responses: tokens of each.
    learnt: tokens that carry loss.
    repeated: items that are the same as one before, prompt and responses.
    sources: items by their source, where there are several.
    """

    items: int = 0
    prompts: list[int] = field(default_factory=list)
    responses: list[int] = field(default_factory=list)
    learnt: int = 0
    repeated: int = 0
    sources: Counter[str] = field(default_factory=Counter)


@dataclass
class Survey:
    """Both sides, and held-out prompts that training prompts are near to."""

    train: Side
    held_out: Side
    near: int


def surveyed(data: Dataset) -> Survey:
    """Look at every item of a dataset."""
    return Survey(side_of(data.train), side_of(data.held_out), near_prompts(data))


def side_of(items: Any) -> Side:
    """Look at the items of one side."""
    side, known = Side(len(items)), set()
    for place, item in enumerate(items):
        prompt, responses = parts_of(item)
        side.prompts.append(len(prompt))
        side.responses += map(len, responses)
        loss = item.loss if isinstance(item, Tokens) else None
        side.learnt += sum(map(len, responses)) if loss is None else sum(loss)
        known.add(hash((tuple(prompt), *map(tuple, responses))))
        if len(items.sources) > 1:
            side.sources[items.sources[int(items.parts[place])].name] += 1
    side.repeated = len(items) - len(known)
    return side


def parts_of(item: Any) -> tuple[list[int], list[list[int]]]:
    """The prompt and the responses of an item of any kind; a prompt alone has none."""
    if isinstance(item, Tokens | Answers):
        return item.prompt, item.responses
    return item[1], []


# --------------------------------------------------------------------------- near duplicates


def near_prompts(data: Dataset) -> int:
    """How many held-out prompts have a training prompt nearly like them, among the first ones."""
    held_out = [parts_of(item)[0] for item in data.held_out]
    return len(near_of((parts_of(item)[0] for item in data.train), held_out))


def near_of(train: Iterable[Sequence[int]], held_out: Sequence[Sequence[int]]) -> set[int]:
    """The places of held-out prompts that share at least NEAR of their shingles with another.

    Shingles that many held-out prompts have, as those of a template, count for nothing.
    """
    ours = [shingles_of(prompt) for prompt in held_out]
    common = Counter(shingle for each in ours for shingle in each)
    most = max(1, int(USUAL * len(ours)))
    usual = {shingle for shingle, count in common.items() if count > most}
    places: dict[int, list[int]] = {}
    for place, each in enumerate(ours):
        each -= usual
        for shingle in each:
            places.setdefault(shingle, []).append(place)
    near: set[int] = set()
    for prompt in islice(train, COMPARED):
        theirs = shingles_of(prompt) - usual
        shared = Counter(place for shingle in theirs for place in places.get(shingle, ()))
        for place, count in shared.items():
            if count >= NEAR * (len(theirs) + len(ours[place]) - count):
                near.add(place)
    return near


def shingles_of(prompt: Sequence[int]) -> set[int]:
    """The hashes of all runs of SHINGLE tokens; of a shorter prompt the whole."""
    last = max(1, len(prompt) - SHINGLE + 1)
    return {hash(tuple(prompt[i : i + SHINGLE])) for i in range(last)}
