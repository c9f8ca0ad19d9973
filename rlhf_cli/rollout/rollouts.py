"""A prompt's row with one response to it, as every engine gives it."""

from dataclasses import dataclass

from rlhf_cli.data.items import Tokens
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.rollout.decode import Completion
from rlhf_cli.rollout.sampling import Sampling


@dataclass
class Rollout:
    """A prompt row, one response to it, and how the response came to an end.

    logprobs: of each response token, at the temperature that it was drawn at.
    finish_reason: eos, length (max_tokens reached) or stop (a stop string).
    """

    row: Prompt
    tokens: Tokens
    logprobs: list[float]
    finish_reason: str
    text: str

    @property
    def ended(self) -> bool:
        """Whether the response ended by itself rather than at max_tokens."""
        return self.finish_reason != "length"


def as_rollout(
    row: Prompt, prompt: list[int], completion: Completion, encoder: Encoder, sampling: Sampling
) -> Rollout:
    """The completion as readable text, cut before the earliest stop string."""
    text = encoder.text(completion.ids)
    if completion.finish_reason == "stop":
        text = text[: min(text.index(string) for string in sampling.stop if string in text)]
    tokens = Tokens(prompt, completion.ids, row.source)
    return Rollout(row, tokens, completion.logprobs, completion.finish_reason, text)
