"""From scores to rewards: scaling, clipping, and what an unended or long response costs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_cli.config.schema.algorithms import OnlineAlgo
from rlhf_cli.objectives.advantages import soft_overlong
from rlhf_cli.objectives.moments import RunningMoments
from rlhf_cli.rewards.reward import Scores, known_sum
from rlhf_cli.rollout.rollouts import Rollout


@dataclass
class Shaped:
    """Rewards of a batch of rollouts as advantages read them.

    total: (B,) reward of each response, that of its steps included; NaN where nothing scores it.
    whole: (B,) the part of it that belongs to the response as a whole.
    uncharged: (B,) that part before it was charged for length and end.
    steps: with process supervision the (n_i,) rewards of the steps of each response, NaN where
        unknown; else None.
    ends: for each response the index of the last response token of each of its steps.
    """

    total: Tensor
    whole: Tensor
    uncharged: Tensor
    steps: list[Tensor] | None = None
    ends: list[list[int]] | None = None


def shape(
    scores: Scores, rollouts: Sequence[Rollout], algo: OnlineAlgo, running: RunningMoments | None
) -> Shaped:
    """Scores, scaled and clipped, less what the way in which a response ended costs.

    Args:
        running: moments of the scores of all responses so far, which algo.scale_rewards divides
            by; None leaves the scale as it is, and then cuts nothing either.
    """
    std = 1.0
    if algo.scale_rewards and running is not None:
        running.update(scores.total)
        if running.varies:  # else all are equal so far: there is nothing to scale by
            std = running.std
    limit = torch.inf
    if algo.reward_clip is not None and not (algo.scale_rewards and running is None):
        limit = algo.reward_clip  # of scaled scores, where they are scaled

    def scaled(rewards: Tensor) -> Tensor:
        return (rewards / std).clamp(-limit, limit)

    costs = penalties(rollouts, algo)  # (B,)
    if scores.steps is not None and scores.whole is not None:
        unscored = scores.total.isnan()
        uncharged = scaled(scores.whole).nan_to_num(0.0).masked_fill(unscored, torch.nan)
        whole = uncharged - costs
        steps = [
            scaled(each).masked_fill(missing, torch.nan)
            for each, missing in zip(scores.steps, unscored, strict=True)
        ]
        of_steps = torch.stack([known_sum(each[:, None])[0] for each in steps]).nan_to_num(0.0)
        return Shaped(whole + of_steps, whole, uncharged, steps, scores.ends)
    total = scaled(scores.total)
    if algo.missing_eos_reward is not None:
        ended = torch.tensor([rollout.ended for rollout in rollouts])
        total = torch.where(ended, total, algo.missing_eos_reward)
    return Shaped(total - costs, total - costs, total)


def overlong_tokens(algo: OnlineAlgo) -> int:
    """The tokens before max_tokens over which the soft overlong punishment grows."""
    assert algo.overlong_tokens is not None
    if algo.overlong_tokens < 1:
        return max(1, round(algo.overlong_tokens * algo.sampled_tokens))
    return int(algo.overlong_tokens)


def penalties(rollouts: Sequence[Rollout], algo: OnlineAlgo) -> Tensor:
    """(B,) what is subtracted for a missing EOS, per token, and close to max_tokens."""
    lengths = torch.tensor([len(rollout.tokens.response) for rollout in rollouts])
    ended = torch.tensor([rollout.ended for rollout in rollouts])
    costs = algo.missing_eos_penalty * ~ended + algo.length_penalty * lengths
    if algo.overlong_tokens is not None:
        costs = costs - soft_overlong(lengths, algo.sampled_tokens, overlong_tokens(algo))
    return costs
