"""The terms of the objective of one optimizer step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.config.errors import RunError
from rlhf_cli.config.schema.hardware import Hardware
from rlhf_cli.data.batches import micro_batches, one
from rlhf_cli.data.items import responses_in
from rlhf_cli.data.packing import Layout
from rlhf_cli.models.keeping_up import in_shared_groups
from rlhf_cli.models.out_of_memory import halves, keys_that_help, oom_error
from rlhf_cli.ranks.world import world
from rlhf_cli.training.figures import Figures

Metrics = dict[str, float]
Loss = tuple[Tensor, dict[str, Tensor]]
"""The loss of a micro-batch and its metrics, each SUMMED over items."""


@dataclass
class LossTerm:
    """One term of the objective.

    batches: micro-batches of items, of any cut.
    loss: micro-batch -> its loss and metrics.
    count: what the sums are divided by, over all micro-batches (tokens, pairs, responses).
    weight: factor of this term in the objective.
    rows: sequences that an item takes.
    keys_that_help: longest sequence, and whether there is a backward pass -> the keys that make an
        item take less memory, for messages.
    """

    batches: Sequence[Any]
    loss: Callable[[Any], Loss]
    count: float
    weight: float = 1.0
    rows: Callable[[Any], int] = one
    keys_that_help: Callable[..., Sequence[str]] = lambda longest, gradient: ()

    @classmethod
    def of(
        cls,
        items: Sequence[Any],
        loss: Callable[[Any], Loss],
        count: float,
        hardware: Hardware,
        layout: Layout,
        *,
        weight: float = 1.0,
        logits: bool = True,
    ) -> "LossTerm":
        """Responses to prompts, cut into micro-batches as `hardware` allows.

        Args:
            layout: in which the loss reads them.
            logits: whether it holds some.
        """
        ranks = world().size
        batches = micro_batches(items, hardware.tokens_at_once, layout, ranks=ranks)
        helps = partial(keys_that_help, hardware, logits=logits)
        return cls(batches, loss, count, weight, responses_in, helps)

    @torch.no_grad()
    def evaluated(self) -> Metrics:
        """`loss` and the metrics as means, without gradient.

        Raises:
            RunError: memory is too small for one item.
        """
        failure = partial(self.too_large, phase="the evaluation", gradient=False)
        figures = Figures()
        _, own = in_shared_groups(self.batches, self.loss, failure)
        for turn, (_, (total, metrics)) in enumerate(own):
            figures.place = world().place(turn)
            for name, value in {"loss": total, **metrics}.items():
                figures.add(name, value)
        return {name: total / self.count for name, total in figures.read().items()}

    def too_large(self, batch: Sequence[Any], phase: str, gradient: bool) -> RunError:
        """What to say where a batch of one item does not fit.

        Args:
            gradient: whether there is a backward pass.
        """
        item, longest = batch[0], len(batch[0])
        helps = self.keys_that_help(longest, gradient=gradient)
        return oom_error(phase, self.rows(item), longest, helps)

    def halved(self) -> "LossTerm":
        """The same in micro-batches of half the size, where they have several items."""
        return replace(self, batches=[half for batch in self.batches for half in halves(batch)])
