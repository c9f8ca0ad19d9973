"""What the updates of an iteration make of its rollouts."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from rlhf_cli.config.schema.algorithms import OnlineAlgo
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.order import evenly, order_of
from rlhf_cli.data.transfer import to_device
from rlhf_cli.objectives.policy_gradient import clipped
from rlhf_cli.online.mismatch import mismatch
from rlhf_cli.online.written import WrittenWeights
from rlhf_cli.ranks.world import world
from rlhf_cli.training.loss_term import LossTerm, Metrics
from rlhf_cli.training.optimize import Optimizer, mean_metrics
from rlhf_cli.training.own_loss import OwnLoss

Item = TypeVar("Item")


@dataclass
class Trajectory:
    """A response as the update sees it; every tensor is (len(response),).

    sampled: log-probs as the sampler computed them.
    old, reference: log-probs as training computes them, of the policy that sampled it and of the
        reference. None: `old` are those of the one update, and no `reference` is asked for.
    values: what the critic said of the state in which each token was drawn; returns: what came.
    gap: what the first pass of an update gave, less `sampled`.
    """

    tokens: Tokens
    sampled: Tensor
    old: Tensor | None
    reference: Tensor | None
    values: Tensor | None = field(default=None, kw_only=True)
    advantages: Tensor
    returns: Tensor | None = field(default=None, kw_only=True)
    gap: Tensor | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def prompt(self) -> list[int]:
        """Ids of the prompt."""
        return self.tokens.prompt

    @property
    def responses(self) -> list[list[int]]:
        """Ids of the one response."""
        return self.tokens.responses

    @property
    def source(self) -> str:
        """Where the row of its prompt stands, for messages."""
        return self.tokens.source


@dataclass(frozen=True)
class Coefficients:
    """What a loss is weighted by in one iteration.

    temperature: that the batch was sampled at, and is scored at.
    old_kl_coef: klpen: weight of KL(old || new) per token.
    """

    kl_coef: float
    temperature: float
    old_kl_coef: float = 0.0


def old_logprobs(items: Sequence[Trajectory], new: Tensor) -> Tensor:
    """(N,) of all tokens; where items have none those of this pass, so that each ratio is 1.

    Args:
        new: (N,) current log-probs.
    """
    if any(item.old is None for item in items):
        return new.detach()
    return flat(items, "old", new)


def keep_gaps(items: Sequence[Trajectory], new: Tensor) -> None:
    """Note of each item how far (N,) log-probs are from its sampler's, the first time."""
    gaps = new.detach() - flat(items, "sampled", new)
    for item, gap in zip(items, gaps.split([len(item.sampled) for item in items]), strict=True):
        if item.gap is None:
            item.gap = gap


def gaps_of(items: Sequence[Trajectory]) -> list[Tensor]:
    """What `keep_gaps` has noted on any rank, on the CPU from now on; the device is asked once."""
    seen = [place for place, item in enumerate(items) if item.gap is not None]
    own = [items[place].gap for place in seen]
    noted = [torch.cat([gap for gap in own if gap is not None])] if own else []
    places = [place for of_rank in world().from_all(seen) for place in of_rank]
    gaps = torch.cat(world().gather(noted))
    for place, gap in zip(
        places, gaps.split([len(items[place].sampled) for place in places]), strict=True
    ):
        items[place].gap = gap
    return [item.gap for item in items if item.gap is not None]


def own_policy_loss(
    own: OwnLoss,
    new: Tensor,
    old: Tensor,
    reference: Tensor,
    advantages: Tensor,
    mask: Tensor,
    algo: OnlineAlgo,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(B, T) the losses that a function of the user's gives each token, and where the ratio lies
    outside the clip, if it names one.
    """
    losses = own.losses(
        logprobs=new,
        old_logprobs=old,
        reference_logprobs=reference,
        advantages=advantages,
        mask=mask,
    )
    limits = [getattr(algo, each) if each in own.names else None for each in ("clip", "clip_high")]
    clips = {"clip_fraction": clipped(new - old, *limits)} if any(limits) else {}
    return losses, clips


def flat(trajectories: Sequence[Trajectory], name: str, like: Tensor) -> Tensor:
    """(N,) a tensor of all trajectories, token after token, on the device and in the type of
    another.
    """
    values = torch.cat([getattr(each, name) for each in trajectories])
    return to_device(values.to(dtype=like.dtype), like.device)


def minibatches(
    items: Sequence[Item], algo: OnlineAlgo, seed: int, step: int
) -> Iterator[tuple[int, list[Item]]]:
    """The items of an iteration in seeded minibatches, epoch by epoch, with the number of each.

    Args:
        step: the iteration, from 1. Numbers go on from one to the next; where items dropped out
            there may be fewer minibatches, and numbers are left out.
    """
    planned = algo.batch_size // algo.minibatch_size
    for epoch in range(algo.epochs):
        order = order_of(len(items), seed, f"minibatches {step}", epoch)
        for i, picked in enumerate(evenly(order, algo.minibatch_size)):
            number = ((step - 1) * algo.epochs + epoch) * planned + i
            yield number, [items[j] for j in picked]


def take_steps(
    optimizer: Optimizer,
    updates: Iterable[tuple[int, list[LossTerm]]],
    written: WrittenWeights,
    items: Sequence[Trajectory],
) -> Metrics:
    """An optimizer step for each update, by its number and terms.

    Args:
        items: all that the updates learn from.

    Returns:
        Means over the updates, and `mismatch` of the items of the first of them: in its passes the
        policy was still the one that sampled.
    """
    metrics: list[Metrics] = []
    between: Metrics = {}
    for number, terms in updates:
        metrics.append(optimizer.step(terms, number))
        if optimizer.stepped:
            written.after_update()
        between = between or mismatch(gaps_of(items))
    return mean_metrics(metrics) | between if metrics else {}
