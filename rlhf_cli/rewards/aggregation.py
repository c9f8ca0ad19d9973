"""How the scores of a reward model, of steps or tokens, become one number per response."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_cli.config.schema.hardware import Hardware
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.step_cutter import StepCutter
from rlhf_cli.folders.manifest import RESPONSE, STEP, level_of, read_manifest
from rlhf_cli.models.score import scores_of, token_scores_of


@dataclass
class Aggregation:
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
        if self.level == STEP:
            per_token = self.step_scores(scorer, sequences, hardware)
        else:
            per_token = token_scores_of(scorer, sequences, hardware)
        return torch.stack([aggregated(scores, self.aggregate) for scores in per_token])

    def step_scores(
        self, scorer: nn.Module, sequences: Sequence[Tokens], hardware: Hardware
    ) -> list[Tensor]:
        """(n_i,) raw scores of the steps of each response."""
        assert self.cutter is not None
        ends = [self.cutter.ends(sequence.response) for sequence in sequences]
        per_token = token_scores_of(scorer, sequences, hardware)
        return [scores[end] for scores, end in zip(per_token, ends, strict=True)]


def aggregated(scores: Tensor, how: str | None) -> Tensor:
    """The score of a response from those within it: (N,) -> ()."""
    if how == "product":
        return nn.functional.logsigmoid(scores).sum()
    if how == "min":
        return scores.min()
    return scores.sum() if how == "sum" else scores.mean()


def aggregation_of(path: str, tokenizer: PreTrainedTokenizerBase) -> Aggregation:
    """How the scores of a reward folder become one number, by its stage.json."""
    head = (read_manifest(path) or {}).get("head", {})
    end = head.get("step_end")
    cutter = None if end is None else StepCutter(tokenizer, end)
    return Aggregation(level_of(path), head.get("aggregate"), cutter)
