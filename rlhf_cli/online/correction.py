"""Weights of samples that another sampler drew than the policy that is trained.

    L = E_sampler[ sg(min(pi_old / pi_sampler, cap)) L_t ]

An engine of its own computes what the policy computes, by other kernels; what it draws is of
another distribution (online/mismatch.py measures how far). The ratio pi / pi_old of a loss, its
clip and its advantages stay what they are: the weight stands beside them, detached, and multiplies
each term that is a mean over sampled tokens. Those are the policy's loss and estimates of the KL;
an exact KL, the entropy and what a critic learns take no such mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_cli.config.schema.algorithms import OnlineAlgo
from rlhf_cli.config.schema.keys import AUTO
from rlhf_cli.objectives.policy_gradient import rollout_weights
from rlhf_cli.online.updates import Trajectory, flat
from rlhf_cli.rollout.engine import Engine
from rlhf_cli.training.loss_term import Metrics


@dataclass(frozen=True)
class Correction:
    """How samples are weighed: by the ratio of each `token`, of a whole `sequence`, or not at all.

    cap: the largest weight.
    """

    level: str | None
    cap: float

    @classmethod
    def of(cls, algo: OnlineAlgo, engine: Engine) -> "Correction":
        """What algo.rollout_correction means with an engine."""
        level = algo.rollout_correction
        if level == AUTO:
            whole = getattr(algo, "loss", None) == "sequence_clip"
            level = ("sequence" if whole else "token") if engine.foreign else None
        return cls(level, algo.rollout_correction_cap)

    def said(self) -> str:
        """What a run says of it."""
        what = "response" if self.level == "sequence" else "token"
        return (
            f"rollout correction: what is learnt from each {what} weighs min(p / q, {self.cap:g}), "
            "its probability by training over that of the engine which sampled it"
        )

    def weights(self, items: Sequence[Trajectory], old: Tensor) -> Tensor:
        """(N,) what the tokens of some responses weigh in the loss.

        Args:
            old: (N,) log-probs of the policy that sampled, as training computes them.
        """
        if self.level is None:
            return torch.ones_like(old)
        lengths = [len(item.sampled) for item in items]
        return rollout_weights(old - flat(items, "sampled", old), lengths, self.level, self.cap)

    def metrics(self, items: Sequence[Trajectory]) -> Metrics:
        """What the weights of an iteration were like: one for each token, or for each response.

        Returns:
            correction_weight: their mean.
            correction_capped: the share of them that the cap holds.
            correction_ess: (sum w)^2 / sum w^2 over their number: the share of equally weighed ones
                that would know as much.
        """
        if self.level is None:
            return {}
        gaps = [item.gap if item.old is None else item.old - item.sampled for item in items]
        known = [gap.double() for gap in gaps if gap is not None]
        if not known:
            return {}
        logs = torch.cat(known) if self.level == "token" else torch.stack([g.sum() for g in known])
        used = rollout_weights(logs, [1] * len(logs), "token", self.cap)
        return {
            "correction_weight": used.mean().item(),
            "correction_capped": (used == self.cap).double().mean().item(),
            "correction_ess": (used.sum() ** 2 / (used**2).sum() / len(used)).item(),
        }
