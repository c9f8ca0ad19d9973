"""From scores to rewards: scaling, clipping, and what an unended or long response costs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_cli.config.schema import OnlineAlgo
from rlhf_cli.objectives.advantages import soft_overlong
from rlhf_cli.objectives.moments import RunningMoments
from rlhf_cli.rewards.sources import Scores
from rlhf_cli.rollout.rollouts import Rollout


@dataclass
class Shaped:
    """Rewards of a batch of rollouts as advantages read them.

    total: (B,) reward of each response; NaN where nothing scores it.
    steps: with process supervision the (n_i,) rewards of the steps of each response, else None.
    ends: for each response the index of the last response token of each of its steps.
    """

    total: Tensor
    steps: list[Tensor] | None = None
    ends: list[list[int]] | None = None


def shape(
    scores: Scores, rollouts: Sequence[Rollout], algo: OnlineAlgo, running: RunningMoments
) -> Shaped:
    """Scores, scaled and clipped, less what the way in which a response ended costs.

    Args:
        running: moments of all scores so far, updated where algo.scale_rewards asks for them.
    """
    costs = penalties(rollouts, algo)  # (B,)
    if scores.steps is not None:
        lengths = [len(steps) for steps in scores.steps]
        scaled = _scaled(torch.cat(scores.steps), algo, running)
        steps = [each.clone() for each in scaled.split(lengths)]
        for rewards, cost in zip(steps, costs, strict=True):
            rewards[-1] -= cost
        total = torch.stack([each.sum() for each in steps])
        return Shaped(total.masked_fill(scores.total.isnan(), torch.nan), steps, scores.ends)
    total = _scaled(scores.total, algo, running)
    if algo.missing_eos_reward is not None:
        ended = torch.tensor([rollout.ended for rollout in rollouts])
        total = torch.where(ended, total, algo.missing_eos_reward)
    return Shaped(total - costs)


def _scaled(rewards: Tensor, algo: OnlineAlgo, running: RunningMoments) -> Tensor:
    if algo.scale_rewards:
        running.update(rewards)
        rewards = rewards / (running.std or 1.0)  # all equal so far: nothing to scale by
    if algo.reward_clip is not None:
        rewards = rewards.clamp(-algo.reward_clip, algo.reward_clip)
    return rewards


def penalties(rollouts: Sequence[Rollout], algo: OnlineAlgo) -> Tensor:
    """(B,) what is subtracted for a missing EOS, per token, and close to max_tokens."""
    lengths = torch.tensor([len(rollout.tokens.response) for rollout in rollouts])
    ended = torch.tensor([rollout.ended for rollout in rollouts])
    costs = algo.missing_eos_penalty * ~ended + algo.length_penalty * lengths
    if algo.overlong_tokens is not None:
        costs = costs - soft_overlong(lengths, algo.max_tokens, algo.overlong_tokens)
    return costs
