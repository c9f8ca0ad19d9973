"""What tokenised rows are like: how long, how often the same, how near to each other."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rlhf_cli.data.dataset import Dataset
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.store import parts_of


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
    """Both sides."""

    train: Side
    held_out: Side


def surveyed(data: Dataset) -> Survey:
    """Look at every item of a dataset."""
    return Survey(side_of(data.train), side_of(data.held_out))


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
