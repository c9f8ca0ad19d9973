"""The weights that a run of ppo or grpo writes at its end."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_cli.config.schema.algorithms import OnlineAlgo
from rlhf_cli.models.adapters import restore, snapshot
from rlhf_cli.models.masters import master_of
from rlhf_cli.reporting.console import say
from rlhf_cli.runs.weights import tensors_of
from rlhf_cli.training.best import Best
from rlhf_cli.training.loss_term import Metrics


class WrittenWeights:
    """The weights that a run writes: the last ones or the best, plain or averaged.

    kept: the metrics of the step whose weights are the best so far; empty for the last ones.

    The average of each weight over optimizer steps is decay * average + (1 - decay) * weight
    (InstructGPT 2203.02155 App. C: decay 0.992).
    """

    def __init__(
        self,
        model: nn.Module,
        algo: OnlineAlgo,
        state: dict[str, Any],
        tensors: dict[str, Tensor],
    ) -> None:
        """`state`, `tensors`: what the methods of those names returned at the resume point."""
        self._model = model
        self._decay = algo.ema_decay
        self._metric = algo.keep
        self.kept: Metrics = state.get("kept", {})
        self._best = Best(model, state, tensors_of(tensors, "best"))
        self._average = snapshot(model) if self._decay else {}
        for name, weight in tensors_of(tensors, "average").items():
            self._average[name].copy_(weight)

    def state(self) -> dict[str, Any]:
        """Figures for a resume point."""
        return {"kept": self.kept, **self._best.state()}

    def tensors(self) -> dict[str, Tensor]:
        """Weights for a resume point."""
        groups = {"average": self._average, "best": self._best.weights}
        return {
            f"{group}/{name}": weight
            for group, weights in groups.items()
            for name, weight in weights.items()
        }

    @torch.no_grad()
    def after_update(self) -> None:
        """Take the weights after an optimizer step into the average."""
        if self._decay is None:
            return
        parameters = dict(self._model.named_parameters())
        for name, average in self._average.items():
            average.lerp_(master_of(parameters[name]).to(average), 1 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model as it would be written now, for evaluations."""
        if self._decay is None:
            yield
            return
        own = snapshot(self._model)
        restore(self._model, self._average)
        try:
            yield
        finally:
            restore(self._model, own)

    def offer(self, step: int, metrics: Metrics) -> None:
        """Keep the weights that algo.keep was measured on, if they are the best so far.

        Args:
            metrics: of this step; without algo.keep, as between evaluations, nothing is kept.
        """
        value = metrics.get(self._metric)
        if value is None:
            return
        average = {name: weight.clone() for name, weight in self._average.items()} or None
        if self._best.offer(value, average):
            self.kept = {**metrics, "kept_step": float(step)}

    def put(self) -> None:
        """Load what is written into the model, at the end."""
        restore(self._model, self._average)
        self._best.put()
        if self.kept:
            step, best = int(self.kept["kept_step"]), self.kept[self._metric]
            say(f"kept the weights of step {step}: {self._metric} {best:.4g}")
