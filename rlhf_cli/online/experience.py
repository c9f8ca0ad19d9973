"""A batch of rollouts with all that is known of it before it is learnt from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf_cli.config.schema.stages import OnlineConfig
from rlhf_cli.evaluation.samples import known_or_none, term_columns
from rlhf_cli.evaluation.token_values import Values
from rlhf_cli.models.decoder import matmul_in_float32
from rlhf_cli.models.nonfinite import is_finite
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.objectives.kl import k1
from rlhf_cli.objectives.moments import RunningMoments
from rlhf_cli.online.roles import Needs, Roles
from rlhf_cli.online.updates import Trajectory
from rlhf_cli.rewards.reward import Scores
from rlhf_cli.rewards.rules import repeated_share
from rlhf_cli.rewards.shaping import Shaped, shape
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.rollout.server_proof import LIMIT
from rlhf_cli.runs.policy import Policy
from rlhf_cli.runs.session import Session
from rlhf_cli.training.loss_term import Metrics

Figures = list[float | None]
ALL = Needs(old=True, reference=True)
REPEATED_TOKENS = 4  # an n-gram that comes again counts as repetition


@dataclass
class Experience:
    """Rollouts, their rewards and their log-probs, all in one order.

    old, reference: per rollout (len(response),) log-probs of its tokens, under the policy that
        sampled them and under the reference, at the sampling temperature.
    kls: (B,) log pi(y|x) - log ref(y|x) of each response.
    scored: whether `old` are as training computes them; else as the sampler did.

    reference and kls are None where no reference is asked for.
    """

    rollouts: Sequence[Rollout]
    scores: Scores
    rewards: Shaped
    old: list[Tensor]
    reference: list[Tensor] | None
    kls: Tensor | None
    scored: bool

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
            **self.of_policy(kl_coef),
            "length": sum(lengths) / len(lengths),
            "ended": sum(rollout.ended for rollout in self.rollouts) / len(self.rollouts),
            "repetition": sum(repeated) / len(repeated),
        }

    def of_policy(self, kl_coef: float) -> Metrics:
        """Those that read the policy's log-probs."""
        rewards, kls = self.rewards.total, self.kls
        charged = rewards if kls is None else rewards - kl_coef * kls
        return {
            **({} if kls is None else {"kl": kls.mean().item()}),
            "rlhf_reward": charged[~rewards.isnan()].mean().item(),
            "entropy": -torch.cat(self.old).mean().item(),  # -log p of samples has it as its mean
        }

    def shown(self) -> tuple[Sequence[Rollout], Figures, dict[str, Figures], list[float] | None]:
        """What a table of samples shows: rollouts, rewards, their parts if several, and KLs."""
        rewards, columns = known_or_none(self.rewards.total), term_columns(self.scores)
        return self.rollouts, rewards, columns, None if self.kls is None else self.kls.tolist()

    def of_tokens(self, items: Sequence[Trajectory], kl_coef: float) -> list[Values]:
        """What is known of the tokens of each response.

        Its reward stands at its last token, that of a step at the last one of the step, and each
        token is charged for its own KL.

        Args:
            items: what is learnt from these responses; the others have no advantages.
            kl_coef: what a nat costs in the reward.
        """
        advantages = {id(item.tokens): item.advantages for item in items}
        found: list[Values] = []
        for i, rollout in enumerate(self.rollouts):
            kls = None if self.reference is None else k1(self.old[i], self.reference[i])
            rewards = torch.zeros(len(rollout.tokens.response))
            rewards[-1:] = self.rewards.whole[i]
            if self.rewards.steps is not None and self.rewards.ends is not None:
                steps = self.rewards.steps[i].nan_to_num(0.0)  # of a step that nothing judges
                rewards.index_add_(0, torch.tensor(self.rewards.ends[i]), steps)
            if kls is not None:
                rewards = rewards - kl_coef * kls
            learnt = advantages.get(id(rollout.tokens))
            found.append({"kls": kls, "advantages": learnt, "rewards": rewards})
        return found

    def logprobs(self) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
        """Of each rollout as the sampler computed them, `old` as training does if it was scored,
        and of the reference: as a `Trajectory` has them.
        """
        sampled = [torch.tensor(rollout.logprobs) for rollout in self.rollouts]
        none = [None] * len(sampled)
        old = self.old if self.scored else none
        return list(zip(sampled, old, self.reference or none, strict=True))

    def as_trained(self, items: Sequence[Trajectory], kl_coef: float) -> Metrics:
        """Take the log-probs over that the one update of these items computed; what changes by it.

        Those that sampling kept are a little greater, since it was by them that tokens were drawn.
        """
        if self.scored:
            return {}
        learnt = {id(item.tokens): item for item in items}
        for i, rollout in enumerate(self.rollouts):
            item = learnt.get(id(rollout.tokens))
            if item is not None and item.gap is not None and is_finite(item.gap):
                self.old[i] = item.sampled + item.gap
        if self.reference is not None:
            self.kls = kls_of(self.old, self.reference)
        return self.of_policy(kl_coef)

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
            reference=self.reference and [self.reference[i] for i in places],
            kls=None if self.kls is None else self.kls[places],
        )

    def joined(self, other: "Experience") -> "Experience":
        """These responses, then the other ones."""
        ours, theirs = self.rewards, other.rewards
        kls = [each for each in (self.kls, other.kls) if each is not None]
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
            reference=self.reference and [*self.reference, *(other.reference or [])],
            kls=torch.cat(kls) if kls else None,
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
    needs: Needs = ALL,
) -> Experience:
    """Score rollouts of the policy as it is now, and compare them with the reference.

    Args:
        running: moments of scores so far, where algo.scale_rewards is to divide by them.
    """
    scores = roles.reward.score(rollouts, by_step=cfg.algo.supervision == "process")
    rewards = shape(scores, rollouts, cfg.algo, running)
    sequences = [rollout.tokens for rollout in rollouts]
    exact = roles.policy.engine.exact  # sampling computes as training does
    if exact or not needs.old:
        old = [torch.tensor(rollout.logprobs) for rollout in rollouts]
    else:
        old = logprobs_of(roles.policy.model, sequences, cfg.hardware, temperature)
    ref = kls = None
    if needs.reference:
        with roles.reference.active() as frozen:
            ref = logprobs_of(frozen, sequences, cfg.hardware, temperature)
        kls = kls_of(old, ref)
    return Experience(rollouts, scores, rewards, old, ref, kls, exact or needs.old)


