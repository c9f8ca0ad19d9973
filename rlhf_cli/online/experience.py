"""A batch of rollouts with all that is known of it before it is learnt from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf_cli.config.schema import Hardware, OnlineConfig
from rlhf_cli.evaluation.samples import known_or_none, term_columns
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.objectives.kl import k1
from rlhf_cli.objectives.moments import RunningMoments
from rlhf_cli.online.roles import Roles
from rlhf_cli.rewards.reward import Scores
from rlhf_cli.rewards.rules import repeated_share
from rlhf_cli.rewards.shaping import Shaped, shape
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.runs.policy import Policy
from rlhf_cli.training.loss_term import Metrics

Figures = list[float | None]
REPEATED_TOKENS = 4  # an n-gram that comes again counts as repetition


@dataclass
class Experience:
    """Rollouts, their rewards and their log-probs, all in one order.

    old, reference: per rollout (len(response),) log-probs of its tokens, under the policy that
        sampled them and under the reference, at the sampling temperature.
    kls: (B,) log pi(y|x) - log ref(y|x) of each response.
    """

    rollouts: Sequence[Rollout]
    scores: Scores
    rewards: Shaped
    old: list[Tensor]
    reference: list[Tensor]
    kls: Tensor

    def metrics(self, kl_coef: float) -> Metrics:
        """Means over the batch; rewards over the responses that have one, NaN if none has."""
        rewards = self.rewards.total
        scored = ~rewards.isnan()
        lengths = [len(rollout.tokens.response) for rollout in self.rollouts]
        repeated = [
            repeated_share(rollout.tokens.response, REPEATED_TOKENS) for rollout in self.rollouts
        ]
        sources = by_group(self.rollouts, rewards)
        return {
            **{f"source/{name}/reward": value for name, value in sources.items()},
            "reward": rewards[scored].mean().item(),
            "reward_std": rewards[scored].std(correction=0).item() if scored.any() else math.nan,
            "unscored": self.scores.total.isnan().float().mean().item(),
            "kl": self.kls.mean().item(),
            "rlhf_reward": (rewards - kl_coef * self.kls)[scored].mean().item(),
            "entropy": -torch.cat(self.old).mean().item(),  # -log p of samples has it as its mean
            "length": sum(lengths) / len(lengths),
            "ended": sum(rollout.ended for rollout in self.rollouts) / len(self.rollouts),
            "repetition": sum(repeated) / len(repeated),
        }

    def shown(self) -> tuple[Sequence[Rollout], Figures, dict[str, Figures], list[float]]:
        """What a table of samples shows: rollouts, rewards, their parts if several, and KLs."""
        rewards, columns = known_or_none(self.rewards.total), term_columns(self.scores)
        return self.rollouts, rewards, columns, self.kls.tolist()

    def groups(self, picked: Sequence[int], size: int) -> "Experience":
        """The responses of some groups of `size`; their scores are those of the whole batch."""
        places = [group * size + i for group in picked for i in range(size)]
        rewards = self.rewards
        steps = None if rewards.steps is None else [rewards.steps[i] for i in places]
        ends = None if rewards.ends is None else [rewards.ends[i] for i in places]
        return replace(
            self,
            rollouts=[self.rollouts[i] for i in places],
            rewards=Shaped(
                rewards.total[places],
                rewards.whole[places],
                rewards.uncharged[places],
                steps,
                ends,
            ),
            old=[self.old[i] for i in places],
            reference=[self.reference[i] for i in places],
            kls=self.kls[places],
        )

    def joined(self, other: "Experience") -> "Experience":
        """These responses, then the other ones."""
        ours, theirs = self.rewards, other.rewards
        steps = None if ours.steps is None else [*ours.steps, *(theirs.steps or [])]
        ends = None if ours.ends is None else [*ours.ends, *(theirs.ends or [])]
        return replace(
            self,
            rollouts=[*self.rollouts, *other.rollouts],
            rewards=Shaped(
                torch.cat([ours.total, theirs.total]),
                torch.cat([ours.whole, theirs.whole]),
                torch.cat([ours.uncharged, theirs.uncharged]),
                steps,
                ends,
            ),
            old=self.old + other.old,
            reference=self.reference + other.reference,
            kls=torch.cat([self.kls, other.kls]),
        )

    def learnable(self, mask_truncated: bool) -> list[bool]:
        """Which responses have a reward and, where truncated ones are masked, came to an end."""
        scored = (~self.rewards.total.isnan()).tolist()
        return [
            has and (rollout.ended or not mask_truncated)
            for has, rollout in zip(scored, self.rollouts, strict=True)
        ]


def measure(
    rollouts: Sequence[Rollout],
    roles: Roles,
    cfg: OnlineConfig,
    temperature: float,
    running: RunningMoments | None = None,
) -> Experience:
    """Score rollouts of the policy as it is now, and compare them with the reference.

    Args:
        running: moments of scores so far, where algo.scale_rewards is to divide by them.
    """
    scores = roles.reward.score(rollouts, by_step=cfg.algo.supervision == "process")
    rewards = shape(scores, rollouts, cfg.algo, running)
    sequences = [rollout.tokens for rollout in rollouts]
    old = old_logprobs(roles.policy, rollouts, cfg.hardware, temperature)
    with roles.reference.active() as frozen:
        ref = logprobs_of(frozen, sequences, cfg.hardware, temperature)
    kls = [k1(ours, theirs).sum() for ours, theirs in zip(old, ref, strict=True)]
    return Experience(rollouts, scores, rewards, old, ref, torch.stack(kls))


def old_logprobs(
    policy: Policy, rollouts: Sequence[Rollout], hardware: Hardware, temperature: float
) -> list[Tensor]:
    """(len(response),) log-probs of each rollout under the policy that sampled it.

    Those that sampling kept, where it computes as training does; else they are scored anew.
    """
    if policy.engine.exact:
        return [torch.tensor(rollout.logprobs) for rollout in rollouts]
    sequences = [rollout.tokens for rollout in rollouts]
    return logprobs_of(policy.model, sequences, hardware, temperature)


def by_group(rollouts: Sequence[Rollout], rewards: Tensor) -> Metrics:
    """The mean reward of the prompts of each source, over the responses that have one; nothing
    where there is one source.

    Args:
        rewards: (B,), NaN where there is none.
    """
    of: dict[str, list[int]] = {}
    for place, rollout in enumerate(rollouts):
        of.setdefault(rollout.row.group, []).append(place)
    return {name: rewards[places].nanmean().item() for name, places in of.items() if name}
