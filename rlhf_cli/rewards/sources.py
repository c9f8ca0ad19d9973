"""A reward as the stages use it: normalised scores of rollouts, from a checkpoint or a rule."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_cli.config.schema import FrozenModel, Hardware
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.tokens import StepCutter, Tokens
from rlhf_cli.models.load import check_vocabulary, load_policy, load_scorer
from rlhf_cli.models.manifest import (
    RESPONSE,
    STEP,
    implicit_reward_of,
    level_of,
    read_manifest,
    reference_folder,
)
from rlhf_cli.models.score import logprobs_of, scores_of, token_scores_of
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
class Reading:
    """How the scores of a reward model become one number per response.

    level: where scores stand: at the end of the response, of each step, or at each token.
    aggregate: of steps `product` (log-probability that all are right, Lightman 2305.20050) or
        `min` (logit of the least certain); of tokens `mean` or `sum`.
    cutter: finds the steps of a response.
    """

    level: str = RESPONSE
    aggregate: str | None = None
    cutter: StepCutter | None = None

    def scores(self, scorer: nn.Module, sequences: Sequence[Tokens], hardware: Hardware) -> Tensor:
        """(N,) raw scores of responses."""
        if self.level == RESPONSE:
            return scores_of(scorer, sequences, hardware)
        per_token = token_scores_of(scorer, sequences, hardware)
        if self.level == STEP:
            assert self.cutter is not None
            ends = [self.cutter.ends(sequence.response) for sequence in sequences]
            per_token = [scores[end] for scores, end in zip(per_token, ends, strict=True)]
        return torch.stack([aggregated(scores, self.aggregate) for scores in per_token])


def aggregated(scores: Tensor, how: str | None) -> Tensor:
    """The score of a response from those within it: (N,) -> ()."""
    if how == "product":
        return nn.functional.logsigmoid(scores).sum()
    if how == "min":
        return scores.min()
    return scores.sum() if how == "sum" else scores.mean()


class ModelReward(ABC):
    """A reward that a model gives: (raw score - mean) / std, by the statistics of its stage.json.

    A reward model of another tool has no statistics; its raw score is used.
    """

    def __init__(self, path: str, hardware: Hardware) -> None:
        self.path = path
        self.hardware = hardware
        self.mean, self.std = statistics_of(path)

    @abstractmethod
    def raw(self, sequences: Sequence[Tokens]) -> Tensor:
        """(N,) scores of responses before normalisation."""

    def check(self, rows: list[Prompt], require: Require) -> None:
        """The model puts better above worse more often than not on its own held-out rows."""
        metrics = (read_manifest(self.path) or {}).get("metrics", {})
        found = metrics.get("eval/auc", metrics.get("eval/accuracy"))
        if found is not None:
            require(
                "reward_accuracy",
                found,
                found > 0.5,
                f"{self.path} is no better than a coin on its own held-out rows; train it longer, "
                "on more rows, or check which side is chosen",
            )

    def score(self, rollouts: list[Rollout]) -> list[float]:
        """Normalised scores of prompt and response."""
        raw = self.raw([rollout.tokens for rollout in rollouts])
        normalised: list[float] = ((raw - self.mean) / self.std).tolist()
        return normalised


class CheckpointReward(ModelReward):
    """A reward model: a classifier with one label, at the level that its stage.json says."""

    def __init__(self, path: str, model: nn.Module, reading: Reading, hardware: Hardware) -> None:
        super().__init__(path, hardware)
        self.model = model
        self.reading = reading

    def raw(self, sequences: Sequence[Tokens]) -> Tensor:
        """(N,) scores of the head."""
        return self.reading.scores(self.model, sequences, self.hardware)


class ImplicitReward(ModelReward):
    """A policy trained by dpo: beta log(pi / ref) of the response (2305.18290 eq. 5).

    A loss that averages over tokens has the mean in place of the sum.
    """

    def __init__(
        self,
        path: str,
        policy: nn.Module,
        reference: nn.Module,
        beta: float,
        per_token: bool,
        hardware: Hardware,
    ) -> None:
        super().__init__(path, hardware)
        self.policy, self.reference = policy, reference
        self.beta, self.per_token = beta, per_token

    def raw(self, sequences: Sequence[Tokens]) -> Tensor:
        """(N,) implicit rewards."""
        ours, theirs = (
            logprobs_of(model, sequences, self.hardware) for model in (self.policy, self.reference)
        )
        ratios = [a - b for a, b in zip(ours, theirs, strict=True)]
        reduced = [ratio.mean() if self.per_token else ratio.sum() for ratio in ratios]
        return self.beta * torch.stack(reduced)


def statistics_of(path: str) -> tuple[float, float]:
    """Mean and standard deviation that a folder's stage.json gives for its rewards; or 0 and 1."""
    statistics = (read_manifest(path) or {}).get("reward", {})
    return float(statistics.get("mean", 0.0)), float(statistics.get("std", 1.0))


RewardSource = RuleReward | ModelReward


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
    """The reward that `reward=` names: a rule, a reward model, or a policy trained by dpo.

    Raises:
        UserError: the folder holds no reward, or the reference of a policy is gone or has changed.
    """
    if (rule := rule_of(spec)) is not None:
        return RuleReward(rule)
    frozen = FrozenModel(dtype=config.dtype, trust_remote_code=config.trust_remote_code)
    check_vocabulary("reward", spec, frozen, tokenizer)
    implicit = implicit_reward_of(spec)
    if implicit is not None:
        reference = reference_folder(spec, implicit)
        policy, ref = (
            load_policy(path, frozen, tokenizer, device).requires_grad_(False)
            for path in (spec, reference)
        )
        return ImplicitReward(spec, policy, ref, implicit["beta"], implicit["per_token"], hardware)
    model = load_scorer(spec, frozen, tokenizer, device).requires_grad_(False)
    return CheckpointReward(spec, model, reading_of(spec, tokenizer), hardware)


def reading_of(path: str, tokenizer: PreTrainedTokenizerBase) -> Reading:
    """How the scores of a reward folder are read, by its stage.json."""
    head = (read_manifest(path) or {}).get("head", {})
    end = head.get("step_end")
    cutter = None if end is None else StepCutter(tokenizer, end)
    return Reading(level_of(path), head.get("aggregate"), cutter)
