"""A reward as the stages use it: normalised scores of rollouts, from a checkpoint or a rule."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_cli.config.schema import FrozenModel, Hardware
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.models.load import load_scorer
from rlhf_cli.models.manifest import read_manifest
from rlhf_cli.models.score import scores_of
from rlhf_cli.rewards.rules import Rule, check_columns, rule_of
from rlhf_cli.rollout.rollouts import Rollout

Require = Callable[[str, float, bool, str], None]
"""How a stage records a hand-off check: name, value, whether it holds, diagnosis."""


@dataclass
class RuleReward:
    """A plain function of row and text."""

    rule: Rule

    def check(self, rows: list[Prompt], require: Require) -> None:
        """Every row has the column that the rule reads."""
        check_columns(self.rule, rows)

    def score(self, rollouts: list[Rollout]) -> list[float]:
        """The rule's value for each rollout."""
        return [self.rule.score(rollout.row, rollout.text) for rollout in rollouts]


@dataclass
class CheckpointReward:
    """A reward model: (raw score - mean) / std, with the statistics of its stage.json.

    A reward model of another tool has no statistics; its raw score is used.
    """

    path: str
    model: nn.Module
    mean: float
    std: float
    hardware: Hardware

    def check(self, rows: list[Prompt], require: Require) -> None:
        """The model puts chosen above rejected more often than not on its own held-out pairs."""
        metrics = (read_manifest(self.path) or {}).get("metrics", {})
        if "eval/accuracy" in metrics:
            require(
                "reward_accuracy",
                metrics["eval/accuracy"],
                metrics["eval/accuracy"] > 0.5,
                f"{self.path} is no better than a coin on its own held-out pairs; train it longer, "
                "on more pairs, or check which side is chosen",
            )

    def score(self, rollouts: list[Rollout]) -> list[float]:
        """Normalised scores of prompt and response."""
        sequences = [rollout.tokens for rollout in rollouts]
        raw = scores_of(self.model, sequences, self.hardware)
        normalised: list[float] = ((raw - self.mean) / self.std).tolist()
        return normalised


RewardSource = RuleReward | CheckpointReward


def statistics_of(path: str) -> tuple[float, float]:
    """Mean and standard deviation that a reward folder's stage.json gives; 0 and 1 without."""
    manifest = read_manifest(path) or {}
    statistics = manifest.get("reward", {})
    return float(statistics.get("mean", 0.0)), float(statistics.get("std", 1.0))


def scores_with_eos_rule(
    rollouts: list[Rollout], reward: RewardSource, missing_eos_reward: float | None
) -> Tensor:
    """(B,) rewards; the missing-EOS rule replaces those of responses that never ended."""
    scores = torch.tensor(reward.score(rollouts))
    if missing_eos_reward is None:
        return scores
    ended = torch.tensor([rollout.ended for rollout in rollouts])
    return torch.where(ended, scores, missing_eos_reward)


def load_reward(
    spec: str,
    config: FrozenModel,
    tokenizer: PreTrainedTokenizerBase,
    hardware: Hardware,
    device: torch.device,
) -> RewardSource:
    """The reward that `reward=` names."""
    if (rule := rule_of(spec)) is not None:
        return RuleReward(rule)
    frozen = FrozenModel(dtype=config.dtype, trust_remote_code=config.trust_remote_code)
    model = load_scorer(spec, frozen, tokenizer, device).requires_grad_(False)
    return CheckpointReward(spec, model, *statistics_of(spec), hardware)
