"""The weights of the best evaluation so far."""

import math
from typing import Any

from torch import Tensor, nn

from rlhf_cli.models.adapters import restore, snapshot


class Best:
    """Weights and merit of the best evaluation so far; none before the first one.

    merit: what it was judged by; the higher, the better.
    """

    def __init__(self, model: nn.Module, state: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """`state`, `weights`: as they were at the resume point; empty for a fresh run."""
        self._model = model
        self.merit: float = -math.inf if state.get("best") is None else state["best"]
        self.weights = weights

    def state(self) -> dict[str, float | None]:
        """What goes into a resume point beside `weights`."""
        return {"best": self.merit if self.weights else None}

    def offer(self, merit: float, weights: dict[str, Tensor] | None = None) -> bool:
        """Keep these weights, or a copy of those of the model, if they are better; NaN is not."""
        if not merit > self.merit:
            return False
        self.merit = merit
        self.weights = snapshot(self._model) if weights is None else weights
        return True

    def put(self) -> None:
        """Load them into the model, if there are any."""
        restore(self._model, self.weights)
