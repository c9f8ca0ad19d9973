"""What is known of each token of a response, in the lines of samples.jsonl."""

from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_cli.data.token_texts import TokenTexts
from rlhf_cli.reporting.metrics import TOKEN_VALUES, TOKENS, round_figures
from rlhf_cli.rollout.rollouts import Rollout

LOGPROBS = TOKEN_VALUES[0]
AT_MOST = 8192  # tokens of one step, or of one policy: some 300 kB of a file
DIGITS = 5  # of a value that colours a token

Values = Mapping[str, Tensor | None]
"""By name (len(response),) values of a response; None where there are none of that name."""


class TokenLines:
    """Makes the columns of lines from values of tokens, of few enough tokens for a file."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._texts = TokenTexts(tokenizer, special=True)

    def of(
        self, rollouts: Sequence[Rollout], values: Sequence[Values], at_most: int = AT_MOST
    ) -> list[dict[str, object]]:
        """The columns of each response: `tokens`, their texts, and beside it what is known of them.

        The first responses have them, until there are `at_most` tokens; of the one that goes beyond
        its first tokens are told. A response without any value has none of these columns.
        """
        lines: list[dict[str, object]] = []
        for rollout, own in zip(rollouts, values, strict=True):
            ids = rollout.tokens.response[:at_most]
            known = {name: each.tolist() for name, each in own.items() if each is not None}
            if rollout.logprobs:
                known = {LOGPROBS: rollout.logprobs, **known}
            columns: dict[str, object] = {}
            if ids and known:
                columns[TOKENS] = self._texts.of(ids)
                for name, each in known.items():
                    columns[name] = round_figures(each[: len(ids)], DIGITS)
                at_most -= len(ids)
            lines.append(columns)
        return lines
