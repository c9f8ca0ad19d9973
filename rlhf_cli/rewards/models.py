"""Rewards that models give: a reward model of responses, steps or tokens, or a policy of dpo."""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_cli.config.schema.data import Data
from rlhf_cli.config.schema.hardware import Hardware
from rlhf_cli.config.schema.keys import AUTO
from rlhf_cli.config.schema.models import FrozenModel
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.text_ids import beginning_of
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.folders.manifest import (
    RESPONSE,
    STEP,
    accuracy_by_source,
    implicit_reward_of,
    level_of,
    read_manifest,
    reference_folder,
)
from rlhf_cli.models.decoder import unwrap
from rlhf_cli.models.heads import scalar_head
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.positions import positions_of
from rlhf_cli.models.score import logprobs_of, states_of
from rlhf_cli.models.scorers import load_scorer
from rlhf_cli.models.tokenizers import load_tokenizer, same_ids
from rlhf_cli.rewards.aggregation import Aggregation, aggregation_of
from rlhf_cli.rewards.base import Cut, Require, RewardSource
from rlhf_cli.rewards.reading import Reader, end_as_padding, own_data
from rlhf_cli.rewards.specs import judges_steps, models_of
from rlhf_cli.rollout.rollouts import Rollout


class ModelReward(RewardSource):
    """A reward that a model gives: (raw score - mean) / std, by the statistics of its stage.json.

    A reward model of another tool has no statistics; its raw score is used.
    """

    def __init__(self, reader: Reader, hardware: Hardware) -> None:
        super().__init__(reader.path)
        self.path = reader.path
        self.reader = reader
        self.hardware = hardware
        self.mean, self.std = statistics_of(self.path)

    @property
    def shares_vocabulary(self) -> bool:
        """Whether the policy's ids mean the same to this model."""
        return self.reader.shares_vocabulary

    @abstractmethod
    def raw(self, sequences: Sequence[Tokens]) -> Tensor:
        """(N,) scores of responses in the model's own ids, before normalisation."""

    def check(self, rows: Sequence[Prompt], require: Require, role: str) -> None:
        """The model puts better above worse more often than not on its own held-out rows, and is
        not wrong on those of one source: sides that one round of labels has turned round hide among
        the rows of all.
        """
        self.reader.check(rows)
        metrics = (read_manifest(self.path) or {}).get("metrics", {})
        accuracy = metrics.get("eval/auc", metrics.get("eval/accuracy"))
        if accuracy is not None:
            require(
                f"{role}_accuracy",
                accuracy,
                accuracy > 0.5,
                f"{self.path} is no better than a coin on its own held-out rows; train it longer, "
                "on more rows, or check which side is chosen",
            )
        for source, of in accuracy_by_source(metrics).items():
            require(
                f"{role}_accuracy_high/{source}",
                of["accuracy_high"],
                of["accuracy_high"] > 0.5,
                f"{self.path} is worse than a coin on the held-out rows of {source}; check which "
                "side is chosen there",
            )

    def score(self, rollouts: Sequence[Rollout]) -> Tensor:
        """(B,) normalised scores of prompt and response."""
        return (self.raw_of(rollouts) - self.mean) / self.std

    def raw_of(self, rollouts: Sequence[Rollout]) -> Tensor:
        """(B,) scores before normalisation.

        NaN for a response that exceeds the context, infinite for one that the model failed at.
        """
        scores = torch.full((len(rollouts),), math.nan)
        sequences = self.reader.sequences(rollouts)
        fitting = [(i, sequence) for i, sequence in enumerate(sequences) if sequence is not None]
        if fitting:
            raw = self.raw([each for _, each in fitting]).float()
            good = raw.isfinite()
            scores[[i for i, _ in fitting]] = raw.masked_fill(~good, math.inf)
            failed = [each for (_, each), fine in zip(fitting, good, strict=True) if not fine]
            self.reader.tell_failures(failed, len(rollouts))
        return scores


