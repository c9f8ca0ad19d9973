"""One tokenizer's ids of texts: special tokens that rows spell, long ones, and where two meet."""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from rlhf_cli.config.errors import UserError

GUARD = "\U000f5e1f"  # of private use: it and one more stand for a special token that a row spells
FIRST = 0xF6000
PROBES = ("a", "the cat  sat.\nOn 12 mats", " a\u00e9\u4e2d")
ANCHORS = ("\n", ":", ".", "a")  # texts after which a response is tokenised as if after a prompt
WINDOW = 64  # characters before and after a boundary that are looked at
CHARACTERS, MORE = 8, 256  # of a text to look at for a token, and for all; few texts need more
FIRST_WORD = re.compile(r"\s*\S*")
BREAK = re.compile(r"(?<=\S)\s")
REMEMBERED = 10_000  # meetings of two texts, and short texts
SHORT = 100  # characters
AT_ONCE = 256  # texts for the tokenizer; what it makes of more fits no processor's cache

Span = tuple[int, int]
"""From the first character of a part of a text to the one after its last."""


class TextIds:
    """Text to ids without what a tokenizer adds around a text.

    control: the special tokens and the added ones, text -> id.
    special_ids: of those that are special; none stands for what is unknown.
    before: the ids that the tokenizer puts before a text of its own accord, such as one BOS.
    begin: those, or the BOS that it has but does not put there; begin_text: as a text spells them.
    name: of the tokenizer's folder, for messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.name = tokenizer.name_or_path or "the model that is built here"
        self._backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
        added = tokenizer.added_tokens_decoder
        self.control = {token.content: id for id, token in added.items() if token.content.strip()}
        special = {token.content for token in added.values() if token.special}
        special |= {token for token in tokenizer.all_special_tokens if token.strip()}
        self._special = sorted(special, key=len, reverse=True)
        self.special_ids: set[Any] = {tokenizer.convert_tokens_to_ids(token) for token in special}
        self.special_ids -= {tokenizer.unk_token_id, None}
        self._spelt = _any_of(self._special)
        self._controls = _any_of(sorted({*self.control, *special}, key=len, reverse=True))
        self._marks = {token: GUARD + chr(FIRST + i) for i, token in enumerate(self._special)}
        swapped = {mark: token for token, mark in self._marks.items()} | self._marks
        self._swapped = swapped
        self._swaps = _any_of(sorted(swapped, key=len, reverse=True))
        self._starts: dict[tuple[str, str], tuple[str, int]] = {}
        self._known: dict[str, list[int]] = {}
        self._as_called = self._backend is None
        self._as_called = any(
            self._called([text]) != self._batch(self._backend, [text]) for text in PROBES
        )
        plain, whole = self.of("a"), list(tokenizer("a").input_ids)
        starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        self.before = whole[: next(starts, 0)]
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.begin: list[int] = self.before or bos
        self.begin_text = "".join(map(str, tokenizer.convert_ids_to_tokens(self.begin)))
        break_ids = self.of("\n")
        self._prefixes = self.of("\na")[len(break_ids) :] != plain

    # ------------------------------------------------------------------ ids

    def of(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.of_each([text])[0]

    def of_each(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; what `hide` has hidden in it is plain text."""
        hidden = [i for i, text in enumerate(texts) if GUARD in text]
        ids = self._remembered(texts)
        if not hidden:
            return ids
        swapped = [self._swap(texts[i]) for i in hidden]
        for i, own in zip(hidden, self._batch(self._without_special, swapped), strict=True):
            ids[i] = own
        return ids

    def _remembered(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; of a text that comes again, as prompts and short replies do, they
        are known.
        """
        if len(self._known) > REMEMBERED:
            self._known.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        found = dict(zip(new, self._batch(self._backend, new), strict=True))
        self._known |= {text: ids for text, ids in found.items() if len(text) <= SHORT}
        return [list(found[text] if text in found else self._known[text]) for text in texts]

    def with_mask(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
        """The ids of a text, and which of them write some of these characters.

        Raises:
            UserError: the tokenizer cannot tell.
        """
        if self._backend is None:
            raise UserError(
                f"the tokenizer of {self._tokenizer.name_or_path} is no fast one, so that which "
                "tokens are replies is not known; set data.loss_on=last"
            )
        backend = self._backend
        if GUARD in text:
            backend = self._without_special
            spans = [(len(self._swap(text[:a])), len(self._swap(text[:b]))) for a, b in spans]
            text = self._swap(text)
        backend.no_truncation()
        backend.no_padding()
        found = backend.encode(text, add_special_tokens=False)
        inside = [any(start < b and a < end for a, b in spans) for start, end in found.offsets]
        return found.ids, inside

    def heads(self, texts: Sequence[str], limit: int | None) -> list[list[int]]:
        """The ids of each text; of one with more than `limit`, at least the first limit + 1.

        A long text is cut at a blank, across which no tokenizer joins, before it is tokenised.
        """
        if limit is None:
            return self.of_each(texts)
        pieces = [_head(text, CHARACTERS * limit + MORE) for text in texts]
        ids = self.of_each(pieces)
        return self._longer(texts, pieces, ids, limit)

    def ends(self, texts: Sequence[str], limit: int | None) -> list[list[int]]:
        """The ids of each text; of one with more than `limit`, at least the last limit + 1."""
        if limit is None:
            return self.of_each(texts)
        pieces = [_end(text, CHARACTERS * limit + MORE) for text in texts]
        return self._longer(texts, pieces, self.of_each(pieces), limit)

    def _longer(
        self, texts: Sequence[str], pieces: list[str], ids: list[list[int]], limit: int
    ) -> list[list[int]]:
        """`ids` of the whole text where its piece has no more than `limit`."""
        short = [
            i for i, text in enumerate(texts) if len(pieces[i]) < len(text) and len(ids[i]) <= limit
        ]
        for i, own in zip(short, self.of_each([texts[i] for i in short]), strict=True):
            ids[i] = own
        return ids

    def _batch(self, backend: Tokenizer | None, texts: Sequence[str]) -> list[list[int]]:
        if backend is None or (self._as_called and backend is self._backend):
            return self._called(texts)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        return [
            found.ids
            for start in range(0, len(texts), AT_ONCE)
            for found in backend.encode_batch_fast(
                texts[start : start + AT_ONCE], add_special_tokens=False
            )
        ]

    def _called(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False).input_ids
        return ids

    # ------------------------------------------------------------------ where texts meet

    def continued(
        self, prompts: Sequence[str], responses: Sequence[str], limit: int | None
    ) -> list[list[int]]:
        """The ids of each response after its prompt, which is tokenised alone.

        They are those that the joined text has after the prompt's. Where joining would change the
        last ids of the prompt, the response is tokenised apart, without the blank that
        SentencePiece tokenizers put before a text. Which it is, the end of the prompt and the
        first word of the response decide: no tokenizer looks further than to a blank or a special
        token.

        Args:
            limit: as of `heads`.
        """
        ends = {prompt: self._end_of(prompt) for prompt in prompts}  # few differ within a row
        starts = [
            self._start(ends[prompt], FIRST_WORD.match(response)[0][:WINDOW])  # type: ignore[index]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        longest = limit and limit + max((skip for _, skip in starts), default=0)
        texts = [start + text for (start, _), text in zip(starts, responses, strict=True)]
        found = self.heads(texts, longest)
        return [ids[skip:] for ids, (_, skip) in zip(found, starts, strict=True)]

    def _start(self, end: str, word: str) -> tuple[str, int]:
        """What to put before a response for its ids to be right, and how many ids that has itself.

        Args:
            end: the end of its prompt.
            word: its first word.
        """
        known = self._starts.get((end, word))
        if known is None:
            if len(self._starts) > REMEMBERED:
                self._starts.clear()
            known = self._starts[end, word] = self._start_anew(end, word)
        return known

    def _start_anew(self, end: str, word: str) -> tuple[str, int]:
        before, joined, alone = self.of_each([end, end + word, word])
        if joined == before + alone:
            return "", 0
        if joined[: len(before)] == before:
            return end, len(before)
        for anchor in ANCHORS if self._prefixes else ():
            own, after = self.of_each([anchor, anchor + word])
            if after[: len(own)] == own:
                return anchor, len(own)
        return "", 0

    def _end_of(self, prompt: str) -> str:
        """The end of a prompt that decides how a response after it is tokenised."""
        window = prompt[-WINDOW:]
        start = -1
        for match in self._controls.finditer(window):
            start = match.start()
        if start >= 0:
            return window[start:]
        bare = window.rstrip()
        before = bare[: len(bare) - len(bare.split()[-1])].rstrip() if bare else ""
        return window[len(before) :] if before else prompt

    # ------------------------------------------------------------------ special tokens in rows

    def spelt(self, value: Any) -> int:
        """How many special tokens the texts in a value spell."""
        if isinstance(value, str):
            return len(self._spelt.findall(value)) if self._spelt.search(value) else 0
        if isinstance(value, dict):
            return sum(map(self.spelt, value.values()))
        return sum(map(self.spelt, value)) if isinstance(value, list) else 0

    def special_in(self, text: str) -> set[str]:
        """The special tokens that a text spells."""
        return set(self._spelt.findall(text))

    def hide(self, value: Any) -> Any:
        """The value with special tokens in its texts hidden from a template, and from `of_each`."""
        if isinstance(value, str):
            return self._spelt.sub(lambda match: self._marks[match.group()], value)
        if isinstance(value, dict):
            return {name: self.hide(each) for name, each in value.items()}
        return [self.hide(each) for each in value] if isinstance(value, list) else value

    def first_control(self, text: str) -> int | None:
        """Where the first special or added token in a text ends."""
        match = self._controls.search(text)
        return None if match is None else match.end()

    def _swap(self, text: str) -> str:
        """The template's special tokens under the names that only `_without_special` knows."""
        return self._swaps.sub(lambda match: self._swapped[match.group()], text)

    @cached_property
    def _without_special(self) -> Tokenizer:
        """The tokenizer with its special tokens under other names: their own are plain text."""
        if self._backend is None:
            raise UserError(
                f"the tokenizer of {self._tokenizer.name_or_path} is no fast one, so that special "
                "tokens in rows cannot be read as text; set data.special_tokens=keep"
            )
        state = json.loads(self._backend.to_str())
        renamed = self._marks
        for token in state["added_tokens"]:
            token["content"] = renamed.get(token["content"], token["content"])
        model = state["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {renamed.get(name, name): id for name, id in vocabulary.items()}
        else:  # of a unigram model: pairs of a piece and its score
            model["vocab"] = [[renamed.get(name, name), score] for name, score in vocabulary]
        if model.get("unk_token") is not None:
            model["unk_token"] = renamed.get(model["unk_token"], model["unk_token"])
        state["post_processor"] = None
        return Tokenizer.from_str(json.dumps(state))


def beginning_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids with which a tokenizer's texts begin, of its own accord or where a text says so."""
    return TextIds(tokenizer).begin


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


def _head(text: str, characters: int) -> str:
    """The text up to the first blank after so many characters; a short one whole."""
    if len(text) <= 2 * characters:
        return text
    match = BREAK.search(text, characters, 2 * characters)
    return text if match is None else text[: match.start()]


def _end(text: str, characters: int) -> str:
    """The text from a blank on, so many characters before its end; a short one whole."""
    if len(text) <= 2 * characters:
        return text
    match = BREAK.search(text, len(text) - 2 * characters, len(text) - characters)
    return text if match is None else text[match.start() :]
