"""What the updates of an iteration make of its rollouts."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from rlhf_cli.config.schema import OnlineAlgo
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.order import evenly, order_of
from rlhf_cli.objectives.policy_gradient import clipped
from rlhf_cli.online.experience import Experience
from rlhf_cli.online.written import WrittenWeights
from rlhf_cli.training.loss_term import LossTerm, Metrics
from rlhf_cli.training.optimize import Optimizer, mean_metrics
from rlhf_cli.training.own_loss import OwnLoss

Item = TypeVar("Item")


@dataclass
class Trajectory:
    """A response as the update sees it; every tensor is (len(response),).

    old, reference: log-probs under the policy that sampled it, and under the reference.
    values: what the critic said of the state in which each token was drawn; returns: what came.
    """

    tokens: Tokens
    old: Tensor
    reference: Tensor
    values: Tensor | None = field(default=None, kw_only=True)
    advantages: Tensor
    returns: Tensor | None = field(default=None, kw_only=True)

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
    return torch.cat([getattr(each, name) for each in trajectories]).to(like)


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
    optimizer: Optimizer, updates: Iterable[tuple[int, list[LossTerm]]], written: WrittenWeights
) -> list[Metrics]:
    """An optimizer step for each update, by its number and terms; returns their metrics."""
    metrics = []
    for number, terms in updates:
        metrics.append(optimizer.step(terms, number))
        if optimizer.stepped:
            written.after_update()
    return metrics


def update_metrics(updates: list[Metrics], experience: Experience) -> Metrics:
    """Means over the updates of an iteration; sampling_gap as it was before the first of them.

    Then the policy is still the one that sampled, so that the mean of |log pi - log pi_old| is
    what sampling and training compute differently. Where old log-probs were scored anew, it is
    the mean difference to those that sampling kept.
    """
    if not updates:
        return {}
    kept = torch.tensor([value for rollout in experience.rollouts for value in rollout.logprobs])
    rescored = (torch.cat(experience.old) - kept).abs().mean().item()
    gap = rescored or updates[0]["sampling_gap"]
    return {**mean_metrics(updates), "sampling_gap": gap}
