"""Who takes part where a policy learns from its own samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_cli.models.decoder import matmul_in_float32
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.rewards.reward import Reward, load_reward
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.runs.policy import Policy, policy_of
from rlhf_cli.runs.session import Session
from rlhf_cli.training.own_loss import OwnLoss, own_loss_of


@dataclass
class Roles:
    """The models and judges of ppo and grpo.

    gold: a judge that is never learnt from, if there is one.
    loss: of the policy, where algo.loss names one of the user's.
    """

    policy: Policy
    reference: Reference
    reward: Reward
    gold: Reward | None
    loss: OwnLoss | None


def load_roles(session: Session) -> Roles:
    """The roles that a config of ppo or grpo names; the reference is the policy as it starts."""
    cfg: Any = session.cfg
    loss = own_loss_of(cfg)  # first of all: it may not load
    policy = policy_of(session, cfg.policy)
    reference = Reference(policy.model)
    reward = load_reward(cfg.reward, cfg, policy.tokenizer, session.device, policy.model)
    gold = None
    if cfg.gold is not None:
        gold = load_reward(cfg.gold, cfg, policy.tokenizer, session.device)
    return Roles(policy, reference, reward, gold, loss)


def check_first_ratio(
    session: Session, policy: Policy, rollouts: Sequence[Rollout], temperature: float, kl: float
) -> None:
    """Before the first update the scored policy is the one that sampled, and the reference.

    The log-prob of each sampled token is computed once more in the layout of training and
    compared with the sampler's own: every first ratio is 1. `kl` is the measured KL to the
    reference, which must be 0.
    """
    sequences = [rollout.tokens for rollout in rollouts]
    scored = torch.cat(logprobs_of(policy.model, sequences, session.cfg.hardware, temperature))
    sampled = torch.tensor([value for rollout in rollouts for value in rollout.logprobs])
    gap = (scored - sampled).abs().max().item()
    tolerance = 1e-3 if matmul_in_float32(policy.model) else 0.25
    session.require(
        "max_abs_log_ratio_at_start",
        gap,
        gap < tolerance,
        "the policy that is scored is not the one that sampled: temperature, dropout, adapter or "
        "numerics differ between rollout and training",
    )
    session.require(
        "kl_to_reference_at_start",
        kl,
        abs(kl) < tolerance,
        "policy and reference are not the same model at the start",
    )
