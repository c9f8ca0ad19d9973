"""Decoding options, in the order that transformers applies them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlhf_cli.config.schema import Decoding


@dataclass
class Sampling:
    """How tokens are chosen; the meaning of each field stands in config/schema.py (Decoding).

    absent: ids that stand for no token, as rows do that pad an unembedding; they are never drawn.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    beams: int = 1
    length_penalty: float = 1.0
    absent: tuple[int, ...] = ()

    @classmethod
    def of(cls, algo: Decoding) -> "Sampling":
        """The sampling options of a decoding config."""
        return cls(
            max_tokens=algo.sampled_tokens,
            temperature=algo.temperature,
            top_k=algo.top_k,
            top_p=algo.top_p,
            min_p=algo.min_p,
            repetition_penalty=algo.repetition_penalty,
            min_tokens=algo.min_tokens,
            stop=tuple(algo.stop),
            beams=algo.beams,
            length_penalty=algo.length_penalty,
        )

    @property
    def unfiltered(self) -> bool:
        """Whether samples come from the model's own distribution at some temperature."""
        plain = Sampling(self.max_tokens, self.temperature, stop=self.stop, absent=self.absent)
        return self == plain and self.temperature > 0

    @property
    def scored_at(self) -> float:
        """The temperature at which log-probs are reported: the sampled one, 1 for greedy."""
        return self.temperature or 1.0


def filter_logits(
    logits: Tensor, seen: Tensor, generated: int, sampling: Sampling, stop_ids: list[int]
) -> Tensor:
    """Logits after repetition penalty, minimum length, temperature, top-k, top-p and min-p.

    Args:
        logits: (B, V) raw logits.
        seen: (B, S) ids of prompt and response so far.
        generated: response tokens so far.

    Returns:
        (B, V), -inf where a token is ruled out; at least one token is left.
    """
    if sampling.repetition_penalty != 1.0:
        logits = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(seen, logits)
    ruled_out = [*sampling.absent, *(stop_ids if generated < sampling.min_tokens else ())]
    if ruled_out:
        logits = logits.clone()
        logits[:, ruled_out] = -torch.inf
    if sampling.temperature == 0:
        return logits
    warpers = LogitsProcessorList()
    if sampling.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0.0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    filtered: Tensor = warpers(seen, logits)  # type: ignore[arg-type]
    return filtered


def choose(logits: Tensor, noise: Tensor, greedy: bool) -> Tensor:
    """One token per row, by inverting the cumulative distribution at `noise`.

    The choice depends on the row's own logits and noise alone, so it is the same in any batch.

    Args:
        logits: (B, V) filtered logits.
        noise: (B,) uniform in [0, 1).
        greedy: take the likeliest token instead.

    Returns:
        (B,) ids.
    """
    if greedy:
        return logits.argmax(-1)
    cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
    target = noise.double()[:, None] * cumulative[:, -1:]
    return (cumulative <= target).sum(-1).clamp(max=logits.shape[-1] - 1)
