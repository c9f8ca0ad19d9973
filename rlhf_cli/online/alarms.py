"""Alarms of a run that learns from its own samples."""

import math
from collections.abc import Callable
from operator import ge, gt, le
from typing import Any

from rlhf_cli.config.errors import RunError
from rlhf_cli.config.online_rules import ALARMS
from rlhf_cli.config.schema.algorithms import OnlineAlgo
from rlhf_cli.online.mismatch import SOUND
from rlhf_cli.reporting.console import say
from rlhf_cli.training.loss_term import Metrics

MAX_UNSCORED = 3  # iterations in a row without any reward before the run stops
GROWN = 3  # times what the first iteration had, and above what is SOUND


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
        self._unscored: int = state.get("unscored", 0)  # iterations in a row without any reward
        self._first_length: float | None = state.get("first_length")
        self._last: dict[str, float] | None = state.get("last_evaluation")
        self._first_gap: float | None = state.get("first_gap")
        self._warned: bool = state.get("warned", False)

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {
            "broken": self._broken,
            "unscored": self._unscored,
            "first_length": self._first_length,
            "last_evaluation": self._last,
            "first_gap": self._first_gap,
            "warned": self._warned,
        }

    def on_rollouts(self, step: int, metrics: Metrics) -> list[str]:
        """Look at the metrics of a batch of rollouts, add alarm/...; returns what ends the run.

        Raises:
            RunError: nothing got a reward for several iterations in a row, or in the whole run.
        """
        algo = self._algo
        self._unscored = self._unscored + 1 if metrics["unscored"] == 1 else 0
        if self._unscored >= MAX_UNSCORED or self._unscored == step == algo.steps:
            raise self._nothing_scored()
        if self._first_length is None:
            self._first_length = metrics["length"]
        drift = abs(metrics["length"] / self._first_length - 1)
        measured: dict[str, tuple[float, Callable[[float, float], bool]]] = {
            "kl": (metrics.get("kl", 0.0), gt),  # with a limit it is measured
            "reward": (metrics["reward"], ge),
            "entropy": (metrics["entropy"], le),
            "length": (drift, gt),
            "repetition": (metrics["repetition"], gt),
            "truncated": (1 - metrics["ended"], gt),
        }
        stops = []
        for name, (value, breaks) in measured.items():
            limit = getattr(algo, ALARMS[name])
            if limit is None:
                continue
            broken = breaks(value, limit)
            if self._count(step, name, value, limit, broken, algo.alarm_steps, metrics):
                stops.append(name)
        if stops and self._unscored == step:  # since the run began
            raise self._nothing_scored()
        return stops

    def _nothing_scored(self) -> RunError:
        count = self._unscored
        last = "the first iteration" if count == 1 else f"the last {count} iterations"
        return RunError(
            f"no response of {last} got a reward; see the messages of reward functions above, or "
            "the columns and forms that rules need"
        )

    def on_updates(self, step: int, metrics: Metrics) -> bool:
        """Look at what sampling and training compute differently; True where it ends the run.

        It is too much above its limit and, far below, where it has grown since the run began: what
        differs then is not the rounding of a model at rest.
        """
        gap = metrics.get("sampling_gap")
        if gap is None or not math.isfinite(gap):  # there was no update, or it was skipped
            return False
        if self._first_gap is None:
            self._first_gap = gap
        if gap > SOUND and not self._warned:
            self._warned = True
            say(
                f"note: sampling and training differ by {gap:.2g} nats per token; above {SOUND} "
                "ratios are wrong from the start: model.dtype=float32, or an exact match of both"
            )
        limit = self._algo.max_sampling_gap
        if limit is None:
            return False
        grown = GROWN * max(self._first_gap, SOUND)
        broken = gap > min(limit, grown)
        patience = self._algo.alarm_steps
        return self._count(step, "sampling_gap", gap, min(limit, grown), broken, patience, metrics)

    def on_evaluation(self, step: int, metrics: Metrics) -> bool:
        """Look at an evaluation: is the reward up while gold is down?"""
        patience = self._algo.overoptimised
        if patience is None:
            return False
        now = {name: metrics[f"eval/{name}"] for name in ("reward", "gold")}
        if any(math.isnan(value) for value in now.values()):  # nothing was scored
            return False
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
            if name == "sampling_gap" and limit != self._algo.max_sampling_gap:
                meaning = f"{GROWN} times what it was, or {GROWN * SOUND:g}"
            end = "; the run stops here" if stop else ""
            say(f"alarm at step {step}: {name} {value:.4g} ({meaning}){end}")
        return stop