class CheckpointReward(ModelReward):
    """A reward model: a classifier with one label, at the level that its stage.json says."""

    def __init__(
        self, reader: Reader, model: nn.Module, aggregation: Aggregation, hardware: Hardware
    ) -> None:
        super().__init__(reader, hardware)
        self.model = model
        self.aggregation = aggregation
        if aggregation.level == STEP:
            assert aggregation.cutter is not None
            self.step_end = aggregation.cutter.step_end

    def raw(self, sequences: Sequence[Tokens]) -> Tensor:
        """(N,) scores of the head."""
        return self.aggregation.scores(self.model, sequences, self.hardware)

    def states(self, rollouts: Sequence[Rollout]) -> list[tuple[float, Tensor]]:
        """Of each response its score before normalisation, and (d,) what the head reads at its end.

        NaN for a response that exceeds the context.
        """
        unknown = math.nan, torch.full((scalar_head(unwrap(self.model)).in_features,), math.nan)
        found = [unknown] * len(rollouts)
        sequences = enumerate(self.reader.sequences(rollouts))
        fitting = {i: sequence for i, sequence in sequences if sequence is not None}
        if fitting:
            raw, states = states_of(self.model, list(fitting.values()), self.hardware)
            for i, score, state in zip(fitting, raw.tolist(), states, strict=True):
                found[i] = score, state
        return found

    def score_steps(self, rollouts: Sequence[Rollout], cuts: Sequence[Cut]) -> list[Tensor]:
        """(n_i,) probabilities that the steps are right, as the head was trained to say them.

        All are unknown where the response exceeds the context, or where the model's own tokenizer
        finds other steps in the text; all are infinite where it failed at one.
        """
        probabilities = [torch.full((len(cut.ends),), math.nan) for cut in cuts]
        sequences = self.reader.sequences(rollouts)
        fitting = [(i, sequence) for i, sequence in enumerate(sequences) if sequence is not None]
        raw = self.aggregation.step_scores(self.model, [each for _, each in fitting], self.hardware)
        others, failed = 0, []
        for (i, sequence), scores in zip(fitting, raw, strict=True):
            if not scores.isfinite().all():
                probabilities[i].fill_(math.inf)
                failed.append(sequence)
            elif len(scores) == len(probabilities[i]):
                probabilities[i] = scores.float().sigmoid()
            else:
                others += 1
        self.reader.tell_failures(failed, len(rollouts))
        self.reader.tell("responses have other steps in its own tokens", others, len(rollouts))
        return probabilities


class ImplicitReward(ModelReward):
    """A policy trained by dpo: beta log(pi / ref) of the response (2305.18290 eq. 5).

    A loss that averages over tokens has the mean in place of the sum.
    """

    def __init__(
        self,
        reader: Reader,
        policy: nn.Module,
        reference: nn.Module,
        beta: float,
        per_token: bool,
        hardware: Hardware,
    ) -> None:
        super().__init__(reader, hardware)
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


def log_odds_of(spec: str) -> float | None:
    """How many log-odds of one response over another a difference of 1 in a reward is: the standard
    deviation by which the scores of a model are divided, of which a difference is log-odds under
    Bradley-Terry. None of a sum, a rule, what judges steps, and what was fitted to the numbers of
    people, whose unit is theirs.
    """
    if models_of(spec) != [spec] or judges_steps(spec):
        return None
    fitted_to = (read_manifest(spec) or {}).get("head", {}).get("target")
    return None if fitted_to == "score" else statistics_of(spec)[1]


def load_model_reward(
    path: str,
    model: FrozenModel,
    data: Data,
    hardware: Hardware,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    base: nn.Module | None,
) -> ModelReward:
    """The reward that a folder or hub id gives, to be read by a policy with `tokenizer`.

    Args:
        base: the policy, whose weights a reward adapter on the same base shares.

    Raises:
        UserError: the folder holds no reward, or the reference of a policy is gone or has changed.
    """
    frozen = FrozenModel(
        dtype=model.dtype, trust_remote_code=model.trust_remote_code, attention=AUTO
    )
    own = load_tokenizer(path, frozen)
    encoder = None
    if same_ids(own, tokenizer):
        own = tokenizer
    else:
        encoder = Encoder(own, own_data(path, data))
    implicit = implicit_reward_of(path)
    if implicit is not None:
        reference = reference_folder(path, implicit)
        policy, ref = (
            load_policy(folder, frozen, own, device).requires_grad_(False)
            for folder in (path, reference)
        )
        reader = Reader(path, positions_of(policy), beginning_of(own), encoder)
        beta, per_token = implicit["beta"], implicit["per_token"]
        return ImplicitReward(reader, policy, ref, beta, per_token, hardware)
    scorer = load_scorer(path, frozen, own, device, base).requires_grad_(False)
    padding = end_as_padding(path, own) if level_of(path) == RESPONSE else None
    reader = Reader(path, positions_of(scorer), beginning_of(own), encoder, padding)
    return CheckpointReward(reader, scorer, aggregation_of(path, own), hardware)
