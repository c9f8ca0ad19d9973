"""Text becomes token ids here and nowhere else: template, one BOS, boundary, EOS, limits.

Prompt and response are tokenised apart, so a prompt has the same ids in training and in sampling
and no token straddles the boundary.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema import Data
from rlhf_cli.data.kinds import (
    Demonstration,
    Feedback,
    Judgement,
    Preference,
    Prompt,
    Ranking,
    Stepwise,
    Text,
    Turns,
    cut_steps,
)
from rlhf_cli.data.step_cutter import StepCutter
from rlhf_cli.data.time_limit import time_limit


@dataclass
class Tokens:
    """One sequence: the ids of its prompt, BOS included, and of its response, EOS included.

    source: where its row stands, for messages.
    """

    prompt: list[int]
    response: list[int]
    source: str = field(default="", compare=False)
    loss: list[bool] | None = None

    @property
    def responses(self) -> list[list[int]]:
        """The response alone: a sequence is a group of one, as in Answers."""
        return [self.response]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def response_tokens(sequences: Sequence[Tokens]) -> int:
    """Tokens that carry loss: those of all responses."""
    return sum(len(sequence.response) for sequence in sequences)


EncodedPrompt = tuple[Prompt, list[int]]
"""A row to respond to, and the ids of its prompt."""


@dataclass
class Answers:
    """K responses to one prompt, in the order of the row that judges them.

    Prompt and responses as in Tokens; no response is empty.

    ends: for steps, the place of the last token of each step in the one response.
    """

    prompt: list[int]
    responses: list[list[int]]
    row: Any
    ends: list[int] = field(default_factory=list)

    @property
    def sequences(self) -> list[Tokens]:
        """Each response with the prompt."""
        return [Tokens(self.prompt, response, self.source) for response in self.responses]

    @property
    def source(self) -> str:
        """Where the row stands, for messages; empty of pairs that no row has."""
        return getattr(self.row, "source", "")

    def __len__(self) -> int:
        """The longest sequence, in tokens."""
        return len(self.prompt) + max(map(len, self.responses))


def responses_in(item: Answers) -> int:
    """Sequences that an item takes in a batch."""
    return len(item.responses)


class Encoder:
    """Tokenises rows for one tokenizer and one data config; `notes()` counts what was cut."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
        """Raises UserError where the tokenizer lacks an EOS, or a template that data asks for."""
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no EOS token")
        if data.template == "chat" and not tokenizer.chat_template:
            raise UserError(
                f"data.template=chat, but the tokenizer of {tokenizer.name_or_path} has no chat "
                'template; write one as data.template="...{prompt}..."'
            )
        self.tokenizer = tokenizer
        self.name = tokenizer.name_or_path or "the model that is built here"
        self.data = data
        adds_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        self.bos = [tokenizer.bos_token_id] if adds_bos else []
        self._counts: Counter[str] = Counter()
        self.end_of_turn = self._end_of_turn()

    # ------------------------------------------------------------------ rows

    def prompts(self, rows: Sequence[Prompt]) -> list[EncodedPrompt]:
        """The rows that are kept, each with the ids of its prompt.

        Raises:
            UserError: a prompt is longer than the limit and data.long_prompts is error.
        """
        limited = [self._limit_prompt(ids, row) for ids, row in self._prompt_ids(rows)]
        return [(row, ids) for row, ids in zip(rows, limited, strict=True) if ids is not None]

    def demonstrations(self, rows: Sequence[Demonstration | Text]) -> list[Tokens]:
        """Sequences to imitate; of plain text all tokens, of demonstrations the response."""
        texts = [row for row in rows if isinstance(row, Text)]
        demonstrations = [row for row in rows if isinstance(row, Demonstration)]
        replies = self._responses(demonstrations, [row.completion for row in demonstrations])
        pairs = zip(self._prompt_ids(demonstrations), replies, strict=True)
        sequences = [
            Tokens(prompt, response, row.source)
            for (ids, row), response in pairs
            if (prompt := self._limit_prompt(ids, row)) is not None
        ]
        return sequences + self.texts(texts)

    def texts(self, rows: Sequence[Text]) -> list[Tokens]:
        """Plain text: the BOS is the prompt, or the first token where there is none."""
        if not rows:
            return []
        limit = self.data.max_prompt_tokens + self.data.max_response_tokens
        sequences = []
        for row, text_ids in zip(rows, self._ids([row.text for row in rows]), strict=True):
            ids = [*self.bos, *text_ids, self.tokenizer.eos_token_id]
            if len(ids) > limit:
                self._counts["texts cut to max_prompt_tokens + max_response_tokens"] += 1
            sequences.append(Tokens(ids[:1], ids[1:limit], row.source))
        return sequences

    def answers(self, rows: Sequence[Judgement]) -> list[Answers]:
        """The responses that each row judges, with their shared prompt.

        Raises:
            UserError: the steps of a row are not the steps into which data.step_end cuts it.
        """
        texts = [self._judged(row) for row in rows]
        counts = [len(responses) for responses in texts]
        flat = [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]
        ids = iter(self._responses(flat, [text for responses in texts for text in responses]))
        items = []
        for (prompt, row), count in zip(self._prompt_ids(rows), counts, strict=True):
            responses = [next(ids) for _ in range(count)]
            if (prompt_ids := self._limit_prompt(prompt, row)) is not None:
                items.append(Answers(prompt_ids, responses, row))
        items = [
            self._with_ends(item) if isinstance(item.row, Stepwise) else item for item in items
        ]
        kept = [item for item in items if item.ends or not isinstance(item.row, Stepwise)]
        if len(kept) < len(items):
            what = "responses whose first step exceeds max_response_tokens: drop"
            self._counts[what] += len(items) - len(kept)
        if items and not kept:
            raise UserError(
                f"{items[0].source}: the first step of every response, of {len(rows)} rows in all, "
                "is longer than "
                f"data.max_response_tokens={self.data.max_response_tokens}"
            )
        return kept

    def written(
        self, rows: Sequence[Prompt], responses: list[str], ended: Sequence[bool]
    ) -> list[Tokens]:
        """Responses that come as text, with their prompts; one that has not ended has no EOS.

        An empty one keeps it, lest nothing be left.
        """
        replies = zip(self._responses(rows, responses), ended, strict=True)
        ids = [reply if done or len(reply) == 1 else reply[:-1] for reply, done in replies]
        prompts = self._prompt_ids(rows)
        return [
            Tokens(prompt, response, row.source)
            for (prompt, row), response in zip(prompts, ids, strict=True)
        ]

    def _judged(self, row: Judgement) -> list[str]:
        """The texts of the responses that a row judges."""
        if isinstance(row, Preference):
            return [row.chosen, row.rejected]
        if isinstance(row, Ranking):
            return row.responses
        if isinstance(row, Feedback):
            return [row.completion]
        join, step_end = self.data.step_join, self.data.step_end
        text = join.join(row.steps)
        ours = list(accumulate(len(step) + len(join) for step in row.steps))[:-1]
        theirs = list(accumulate(map(len, cut_steps(text, step_end))))[:-1]
        apart = zip(ours, theirs, strict=False)
        if len(ours) != len(theirs) or not all(0 <= a - b <= len(join) for a, b in apart):
            raise UserError(
                f"{row.source}: these {len(row.steps)} steps, joined by data.step_join={join!r}, "
                f"are not those that data.step_end={step_end!r} ends ({len(theirs) + 1} steps)"
            )
        return [text]

    def _with_ends(self, item: Answers) -> Answers:
        """Steps with their last tokens; a step that the length limit cut has none."""
        (response,) = item.responses
        ends = self.step_cutter.ends(response)
        if response[-1] not in self.stop_ids:
            return replace(item, ends=ends[:-1])
        if len(ends) != len(item.row.steps):
            raise UserError(
                f"{item.row.source}: the tokenizer of {self.name} loses what "
                f"ends a step: {len(ends)} of {len(item.row.steps)} steps are found in its tokens"
            )
        return replace(item, ends=ends)

    @cached_property
    def step_cutter(self) -> StepCutter:
        """Finds steps by data.step_end."""
        return StepCutter(self.tokenizer, self.data.step_end)

    def notes(self) -> list[str]:
        """What was cut or dropped since the last call, a line each."""
        lines = [f"{count} {what}" for what, count in self._counts.items()]
        self._counts.clear()
        return lines

    def text(self, ids: Sequence[int]) -> str:
        """Readable text of response ids."""
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end a response: EOS and the template's end of turn."""
        return sorted({self.tokenizer.eos_token_id, self.end_of_turn})

    # ------------------------------------------------------------------ ids

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False).input_ids
        return ids

    def _prompt_ids(self, rows: Sequence[Any]) -> list[tuple[list[int], Any]]:
        """Ids of each row's templated prompt, with exactly one BOS."""
        if not rows:
            return []
        texts = [self._render(row.prompt) for row in rows]
        bos = self.tokenizer.bos_token or ""
        if bos and self.bos:  # a chat template may have written the BOS already
            texts = [text.removeprefix(bos) for text in texts]
        return [(self.bos + ids, row) for ids, row in zip(self._ids(texts), rows, strict=True)]

    def _render(self, prompt: str | Turns) -> str:
        if isinstance(prompt, str) and self.data.template != "chat":
            return self.data.template.replace("{prompt}", prompt)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self._chat(turns, add_generation_prompt=True)

    def _chat(self, turns: Turns, add_generation_prompt: bool) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(
                f"the rows are messages, but the tokenizer of {self.name} has no chat template"
            )
        try:
            with time_limit():
                text = self.tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=add_generation_prompt
                )
        except Exception as error:  # a program of the folder's, which runs in jinja's sandbox
            said = str(error).strip() or type(error).__name__
            raise UserError(f"the chat template of {self.name} fails: {said}") from None
        return str(text)

    def _responses(self, rows: Sequence[Any], responses: list[str]) -> list[list[int]]:
        """Ids of responses, ended by EOS or the template's end of turn, within the limit."""
        if not rows:
            return []
        pairs = zip(rows, responses, strict=True)
        texts = [self._ended(row.prompt, response) for row, response in pairs]
        limited = []
        for ids in self._ids(texts):
            if ids[-1:] != [self.end_of_turn]:
                ids = [*ids, self.tokenizer.eos_token_id]
            if len(ids) > self.data.max_response_tokens:
                self._counts["responses cut to max_response_tokens (their EOS is lost)"] += 1
            limited.append(ids[: self.data.max_response_tokens])
        return limited

    def _ended(self, prompt: str | Turns, response: str) -> str:
        """The response as the chat template writes it, up to its end of turn."""
        if isinstance(prompt, str) and self.data.template != "chat":
            return response
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        start = self._chat(turns, add_generation_prompt=True)
        whole = self._chat([*turns, {"role": "assistant", "content": response}], False)
        if not whole.startswith(start):
            raise UserError(
                f"the chat template of {self.name} rewrites the prompt when a "
                "reply follows; give data.template as text with {prompt}"
            )
        return whole[len(start) :].rstrip()

    def _end_of_turn(self) -> int:
        """The special token with which the chat template ends a reply; EOS where there is none."""
        eos = self.tokenizer.eos_token_id
        if self.tokenizer.chat_template:
            reply = self._ended([{"role": "user", "content": "a"}], "b")
            if not reply:
                raise UserError(f"the chat template of {self.name} leaves out what is replied")
            last = self._ids([reply])[0][-1]
            special = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
            return last if last in special else eos
        return eos

    def _limit_prompt(self, ids: list[int], row: Any) -> list[int] | None:
        """The prompt within the limit; None drops the row."""
        limit = self.data.max_prompt_tokens
        if len(ids) <= limit:
            return ids
        if self.data.long_prompts == "error":
            raise UserError(
                f"{row.source}: the prompt has {len(ids)} tokens, the limit is {limit}; raise "
                "data.max_prompt_tokens or set data.long_prompts=cut or drop"
            )
        self._counts[f"prompts over max_prompt_tokens: {self.data.long_prompts}"] += 1
        if self.data.long_prompts == "drop":
            return None
        return self.bos + ids[len(ids) - limit + len(self.bos) :]  # the end holds the question

    def check_lengths(self) -> None:
        pass

    def identity(self) -> str:
        said = [self.tokenizer.backend_tokenizer.to_str(), str(self.tokenizer.chat_template)]
        return hashlib.sha256("\0".join(said).encode()).hexdigest()
