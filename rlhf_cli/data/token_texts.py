"""What each token of a response adds to its text."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # how tokenizers decode a part of a character
BYTES_OF_A_CHARACTER = 4  # at most, in UTF-8


class TokenTexts:
    """The texts of tokens, which together are the text of all of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special: bool = False) -> None:
        """`special`: whether special tokens, such as the end of a turn, have a text too."""
        self.tokenizer, self._special = tokenizer, special
        self._anchor = tokenizer("a", add_special_tokens=False).input_ids
        self._pieces: dict[tuple[int, ...], str] = {}

    def of(self, ids: Sequence[int]) -> list[str]:
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
        if pending:  # the response ends inside a character
            texts[-1] = self._text(pending)
        return texts

    def _text(self, ids: tuple[int, ...]) -> str:
        """The text of tokens, decoded after another one, lest a leading space be lost."""
        if ids not in self._pieces:
            alone, after = (
                self.tokenizer.decode(
                    each,
                    skip_special_tokens=not self._special,
                    clean_up_tokenization_spaces=False,
                )
                for each in (self._anchor, [*self._anchor, *ids])
            )
            self._pieces[ids] = str(after).removeprefix(str(alone))
        return self._pieces[ids]
