"""Where the steps of a response end, in its tokens."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from rlhf_cli.data.kinds import cut_steps
from rlhf_cli.data.token_texts import TokenTexts


class StepCutter:
    """Finds the tokens that end the steps of a response, by a regular expression over its text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, step_end: str) -> None:
        self.tokenizer = tokenizer
        self.step_end = step_end
        self._token_texts = TokenTexts(tokenizer)

    def ends(self, ids: Sequence[int]) -> list[int]:
        """The place of the last token of each step; the last step ends with the response.

        A token with a blank before the first word of the next step is of that step.
        """
        pieces = self._token_texts.of(ids)
        steps = cut_steps("".join(pieces), self.step_end)
        seen = list(accumulate(map(len, pieces)))  # characters up to the end of each token
        ends = []
        for limit in list(accumulate(map(len, steps)))[:-1]:  # up to the end of each step
            place = bisect_left(seen, limit)
            inside = pieces[place][: limit - seen[place]] if seen[place] > limit else ""
            ends.append(place - 1 if place and inside.isspace() else place)
        return [*ends, len(ids) - 1]

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The steps as text, as many as `ends` finds."""
        return cut_steps("".join(self._token_texts.of(ids)), self.step_end) or [""]
