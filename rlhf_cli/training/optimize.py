"""The optimizer step: the only place that normalises, accumulates, clips and steps.

A loss is a sum over items; it is divided by the count over the whole step, so micro-batches of any
cut give the gradient of the one large batch (1 x 8 equals 8 x 1). So ranks may share them, and
where memory runs out on any of them the step is done again in another way, with the same result.
"""

import time
import warnings
from collections.abc import Callable
from functools import partial
from math import isfinite, nan

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LambdaLR

from rlhf_cli.config.errors import RunError
from rlhf_cli.config.schema.algorithms import OptimizerConfig
from rlhf_cli.config.schema.hardware import Hardware
from rlhf_cli.config.schema.keys import AUTO
from rlhf_cli.models.adapters import trained
from rlhf_cli.models.keeping_up import keep_up
from rlhf_cli.models.masters import follow, gather, master_of
from rlhf_cli.models.out_of_memory import if_it_fits, spare
from rlhf_cli.models.repeatable import repeatably
from rlhf_cli.models.sharding import let_go, norm_of_all, ready_to_learn
from rlhf_cli.models.shards import hand_down, is_sharded, like, own_part
from rlhf_cli.ranks.world import world
from rlhf_cli.reporting.console import say
from rlhf_cli.training.balancing import LoadBalancing
from rlhf_cli.training.compiling import Compiling
from rlhf_cli.training.diagnosis import cause_of, draws_again, draws_of_rank
from rlhf_cli.training.figures import EVERYWHERE, Figures
from rlhf_cli.training.loss_term import LossTerm, Metrics
from rlhf_cli.training.room import Room
from rlhf_cli.training.schedules import schedule_of

STEP = "step"  # a count among AdamW's moments
# the first step may have been skipped, which is no mistake
warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")


