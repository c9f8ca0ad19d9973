"""A policy trained on preferences is a reward model, too: beta log(pi / ref) (2305.18290 eq. 5)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.config.schema.algorithms import DpoAlgo
from rlhf_cli.config.stages import PER_TOKEN, WITHOUT_REFERENCE
from rlhf_cli.preferences.items import PreferenceItem
from rlhf_cli.preferences.reference import seen_from


def reward_scale(algo: DpoAlgo) -> float:
    """beta of the implicit reward beta rho; IPO calls it tau, and some losses have none."""
    return algo.beta or algo.tau or 1.0


def per_response(rho: Tensor, lengths: Tensor, algo: DpoAlgo) -> Tensor:
    """(S,) what a loss reads of log-ratios that are sums over tokens: these, or their means."""
    return rho / lengths if algo.loss in PER_TOKEN else rho


def implicit_rewards(
    logprobs: list[Tensor], items: list[PreferenceItem], algo: DpoAlgo
) -> list[Tensor]:
    """Per item the (K,) beta rho of its responses; of log-probs alone where there is no reference.

    Args:
        logprobs: per item (K,) under the policy.
    """
    rewards = []
    for item, ours in zip(items, logprobs, strict=True):
        rho = ours if item.reference is None else ours - item.reference
        lengths = torch.tensor([len(response) for response in item.answers.responses])
        rewards.append(reward_scale(algo) * per_response(rho, lengths, algo))
    return rewards


def manifest_entries(
    rewards: list[Tensor],
    items: list[PreferenceItem],
    algo: DpoAlgo,
    origin: dict[str, str],
    out: Path,
) -> dict[str, Any]:
    """For stage.json: the reference, and what makes the policy a reward model.

    Mean and standard deviation, as of a reward model, are those of good held-out responses.

    Args:
        rewards: from `implicit_rewards`.
        origin: what the reference is; empty where there is none.
    """
    if not origin:
        return {}
    if algo.loss in WITHOUT_REFERENCE:
        return {"reference": origin}
    pairs = zip(rewards, items, strict=True)
    good = torch.tensor([each[item.best].item() for each, item in pairs if item.is_good]).double()
    implicit = {
        "beta": reward_scale(algo),
        "per_token": algo.loss in PER_TOKEN,
        "reference": seen_from(out, origin),
        "hash": origin["hash"],
    }
    entries: dict[str, Any] = {"reference": origin, "implicit_reward": implicit}
    if len(good) > 1 and good.std() > 0:
        entries["reward"] = {"mean": good.mean().item(), "std": good.std().item()}
    return entries
