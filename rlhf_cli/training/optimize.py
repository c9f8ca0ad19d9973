"""The optimizer step: the only place that normalises, accumulates, clips and steps.

A loss is a sum over items; it is divided by the count over the whole step, so micro-batches of any
cut give the gradient of the one large batch (1 x 8 equals 8 x 1).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.optimization import get_scheduler

from rlhf_cli.config.errors import RunError
from rlhf_cli.config.schema import Optimizer as OptimizerConfig
from rlhf_cli.models.adapters import trained

SCHEDULES = {
    "cosine": "cosine_with_min_lr",
    "linear": "linear",
    "constant": "constant_with_warmup",
}
MAX_SKIPPED = 3  # non-finite steps in a row before the run stops

Metrics = dict[str, float]
Loss = tuple[Tensor, dict[str, Tensor]]


@dataclass
class Part:
    """One term of the objective.

    batches: micro-batches, of any cut.
    loss: micro-batch -> its loss and metrics, each SUMMED over items.
    count: what the sums are divided by, over all micro-batches (tokens, pairs, responses).
    weight: factor of this term in the objective.
    """

    batches: Iterable[Any]
    loss: Callable[[Any], Loss]
    count: float
    weight: float = 1.0


class Optimizer:
    """AdamW with warmup and schedule over one or more networks, each with its own rate and norm."""

    def __init__(
        self,
        networks: dict[str, tuple[nn.Module, float]],
        config: OptimizerConfig,
        total_steps: int,
    ) -> None:
        """`networks`: name -> (module, peak learning rate); frozen parameters are left out."""
        self._parameters = {
            name: list(trained(module).values()) for name, (module, _) in networks.items()
        }
        self._max_grad_norm = config.max_grad_norm
        self._adamw = torch.optim.AdamW(
            [{"params": self._parameters[name], "lr": lr} for name, (_, lr) in networks.items()],
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._schedule = get_scheduler(
            SCHEDULES[config.lr_schedule],
            self._adamw,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=(
                {"min_lr_rate": config.min_lr_ratio} if config.lr_schedule == "cosine" else {}
            ),
        )
        self.skipped = 0
        self._skipped_in_a_row = 0
        self.stepped = False  # whether the last step changed the weights

    def step(self, parts: list[Part]) -> Metrics:
        """One update. Returns every metric's mean, grad_norm of each network, and lr.

        A step whose loss or gradient is not finite is skipped and counted.

        Raises:
            RunError: several steps in a row were not finite.
        """
        self._adamw.zero_grad(set_to_none=True)
        sums: defaultdict[str, float] = defaultdict(float)
        total = 0.0
        for part in parts:
            for batch in part.batches:
                loss, metrics = part.loss(batch)
                scaled = loss * (part.weight / part.count)
                scaled.backward()
                total += scaled.item()
                for name, value in metrics.items():
                    sums[name] += float(value) / part.count
        report = {"loss": total, **sums, "lr": self._adamw.param_groups[0]["lr"]}
        norms = {}
        for name, weights in self._parameters.items():
            limit = self._max_grad_norm if self._max_grad_norm is not None else float("inf")
            norms[f"grad_norm/{name}"] = nn.utils.clip_grad_norm_(weights, limit).item()
        self._advance(finite=all(map(_is_finite, [total, *norms.values()])), report=report)
        return {**report, **norms, "skipped": float(self.skipped)}

    def _advance(self, finite: bool, report: Metrics) -> None:
        self.stepped = finite
        if finite:
            self._adamw.step()
            self._skipped_in_a_row = 0
        else:
            self.skipped += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row >= MAX_SKIPPED:
                raise RunError(
                    f"{MAX_SKIPPED} steps in a row had a loss or gradient that is not finite "
                    f"(loss {report['loss']}, lr {report['lr']:.2g}); lower algo.lr, or look for "
                    "extreme rows"
                )
        self._schedule.step()

    # ------------------------------------------------------------------ resume

    def tensors(self) -> dict[str, Tensor]:
        """AdamW's moments and step counts, by network and parameter."""
        return {
            f"{name}.{i}.{moment}": torch.as_tensor(value)
            for name, weights in self._parameters.items()
            for i, weight in enumerate(weights)
            for moment, value in self._adamw.state[weight].items()
        }

    def state(self) -> dict[str, int]:
        """Counters that go beside `tensors` into a resume point."""
        return {
            "schedule": self._schedule.last_epoch,
            "skipped": self.skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load(self, tensors: dict[str, Tensor], state: dict[str, int]) -> None:
        """Go on from what `tensors` and `state` returned."""
        for name, weights in self._parameters.items():
            for i, weight in enumerate(weights):
                start = f"{name}.{i}."
                moments = {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}
                self._adamw.state[weight] = {
                    moment: value.to(weight.device) for moment, value in moments.items()
                }
        self.skipped = state["skipped"]
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self._schedule.last_epoch = state["schedule"]
        rates = [
            base * factor(state["schedule"])
            for base, factor in zip(self._schedule.base_lrs, self._schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self._adamw.param_groups, rates, strict=True):
            group["lr"] = rate


def mean_metrics(updates: list[Metrics]) -> Metrics:
    """The mean of each metric over the updates of one iteration; the last count of `skipped`."""
    means = {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
    return {**means, "skipped": updates[-1]["skipped"]}


def _is_finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