class Optimizer:
    """AdamW with warmup and schedule over one or more networks, each with its own rate and norm."""

    def __init__(
        self,
        networks: dict[str, tuple[nn.Module, float]],
        config: OptimizerConfig,
        total_steps: int,
        hardware: Hardware,
    ) -> None:
        """`networks`: name -> (module, peak learning rate); frozen parameters are left out."""
        for module, _ in networks.values():
            ready_to_learn(module)
        self._working = {
            name: list(trained(module).values()) for name, (module, _) in networks.items()
        }
        # what is stepped: the float32 masters of what backward passes through, or a rank's parts
        self._parameters = {
            name: [own_part(master_of(weight)) for weight in weights]
            for name, weights in self._working.items()
        }
        self._networks = {name: module for name, (module, _) in networks.items()}
        self._balancing = LoadBalancing(self._networks)
        self._max_grad_norm = config.max_grad_norm
        self._max_skipped = config.max_skipped
        self._adamw = torch.optim.AdamW(
            [{"params": self._parameters[name], "lr": lr} for name, (_, lr) in networks.items()],
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._schedule = LambdaLR(self._adamw, schedule_of(config, total_steps))
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._total_steps = total_steps
        self._compiling = Compiling(self._networks, hardware)
        self.room = Room(self._networks, hardware.gradient_checkpointing == AUTO)
        self.stepped = False  # whether the last step changed the weights

    def step(self, parts: list[LossTerm], number: int | None = None) -> Metrics:
        """One update. Returns every metric's mean, grad_norm of each network, and lr.

        A step whose loss or gradient is not finite is skipped, told and counted.

        Args:
            number: of the update among all that are planned, counted from 0, where some may drop
                out: the schedule of the rates goes by it. None is the one after the last.

        Raises:
            RunError: several steps in a row were not finite, or memory is too small for one item.
        """
        if number is not None:
            self._move_schedule(number)
        began = time.monotonic()
        figures = self._gradient(parts)
        norms = {name: self._norm(name) for name in self._networks}
        for name, norm in norms.items():
            figures.add(f"grad_norm/{name}", norm)
        report = figures.read()
        sizes = {name: report.pop(name) for name in [f"grad_norm/{each}" for each in norms]}
        report["lr"] = self._adamw.param_groups[0]["lr"]
        self.stepped = all(map(isfinite, [report["loss"], *sizes.values()]))
        if self.stepped:
            self._update(norms, sizes)
            self._skipped_in_a_row = 0
        else:
            self._skip(parts, report)
        self._schedule.step()
        left = self._total_steps - self._schedule.last_epoch
        self._compiling.after_step(time.monotonic() - began, left)
        return {**report, **sizes, "skipped": float(self.skipped)}

    def _gradient(self, parts: list[LossTerm]) -> Figures:
        """Leave the gradient of the step; returns its loss and metrics, which are yet to be read.

        Where memory runs out it is done again, in the way that takes less.
        """
        parts, compiled = self.room.cut(parts), self._compiling.compiled
        with draws_of_rank():
            rewind = draws_again()
            while (figures := self._attempt(parts, rewind)) is None:
                self._forget()
                if not self._compiling.gave_up():
                    parts = self.room.more(parts)
                rewind()
        if compiled:
            self._compiling.gave_up()
        self._sum_over_ranks()
        return figures

    def _attempt(self, parts: list[LossTerm], rewind: Callable[[], None]) -> Figures | None:
        """`_backward` on all ranks; None where memory ran out on any of them.

        A rank may do work again by itself where none waits for another within it.
        """
        if self._balancing.networks:
            if (
                keep_up(partial(self._guarded, partial(self._counted, parts), rewind), None, rewind)
                is None
            ):
                return None
            self._balancing.sum_over_ranks()
        work = partial(self._guarded, partial(self._backward, parts), rewind)
        return keep_up(work, partial(self._least, parts), rewind)

    def _least(self, parts: list[LossTerm]) -> None:
        """The passes of `_backward` with the shortest item of each micro-batch."""
        self._forget()
        for part in parts:
            for batch in [*world().dealt(part.batches), *world().idle(part.batches)]:
                i = min(range(len(batch)), key=lambda place: len(batch[place]))
                (part.loss(batch[i : i + 1])[0] * 0).backward()

    def _sum_over_ranks(self) -> None:
        """Of gradients that only some ranks have the others add 0."""
        if world().size == 1:
            return
        weights = [
            own
            for name, each in self._working.items()
            for weight, own in zip(each, self._parameters[name], strict=True)
            if not is_sharded(weight)
        ]
        known = torch.tensor([float(weight.grad is not None) for weight in weights])
        world().sum([known])
        shared = [weight for weight, ranks in zip(weights, known.tolist(), strict=True) if ranks]
        for weight in shared:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        world().sum([weight.grad for weight in shared if weight.grad is not None])

    def _guarded(self, work: Callable[[], Figures], rewind: Callable[[], None]) -> Figures | None:
        """Work, done again where operators or a compiler do not know what it needs."""
        return self._compiling.guarded(partial(repeatably, work, rewind), rewind)

    def _counted(self, parts: list[LossTerm]) -> Figures:
        """Count what goes to each expert; there are no figures yet."""
        self._forget()
        self._balancing.count(parts)
        return Figures()

    def _backward(self, parts: list[LossTerm]) -> Figures:
        self._forget()
        figures = Figures()
        self._balancing.begin_losses()
        before = 0  # micro-batches of the parts before
        for part in parts:
            for turn, batch in enumerate(world().dealt(part.batches)):
                figures.place = before + world().place(turn)
                with self._balancing.watching():
                    loss, metrics = part.loss(batch)
                scaled = loss * (part.weight / part.count) + self._balancing.loss()
                scaled.backward()
                for weights in self._working.values():
                    gather(weights)
                figures.add("loss", scaled)
                for name, value in metrics.items():
                    figures.add(name, value, over=part.count)
            for batch in world().idle(part.batches):
                (part.loss(batch)[0] * 0).backward()
                for weights in self._working.values():
                    gather(weights)
            before += len(part.batches)
        for name, weights in self._working.items():
            hand_down(weights, self._parameters[name])
        self._balancing.tell(figures)
        figures.place = EVERYWHERE
        return figures

    def _forget(self) -> None:
        """Drop all gradients, those of a pass that broke off too."""
        self._adamw.zero_grad(set_to_none=True)
        for weights in self._working.values():
            for weight in weights:
                weight.grad = None
        for network in self._networks.values():
            let_go(network)

    def _move_schedule(self, number: int) -> None:
        """Set the rates to those of a planned step, counted from 0."""
        schedule = self._schedule
        schedule.last_epoch = number
        bases = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        for group, (base, factor) in zip(self._adamw.param_groups, bases, strict=True):
            group["lr"] = base * factor(number)

    def _norm(self, name: str) -> Tensor:
        """Of a network's gradient, over all ranks."""
        pairs = zip(self._working[name], self._parameters[name], strict=True)
        grads = [(weight, own.grad) for weight, own in pairs if own.grad is not None]
        if any(is_sharded(weight) for weight in self._working[name]):
            return norm_of_all(grads)
        return get_total_norm([grad for _, grad in grads])

    def _update(self, norms: dict[str, Tensor], sizes: Metrics) -> None:
        """Clip and step; `sizes` are the same norms on the host."""
        limit = self._max_grad_norm
        for name, weights in self._parameters.items():
            # far enough below, all would be multiplied by 1
            if limit is not None and sizes[f"grad_norm/{name}"] > 0.99 * limit:
                clip_grads_with_norm_(weights, limit, norms[name])

        def update() -> bool:
            self._adamw.step()
            for weights in self._working.values():
                follow(weights)
            return True

        if not self._adamw.state:
            spare()  # its moments are made now; a step that broke off could not be done again
        if not if_it_fits(update):
            count = sum(weight.numel() for each in self._parameters.values() for weight in each)
            raise RunError(
                f"out of memory in the update: AdamW keeps 2 numbers for each of {count} trained "
                f"weights, {count * 8 / 2**30:.2f} GiB; what helps: model.lora_rank, "
                "model.frozen_layers, or a smaller model"
            )

    def _skip(self, parts: list[LossTerm], report: Metrics) -> None:
        """Count a step that is not finite and tell why it is not; stop after some in a row."""
        self.skipped += 1
        self._skipped_in_a_row += 1
        cause = cause_of(self._networks, parts)
        times, most = self._skipped_in_a_row, self._max_skipped
        if times < most:
            say(f"note: step skipped ({times} in a row, {most} end the run); not finite: {cause}")
            return
        raise RunError(
            f"{times} step{'s' if times > 1 else ''} in a row had a loss or gradient that is not "
            f"finite (loss {report['loss']:.4g}, lr {report['lr']:.2g}): {cause}; lower algo.lr, "
            "or look at what is named"
        )

    # ------------------------------------------------------------------ resume

    def tensors(self) -> dict[str, Tensor]:
        """AdamW's moments and step counts, by network and parameter."""
        return {
            f"{name}.{i}.{moment}": torch.as_tensor(
                value if moment == STEP else like(weight, value)
            )
            for name, weights in self._working.items()
            for i, (weight, own) in enumerate(zip(weights, self._parameters[name], strict=True))
            for moment, value in self._adamw.state[own].items()
        }

    def state(self) -> dict[str, int]:
        """Counters that go beside `tensors` into a resume point."""
        return {
            "schedule": self._schedule.last_epoch,
            "skipped": self.skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            **self.room.state(),
            **self._compiling.state(),
        }

    def load(self, tensors: dict[str, Tensor], state: dict[str, int]) -> None:
        """Go on from what `tensors` and `state` returned."""
        for name, weights in self._parameters.items():
            for i, weight in enumerate(weights):
                start = f"{name}.{i}."
                moments = {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}
                self._adamw.state[weight] = {
                    moment: own_part(value).to(weight.device) for moment, value in moments.items()
                }
        self.skipped = state["skipped"]
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self.room.load(state)
        self._compiling.load(state)
        self._move_schedule(state["schedule"])


def mean_metrics(updates: list[Metrics]) -> Metrics:
    """The mean of each metric over the updates of one iteration; the last count of `skipped`.

    A value that is not finite, as of an update that was skipped, is left out; NaN if all are.
    """
    means = {}
    for name in updates[0]:
        known = [update[name] for update in updates if isfinite(update[name])]
        means[name] = sum(known) / len(known) if known else nan
    return {**means, "skipped": updates[-1]["skipped"]}
