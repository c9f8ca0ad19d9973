"""What the steps of a run give up once memory has run out: time, and nothing else.

First some blocks are computed again in backward, a quarter, half and then all of them, where
hardware.gradient_checkpointing=auto; then micro-batches are halved, again and again.
"""

from collections.abc import Mapping

from torch import nn

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.models.recompute import recompute_activations
from rlhf_cli.reporting.console import say
from rlhf_cli.training.loss_term import LossTerm

SHARES = (0.0, 0.25, 0.5, 1.0)  # of the blocks


class Room:
    """How a run cuts its steps and how much of them it computes again; it never goes back.

    level: the place in SHARES, of the share of blocks that backward computes again.
    blocks: how many these are.
    halvings: of micro-batches.
    """

    def __init__(self, networks: Mapping[str, nn.Module], recomputes: bool) -> None:
        """`recomputes`: whether blocks may be computed again on demand."""
        self._networks = list(networks.values()) if recomputes else []
        self.level = self.blocks = self.halvings = 0

    def cut(self, parts: list[LossTerm]) -> list[LossTerm]:
        """The terms of a step in micro-batches as small as those before had to become."""
        for _ in range(self.halvings):
            parts = [part.halved() for part in parts]
        return parts

    def more(self, parts: list[LossTerm]) -> list[LossTerm]:
        """The terms of a step that did not fit, as they are to be tried again.

        Raises:
            RunError: memory is too small for one item.
        """
        before = self.blocks
        while self._networks and self.level + 1 < len(SHARES):
            self.recompute(self.level + 1)
            if self.blocks > before:
                say(
                    f"note: out of memory; backward computes {self.blocks} "
                    f"block{'s' * (self.blocks > 1)} again from here on "
                    "(hardware.gradient_checkpointing=auto)"
                )
                return parts
        if all(len(batch) == 1 for part in parts for batch in part.batches):
            raise _least(parts)
        if not self.halvings:
            say("note: out of memory; the step is done again in smaller micro-batches")
        self.halvings += 1
        return [part.halved() for part in parts]

    def recompute(self, level: int) -> None:
        """Go on at a level; networks whose families cannot are left as they are."""
        counts = []
        for network in self._networks:
            try:
                counts.append(recompute_activations(network, SHARES[level]))
            except UserError:
                continue
        self.level, self.blocks = level, sum(counts)

    def start_at(self, level: int) -> None:
        """Begin at a level that the estimate of memory asks for."""
        if level and self._networks:
            self.recompute(level)

    def state(self) -> dict[str, int]:
        """What goes into a resume point."""
        return {"recomputed": self.level, "halvings": self.halvings}

    def load(self, state: Mapping[str, int]) -> None:
        """Go on from what `state` returned."""
        self.halvings = state["halvings"]
        self.start_at(state.get("recomputed", 0))  # an older resume point has none


def _least(parts: list[LossTerm]) -> RunError:
    """What to say where one item does not fit; the largest."""
    items = ((part, item) for part in parts for batch in part.batches for item in batch)
    term, item = max(items, key=lambda each: each[0].rows(each[1]) * len(each[1]))
    return term.too_large([item], "the update", gradient=True)
