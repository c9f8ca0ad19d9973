"""Text becomes token ids here and nowhere else: boundary, loss, EOS, limits.

A prompt is tokenised alone, so that it has the same ids in training and in sampling; a response is
tokenised as it stands after it (data/text_ids.py).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.data import Data
from rlhf_cli.data.cutting import Cutter
from rlhf_cli.data.items import Answers, Encoded, EncodedPrompt, Tokens
from rlhf_cli.data.kinds import (
    Demonstration,
    Feedback,
    Judgement,
    Preference,
    Prompt,
    Ranking,
    Reply,
    Stepwise,
    Text,
)
from rlhf_cli.data.learnt_replies import LearntReplies
from rlhf_cli.data.limits import Lengths, Limits
from rlhf_cli.data.step_cutter import StepCutter
from rlhf_cli.data.templates import CHAT, continues
from rlhf_cli.data.text_ids import TextIds
from rlhf_cli.data.writing import RowWriter, Written


class Encoder:
    """Tokenises rows for one tokenizer and one data config.

    `notes()` counts what was cut, dropped and not learnt; counts add up over calls.

    ids: of texts, without rows.
    limits, lengths: how long prompts and responses may be, and how long those so far were.
    replaces_template: whether data.chat_template stands for another one of the tokenizer's own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        data: Data,
        context: int | None = None,
        room: int = 0,
        prefix: str = "",
    ) -> None:
        """Raises UserError where the tokenizer lacks an EOS, or a template that data asks for.

        Args:
            context: positions of the model; None where nobody knows.
            room: of those, what prompts must leave for responses that are sampled.
            prefix: stands before every prompt; data's limit is on prompts without one.
        """
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} has no EOS token, and no generation "
                "config names one; set eos_token in its tokenizer_config.json"
            )
        self.tokenizer, self.data = tokenizer, data
        self.replaces_template = bool(data.chat_template and tokenizer.chat_template)
        self._eos_id = tokenizer.eos_token_id
        self._prefix = prefix
        own = None if prefix else data.max_prompt_tokens
        self.limits = Limits.of(replace(data, max_prompt_tokens=own), context, room)
        self.lengths = Lengths()
        self.ids = TextIds(tokenizer)
        self._counts: Counter[str] = Counter()
        self._learnt = LearntReplies(data.loss_on, self._counts, self.lengths)
        self._writer = RowWriter(tokenizer, data, prefix, self.ids, self._learnt, self._counts)
        self._cutter = Cutter(data, bool(prefix), self.limits, self.ids, self.lengths, self._counts)
        self._others: set[int] = set()  # ids that end responses of the model so far
        self._taught: set[int] = set()  # ids with which replies end
        self._inside: set[int] = set()  # ids that stand within replies

    # ------------------------------------------------------------------ rows

    def items(self, rows: Sequence[Any], kind: type) -> Sequence[Encoded]:
        """Rows of a kind as what is made of them; those that are dropped are absent."""
        if kind is Prompt:
            return self.prompts(rows)
        return self.demonstrations(rows) if kind in (Demonstration, Text) else self.answers(rows)

    def prompts(self, rows: Sequence[Prompt]) -> list[EncodedPrompt]:
        """The rows that are kept, each with the ids of its prompt.

        Raises:
            UserError: a prompt is longer than the limit and data.long_prompts is error.
        """
        self.lengths.rows += len(rows)
        texts = [self._writer.write(row, []) for row in rows]
        limited = zip(rows, self._prompts(texts, rows), strict=True)
        return [(row, ids) for row, ids in limited if ids is not None]

    def demonstrations(self, rows: Sequence[Demonstration | Text]) -> list[Tokens]:
        """Sequences to imitate; of plain text all tokens, of demonstrations the replies."""
        texts = [row for row in rows if isinstance(row, Text)]
        self.lengths.rows += len(rows) - len(texts)
        shown = [
            row
            for each in rows
            if isinstance(each, Demonstration)
            if (row := self._learnt.up_to_last(each))
        ]
        written = [self._writer.write(row, [row.completion], learn=True) for row in shown]
        prompts = self._prompts(written, shown)
        responses = self._responses(written, prompts, shown)
        sequences = []
        for row, text, prompt, replies in zip(shown, written, prompts, responses, strict=True):
            if prompt is not None and replies is not None:
                sequences.append(self._with_loss(row, text, prompt, replies[0]))
        return sequences + self.texts(texts)

    def texts(self, rows: Sequence[Text]) -> list[Tokens]:
        """Plain text, in as many sequences as it takes.

        The first begins with the BOS, or is predicted from its first token where there is none; a
        further one is predicted from the last token of the one before, and no token is lost.
        """
        limit = self.limits.document
        self.lengths.rows += len(rows)
        sequences = []
        written = [self._writer.document(row.text) for row in rows]
        found = self.ids.of_each([text for text, _ in written])
        for row, (_, start), own in zip(rows, written, found, strict=True):
            ids = [*start, *own, self._eos_id]
            first = max(1, len(start))
            step = len(ids) if limit is None else max(1, limit - first)
            if len(ids) - first > step:
                self._counts[f"texts of more than {limit} tokens cut into several sequences"] += 1
            for place in range(first, len(ids), step):
                prompt = ids[:first] if place == first else ids[place - 1 : place]
                sequences.append(Tokens(prompt, ids[place : place + step], row.source))
        return sequences

    def answers(self, rows: Sequence[Judgement]) -> list[Answers]:
        """The responses that each row judges, with their shared prompt.

        Raises:
            UserError: the steps of a row are not the steps into which data.step_end cuts it.
        """
        self.lengths.rows += len(rows)
        replies = [self._judged(row) for row in rows]
        earlier = sum(
            turn["role"] == "assistant"
            for row in rows
            if not isinstance(row.prompt, str)
            for turn in row.prompt[: len(row.prompt) - continues(row.prompt)]
        )
        if earlier:
            what = "earlier replies of dialogues carry no loss: a row judges its last reply"
            self._counts[what] += earlier
        written = [self._writer.write(row, each) for row, each in zip(rows, replies, strict=True)]
        prompts = self._prompts(written, rows)
        responses = self._responses(written, prompts, rows)
        items = []
        for row, prompt, ids in zip(rows, prompts, responses, strict=True):
            if prompt is None or ids is None or self._cutter.made_equal(row, ids):
                continue
            item = Answers(prompt, ids, row)
            if isinstance(row, Stepwise):
                item = self._with_ends(item)
                if not item.ends:
                    what = "responses whose first step exceeds max_response_tokens: drop"
                    self._counts[what] += 1
                    limit = f"data.max_response_tokens={self.limits.given}"
                    self.lengths.drop(row, f"the first step of a response is longer than {limit}")
                    continue
            items.append(item)
        return items

    def written(
        self, rows: Sequence[Prompt], responses: list[str], ended: Sequence[bool]
    ) -> list[Tokens]:
        """Responses that come as text, with their prompts; one that has not ended has no EOS.

        An empty one keeps it, lest nothing be left.
        """
        texts = [
            self._writer.write(row, [response], sampled=True)
            for row, response in zip(rows, responses, strict=True)
        ]
        prompts = self.ids.of_each([text.prompt for text in texts])
        replies = self.ids.continued(
            [text.prompt for text in texts], [text.responses[0] for text in texts], None
        )
        sequences = []
        for row, text, prompt, ids, done in zip(rows, texts, prompts, replies, ended, strict=True):
            ids = self._ended(ids, text.chat)
            start = [] if text.chat else self.ids.before
            response = ids if done or len(ids) == 1 else ids[:-1]
            sequences.append(Tokens([*start, *prompt], response, row.source))
        return sequences

    def shown(self, row: Prompt | Demonstration) -> Written:
        """A prompt as its template writes it, without a response."""
        return self._writer.write(row, [])

    def _judged(self, row: Judgement) -> Sequence[Reply]:
        """The responses that a row judges."""
        if isinstance(row, Preference):
            return [row.chosen, row.rejected]
        if isinstance(row, Ranking):
            return row.responses
        if isinstance(row, Feedback):
            return [row.completion]
        return [self.step_cutter.joined(row, self.data.step_join)]

    def _with_ends(self, item: Answers) -> Answers:
        """Steps with their last tokens; a step that the length limit cut has none."""
        (response,) = item.responses
        ends = self.step_cutter.ends(response)
        if response[-1] not in self.stop_ids:
            return replace(item, ends=ends[:-1])
        if len(ends) != len(item.row.steps):
            raise UserError(
                f"{item.row.source}: the tokenizer of {self.ids.name} loses what "
                f"ends a step: {len(ends)} of {len(item.row.steps)} steps are found in its tokens"
            )
        return replace(item, ends=ends)

    @cached_property
    def step_cutter(self) -> StepCutter:
        """Finds steps by data.step_end."""
        return StepCutter(self.tokenizer, self.data.step_end)

    # ------------------------------------------------------------------ ids

    def _prompts(self, texts: Sequence[Written], rows: Sequence[Any]) -> list[list[int] | None]:
        """The ids of each prompt, within the limit; None drops its row."""
        limit = self.limits.prompt
        read = self.ids.ends if self._cutter.long_prompts == "cut" else self.ids.heads
        found = read([text.prompt for text in texts], limit)
        before = self.ids.before
        return [
            self._cutter.prompt(ids if text.chat else [*before, *ids], text, row)
            for ids, text, row in zip(found, texts, rows, strict=True)
        ]

    def _responses(
        self,
        texts: Sequence[Written],
        prompts: Sequence[list[int] | None],
        rows: Sequence[Any],
    ) -> list[list[list[int]] | None]:
        """The ids of each row's responses, ended and within the limit; None drops the row."""
        kept = [text for text, prompt in zip(texts, prompts, strict=True) if prompt is not None]
        befores = [text.prompt for text in kept for _ in text.responses]
        flat = [response for text in kept for response in text.responses]
        ids = iter(self.ids.continued(befores, flat, self.limits.longest_response))
        limited: list[list[list[int]] | None] = []
        for text, prompt, row in zip(texts, prompts, rows, strict=True):
            if prompt is None:
                limited.append(None)
                continue
            own = [self._ended(next(ids), text.chat) for _ in text.responses]
            self._watch(own, self.limits.response(len(prompt)))
            limited.append(self._cutter.responses(own, self.limits.response(len(prompt)), row))
        return limited

    def _with_loss(
        self, row: Demonstration, text: Written, prompt: list[int], response: list[int]
    ) -> Tokens:
        """The sequence of a demonstration, in which the prompt ends before the first loss."""
        if text.spans is None:
            return Tokens(prompt, response, row.source)
        _, inside = self.ids.with_mask(text.prompt, text.spans)
        inside = inside[len(inside) - len(prompt) :]  # a long prompt has lost its start
        own = [True] * len(response)
        start, end = text.spans[-1]
        if start > len(text.prompt) or end < len(text.prompt) + len(text.responses[0]):
            own = self._own_loss(text, start, end, len(response))
        loss = [*inside, *own]
        first = max(1, loss.index(True)) if True in loss else len(prompt)
        ids = [*prompt, *response]
        mask = loss[first:]
        return Tokens(ids[:first], ids[first:], row.source, None if all(mask) else mask)

    def _own_loss(self, text: Written, start: int, end: int, count: int) -> list[bool]:
        """Which of the `count` tokens of a response begin in its marked part; an EOS does."""
        _, before = self.ids.with_mask(text.prompt, [])
        _, whole = self.ids.with_mask(text.prompt + text.responses[0], [(start, end)])
        own = whole[len(before) :][:count]
        return own + [True] * (count - len(own))

    # ------------------------------------------------------------------ what ends responses

    @property
    def end_of_turn(self) -> int:
        """What ends a reply: EOS, or the chat template's own token once one is in use."""
        end = self._writer.end_of_turn
        return self._eos_id if end is None else end

    def ends_with(self, ids: Iterable[int]) -> None:
        """Take over the ids that end responses of the model that a run starts from."""
        self._others |= set(ids)

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end a response: EOS, the template's end of turn, what other replies end with,
        and what the model ended with before, unless it stands within replies.
        """
        others = (self._others | self._taught) - self._inside
        return sorted({self._eos_id, self.end_of_turn, *others})

    def _ended(self, ids: list[int], chat: bool) -> list[int]:
        """A response with its EOS, if it does not end with a token of its template that ends it."""
        last = ids[-1] if ids else None
        if last == self.end_of_turn or (chat and last in self.ids.special_ids):
            return ids
        return [*ids, self._eos_id]

    def _watch(self, responses: list[list[int]], limit: int | None) -> None:
        """Note with which ids replies end, and which of those that could are within them."""
        ends = self.ids.special_ids | self._others
        for ids in responses:
            self._inside |= ends.intersection(ids[:-1])
            if limit is None or len(ids) <= limit:  # a longer one was not read to its end
                self._taught.add(ids[-1])

    # ------------------------------------------------------------------ what a run says

    def notes(self) -> list[str]:
        """What was cut, dropped or not learnt since the last call, a line each."""
        lines = [f"{count} {what}" for what, count in self._counts.items()]
        self._counts.clear()
        return lines

    def seen(self) -> dict[str, Any]:
        """What it knows of the rows so far, as JSON can say it, for `remember`."""
        return {
            "dialogues": sorted(self._writer.kinds),
            "longest": [self.lengths.prompt, self.lengths.response],
            "ends": sorted(self._taught),
            "inside": sorted(self._inside),
        }

    def remember(self, seen: dict[str, Any]) -> None:
        """Take over what an encoder like this one has `seen` of rows that were kept."""
        self._writer.kinds |= set(seen["dialogues"])
        self._taught |= set(seen["ends"])
        self._inside |= set(seen["inside"])
        prompt, response = seen["longest"]
        self.lengths.prompt = max(self.lengths.prompt, prompt)
        self.lengths.response = max(self.lengths.response, response)

    def identity(self) -> str:
        """A hash of all of it that decides tokens, beside data: tokenizer, template and limits."""
        said = [
            self.tokenizer.backend_tokenizer.to_str(),
            json.dumps(self.tokenizer.special_tokens_map, default=str),
            str(self.tokenizer.chat_template),
            repr(self.limits),
            self._prefix,
            repr(sorted(self._others)),
        ]
        return hashlib.sha256("\0".join(said).encode()).hexdigest()

    def report(self) -> list[str]:
        """Once all rows are read: what was cut, dropped or not learnt, and how long rows are.

        Raises:
            UserError: as `check_lengths`.
        """
        self.check_lengths()
        how = "by the chat template" if self.template == CHAT else f"as {self.template!r}"
        if self.template != CHAT and True in self._writer.kinds:
            how += ", messages by the chat template"
        written = [f"prompts are written {how}"] if self._writer.kinds else []
        lost = sorted(self._others - set(self.stop_ids))
        tokens = ", ".join(map(str, self.tokenizer.convert_ids_to_tokens(lost)))
        ends = [f"within replies stands what ended responses before, and ends none now: {tokens}"]
        return [
            *(*written, *(ends if lost else []), *self.notes()),
            *self.lengths.lines(self.limits),
        ]

    def check_lengths(self) -> None:
        """Once all rows are read: they are not cut more than anybody wants, and the template shows
        nothing that no row has.

        Raises:
            UserError: they are, or it does.
        """
        self.lengths.check(self.data, self.limits)
        self._writer.check_columns()

    def text(self, ids: Sequence[int]) -> str:
        """Readable text of response ids."""
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    @property
    def template(self) -> str:
        """How prompts are written, for those who read the model later."""
        return self._writer.template
