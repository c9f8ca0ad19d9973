"""The policy of a stage with its tokenizer, and the checks that hold wherever one is handed on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf_cli.data.tokens import Encoder
from rlhf_cli.folders.manifest import read_manifest
from rlhf_cli.models.forward import matmul_in_float32
from rlhf_cli.models.load import load_policy, load_tokenizer, stop_ids_of
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.models.shared import recompute_activations
from rlhf_cli.reporting.console import say
from rlhf_cli.rewards.reward import Reward, load_reward
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.runs.session import Session


@dataclass
class Policy:
    """A language model, its tokenizer and encoder, and the ids that end its responses."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    stop_ids: list[int]


@dataclass
class Roles:
    """Who takes part where a policy learns from its own samples.

    gold: a judge that is never learnt from, if there is one.
    """

    policy: Policy
    reference: Reference
    reward: Reward
    gold: Reward | None


def load_roles(session: Session) -> Roles:
    """The roles that a config of ppo or grpo names; the reference is the policy as it starts."""
    cfg: Any = session.cfg
    policy = policy_of(session, cfg.policy)
    reference = Reference(policy.model)
    reward = load_reward(cfg.reward, cfg, policy.tokenizer, session.device, policy.model)
    gold = None
    if cfg.gold is not None:
        gold = load_reward(cfg.gold, cfg, policy.tokenizer, session.device)
    return Roles(policy, reference, reward, gold)


def policy_of(session: Session, path: str) -> Policy:
    """The policy of a folder or hub id; its EOS ids are those that it was trained with."""
    cfg: Any = session.cfg
    tokenizer = load_tokenizer(path, cfg.model)
    encoder = Encoder(tokenizer, cfg.data)
    model = load_policy(path, cfg.model, tokenizer, session.device)
    if cfg.hardware.gradient_checkpointing:
        recompute_activations(model)
    stop_ids = stop_ids_of(path, tokenizer)
    manifest = read_manifest(path)
    if manifest is not None and "eos_ids" in manifest:
        session.require(
            "eos_ids_missing",
            float(len(set(manifest["eos_ids"]) - set(stop_ids))),
            set(manifest["eos_ids"]) <= set(stop_ids),
            f"{path} was trained to end with ids {manifest['eos_ids']} but generates with "
            f"{stop_ids}; its generation_config.json was changed",
        )
        if manifest.get("template") != cfg.data.template:
            say(
                f"note: {path} was trained with template {manifest.get('template')!r}, "
                f"data.template is {cfg.data.template!r}"
            )
    return Policy(model, tokenizer, encoder, sorted({*stop_ids, *encoder.stop_ids}))


def check_first_ratio(
    session: Session, model: nn.Module, rollouts: Sequence[Rollout], temperature: float, kl: float
) -> None:
    """Before the first update the scored policy is the one that sampled, and the reference.

    The log-prob of each sampled token is computed once more in the layout of training and
    compared with the sampler's own: every first ratio is 1. `kl` is the measured KL to the
    reference, which must be 0.
    """
    sequences = [rollout.tokens for rollout in rollouts]
    scored = torch.cat(logprobs_of(model, sequences, session.cfg.hardware, temperature))
    sampled = torch.tensor([value for rollout in rollouts for value in rollout.logprobs])
    gap = (scored - sampled).abs().max().item()
    tolerance = 1e-3 if matmul_in_float32(model) else 0.25
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


def check_reference(session: Session, reference: Reference) -> None:
    """The reference ends as it began, to the bit."""
    same = reference.digest() == reference.hash
    session.require(
        "reference_unchanged", float(same), same, "training has changed the frozen reference"
    )
