"""The steps of a response: joined, and where they end in its tokens."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.kinds import Stepwise, cut_steps
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

    def joined(self, row: Stepwise, join: str) -> str:
        """The response whose steps a row judges.

        Raises:
            UserError: joined, they are cut elsewhere.
        """
        text = join.join(row.steps)
        ours = list(accumulate(len(step) + len(join) for step in row.steps))[:-1]
        theirs = list(accumulate(map(len, cut_steps(text, self.step_end))))[:-1]
        apart = zip(ours, theirs, strict=False)
        if len(ours) != len(theirs) or not all(0 <= a - b <= len(join) for a, b in apart):
            raise UserError(
                f"{row.source}: these {len(row.steps)} steps, joined by data.step_join={join!r}, "
                f"are not those that data.step_end={self.step_end!r} ends ({len(theirs) + 1} steps)"
            )
        return text

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The steps as text, as many as `ends` finds."""
        return cut_steps("".join(self._token_texts.of(ids)), self.step_end) or [""]
