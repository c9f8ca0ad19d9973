"""Where the steps of a response end, in its tokens."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from rlhf_cli.data.kinds import cut_steps

UNFINISHED = "\ufffd"  # how tokenizers decode a part of a character
BYTES_OF_A_CHARACTER = 4  # at most, in UTF-8


class StepCutter:
    """Finds the tokens that end the steps of a response, by a regular expression over its text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, step_end: str) -> None:
        self.tokenizer = tokenizer
        self.step_end = step_end
        self._anchor = tokenizer("a", add_special_tokens=False).input_ids
        self._pieces: dict[tuple[int, ...], str] = {}

    def ends(self, ids: Sequence[int]) -> list[int]:
        """The place of the last token of each step; the last step ends with the response.

        A token with a blank before the first word of the next step is of that step.
        """
        pieces = self._texts(ids)
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
        return cut_steps("".join(self._texts(ids)), self.step_end) or [""]

    def _texts(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text; a character of several tokens comes with its last."""
        texts: list[str] = []
        pending: tuple[int, ...] = ()
        for id in ids:
            pending = (*pending, id)
            text = self._text(pending)
            if text.endswith(UNFINISHED) and len(pending) < BYTES_OF_A_CHARACTER:
                texts.append("")
            else:
                texts.append(text)
                pending = ()
        return texts

    def _text(self, ids: tuple[int, ...]) -> str:
        """The text of tokens, decoded after another one, lest a leading space be lost."""
        if ids not in self._pieces:
            alone, after = (
                self.tokenizer.decode(
                    each, skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
                for each in (self._anchor, [*self._anchor, *ids])
            )
            self._pieces[ids] = str(after).removeprefix(str(alone))
        return self._pieces[ids]