def kls_of(old: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """(B,) log pi(y|x) - log ref(y|x) of responses, of the log-probs of their tokens."""
    return torch.stack([k1(*each).sum() for each in zip(old, reference, strict=True)])


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


def check_first_ratio(
    session: Session, policy: Policy, experience: Experience, temperature: float
) -> None:
    """Before the first update the scored policy is the one that sampled, and the reference.

    The log-prob of each sampled token as the layout of training gives it is compared with the
    sampler's own: every first ratio is 1. The arithmetic of another program may be far off at
    single tokens; their mean must not be. The measured KL to the reference, if it is, must be 0.
    """
    rollouts = experience.rollouts
    scored = experience.old
    if policy.engine.exact or not experience.scored:  # they are the sampler's
        sequences = [rollout.tokens for rollout in rollouts]
        scored = logprobs_of(policy.model, sequences, session.cfg.hardware, temperature)
    sampled = torch.tensor([value for rollout in rollouts for value in rollout.logprobs])
    gaps = (torch.cat(scored) - sampled).abs()
    tolerance = 1e-3 if matmul_in_float32(policy.model) else 0.25
    foreign = policy.engine.foreign
    gap = (gaps.mean() if foreign else gaps.max()).item()
    session.require(
        f"{'mean' if foreign else 'max'}_abs_log_ratio_at_start",
        gap,
        gap < (LIMIT if foreign else tolerance),
        "the policy that is scored is not the one that sampled: temperature, dropout, adapter or "
        "numerics differ between rollout and training",
    )
    if experience.reference is None:
        return
    kl = kls_of(scored, experience.reference).mean().item()
    session.require(
        "kl_to_reference_at_start",
        kl,
        abs(kl) < tolerance,
        "policy and reference are not the same model at the start",
    )
