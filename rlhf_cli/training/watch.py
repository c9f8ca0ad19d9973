"""Alarms of a run that learns from its own samples, and the weights that it writes in the end."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_cli.config.online_rules import ALARMS
from rlhf_cli.config.schema import OnlineAlgo
from rlhf_cli.reporting.console import say
from rlhf_cli.training.optimize import Metrics
from rlhf_cli.training.session import restore, snapshot, tensors_of


class Alarms:
    """Limits on what is measured on rollouts and in evaluations; null limits are off.

    A limit counts as broken after `alarm_steps` iterations in a row (evaluations for
    over-optimisation). Each is logged as alarm/NAME (1 broken, 0 not), said once when it breaks,
    and ends the run where `stop_on` names it.
    """

    def __init__(self, algo: OnlineAlgo, state: dict[str, Any]) -> None:
        """`state`: what `state()` returned at the resume point; empty for a fresh run."""
        self._algo = algo
        self._broken: dict[str, int] = state.get("broken", {})  # iterations in a row
        self._first_length: float | None = state.get("first_length")
        self._last: dict[str, float] | None = state.get("last_evaluation")

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {
            "broken": self._broken,
            "first_length": self._first_length,
            "last_evaluation": self._last,
        }

    def on_rollouts(self, step: int, metrics: Metrics) -> bool:
        """Look at the metrics of a batch of rollouts, add alarm/..., say whether to stop."""
        algo = self._algo
        if self._first_length is None:
            self._first_length = metrics["length"]
        drift = abs(metrics["length"] / self._first_length - 1)
        truncated = 1 - metrics["ended"]
        found = {
            "kl": (metrics["kl"], algo.max_kl, metrics["kl"] > (algo.max_kl or 0)),
            "reward": (
                metrics["reward"],
                algo.target_reward,
                metrics["reward"] >= (algo.target_reward or 0),
            ),
            "entropy": (
                metrics["entropy"],
                algo.min_entropy,
                metrics["entropy"] <= (algo.min_entropy or 0),
            ),
            "length": (drift, algo.max_length_drift, drift > (algo.max_length_drift or 0)),
            "repetition": (
                metrics["repetition"],
                algo.max_repetition,
                metrics["repetition"] > (algo.max_repetition or 0),
            ),
            "truncated": (truncated, algo.max_truncated, truncated > (algo.max_truncated or 0)),
        }
        stops = [
            self._count(step, name, value, limit, broken, algo.alarm_steps, metrics)
            for name, (value, limit, broken) in found.items()
            if limit is not None
        ]
        return any(stops)

    def on_evaluation(self, step: int, metrics: Metrics) -> bool:
        """Look at an evaluation: is the reward up while gold is down?"""
        patience = self._algo.overoptimised
        if patience is None:
            return False
        now = {name: metrics[f"eval/{name}"] for name in ("reward", "gold")}
        last, self._last = self._last, now
        if last is None:
            return False
        apart = now["reward"] > last["reward"] and now["gold"] < last["gold"]
        return self._count(
            step, "overoptimised", now["gold"], last["gold"], apart, patience, metrics
        )

    def _count(
        self,
        step: int,
        name: str,
        value: float,
        limit: float,
        broken: bool,
        patience: int,
        metrics: Metrics,
    ) -> bool:
        """Count a limit in `metrics`; True where it is broken for long enough and ends the run."""
        row = self._broken.get(name, 0) + 1 if broken else 0
        self._broken[name] = row
        metrics[f"alarm/{name}"] = float(row >= patience)
        stop = row >= patience and name in self._algo.stop_on
        if row == patience:
            meaning = f"algo.{ALARMS[name]}={limit:g}"
            if name == "overoptimised":
                meaning = f"the reward rises while gold falls, from {limit:.4g}"
            end = "; the run stops here" if stop else ""
            say(f"alarm at step {step}: {name} {value:.4g} ({meaning}){end}")
        return stop


class Written:
    """The weights that a run writes: the last ones or the best, plain or averaged.

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
        self.best: float | None = state.get("best")
        self.best_step: int | None = state.get("best_step")
        self._average = tensors_of(tensors, "average") or (snapshot(model) if self._decay else {})
        self._best = tensors_of(tensors, "best")

    def state(self) -> dict[str, Any]:
        """Figures for a resume point."""
        return {"best": self.best, "best_step": self.best_step}

    def tensors(self) -> dict[str, Tensor]:
        """Weights for a resume point."""
        groups = {"average": self._average, "best": self._best}
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
            average.lerp_(parameters[name].to(average), 1 - self._decay)

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
        """Keep the weights that `metrics` was measured on, if they are the best so far."""
        value = metrics.get(self._metric)  # none for keep=last, and between evaluations
        if value is None or value != value or (self.best is not None and value <= self.best):
            return
        self.best, self.best_step = value, step
        current = self._average if self._decay else snapshot(self._model)
        self._best = {name: weight.clone() for name, weight in current.items()}

    def put(self) -> None:
        """Load what is written into the model, at the end."""
        chosen = self._best or self._average
        restore(self._model, chosen)
        if self.best_step is not None:
            say(f"kept the weights of step {self.best_step}: {self._metric} {self.best:.4g}")
