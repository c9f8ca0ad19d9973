"""The terms of the objective of one optimizer step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from rlhf_cli.data.batches import one
from rlhf_cli.models.out_of_memory import halves

Metrics = dict[str, float]
Loss = tuple[Tensor, dict[str, Tensor]]


@dataclass
class LossTerm:
    """One term of the objective.

    batches: micro-batches of items, of any cut.
    loss: micro-batch -> its loss and metrics, each SUMMED over items.
    count: what the sums are divided by, over all micro-batches (tokens, pairs, responses).
    weight: factor of this term in the objective.
    rows: sequences that an item takes.
    keys_that_help: longest sequence -> the keys that make an item take less memory, for messages.
    """

    batches: Sequence[Any]
    loss: Callable[[Any], Loss]
    count: float
    weight: float = 1.0
    rows: Callable[[Any], int] = one
    keys_that_help: Callable[[int], Sequence[str]] = lambda longest: ()

    def halved(self) -> "LossTerm":
        """The same in micro-batches of half the size, where they have several items."""
        return replace(self, batches=[half for batch in self.batches for half in halves(batch)])
