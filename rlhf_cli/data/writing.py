"""Rows as texts: what the template that data names makes of a prompt and its replies."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.data import Data
from rlhf_cli.data.chat import ChatTemplate
from rlhf_cli.data.kinds import Reply, reply_text
from rlhf_cli.data.learnt_replies import LearntReplies
from rlhf_cli.data.reach import LOSS, READ, check_loss_keys
from rlhf_cli.data.templates import (
    CHAT,
    PLAIN,
    TextTemplate,
    asked_alone,
    chat_template_of,
    message_of,
    replied,
    turns_of,
    under,
)
from rlhf_cli.data.text_ids import Span, TextIds

OPENED = 100  # characters of a reply, at most, that a generation prompt opens
CONTROL = re.compile(r"<\|\w+\|>|<\w+_of_turn>")


@dataclass
class Written:
    """A prompt and its responses as texts.

    spans: the replies within the prompt that carry loss, and where the template marks it, the part
        of the one response that does, all by their characters in prompt + response; None: the
        responses alone, as a whole.
    chat: whether a chat template wrote it.
    """

    prompt: str
    responses: list[str]
    chat: bool
    spans: list[Span] | None = None


class RowWriter:
    """Writes rows by the template of one data config.

    What a template does not show, and special tokens that rows spell, is counted in `counts`.

    kinds: whether the rows so far were dialogues.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        data: Data,
        prefix: str,
        ids: TextIds,
        learnt: LearntReplies,
        counts: Counter[str],
    ) -> None:
        """Raises UserError where the tokenizer lacks a template that data asks for.

        Args:
            prefix: stands before every prompt.
            learnt: which replies of a demonstration carry loss.
        """
        self._tokenizer, self._data, self._prefix = tokenizer, data, prefix
        self._ids, self._learnt, self._counts = ids, learnt, counts
        self._template = _template_of(data, tokenizer, counts)
        self._eos = tokenizer.eos_token
        self._filled: set[str] = set()  # columns that a row has filled into the template
        self.kinds: set[bool] = set()
        if self._template is None:
            self._chat.ending  # noqa: B018  a template that cannot work is told before any row

    @cached_property
    def _chat(self) -> ChatTemplate:
        """The chat template.

        Raises:
            UserError: there is none.
        """
        if not self._tokenizer.chat_template:
            raise UserError(
                f"the rows are messages, but the tokenizer of {self._ids.name} has no chat "
                "template; set data.chat_template=chatml, or a file of your own"
            )
        return ChatTemplate(self._tokenizer, self._data.chat_args, self._ids, self._ids.name)

    @property
    def template(self) -> str:
        """How prompts are written, for those who read the model later."""
        if self._data.template is None and self.kinds == {True}:
            return CHAT  # nothing but dialogues was seen
        return CHAT if self._template is None else self._template.text

    @property
    def end_of_turn(self) -> int | None:
        """The chat template's own token that ends a reply, once it is in use."""
        in_use = self._template is None or True in self.kinds
        return self._chat.end_of_turn if in_use else None

    def write(
        self, row: Any, replies: Sequence[Reply], learn: bool = False, sampled: bool = False
    ) -> Written:
        """A row's prompt and replies as its template writes them.

        Args:
            learn: whether the earlier replies of a dialogue matter.
            sampled: whether a model has written the replies.

        Raises:
            UserError: the template cannot write the row, or would leave part of it out.
        """
        template = self._template
        if template is not None and template.text != PLAIN:
            alone = asked_alone(row.prompt, row.columns)
            if alone is None:
                raise UserError(
                    f"{row.source}: the prompt is a dialogue, and data.template={template.text!r} "
                    "writes one question (of the user, under a system message or not); set "
                    "data.template=chat"
                )
            return self._filled_in(template, row, *alone, replies)
        if template is not None and isinstance(row.prompt, str):
            if self._data.chat_template:
                self._counts["rows are text, which data.chat_template does not write"] += 1
            return self._filled_in(template, row, row.prompt, row.columns, replies)
        return self._dialogue(row, replies, learn, sampled)

    def document(self, text: str) -> tuple[str, list[int]]:
        """A plain text without the BOS and the EOS that it brings, and the ids before it: what the
        tokenizer adds, or the BOS that the text brings.
        """
        begin, start = self._ids.begin_text, self._ids.before
        if begin and text.lstrip().startswith(begin):
            text = text.lstrip().removeprefix(begin)
            start = self._ids.begin
        return str(self._plain(self._without_eos(text))), start

    def check_columns(self) -> None:
        """Once all rows are read: the template shows no column that none of them has.

        Raises:
            UserError: it does.
        """
        if self._template is None or False not in self.kinds:
            return
        if unfilled := self._template.heads - self._filled:
            name = min(unfilled)
            raise UserError(
                f"data.template has {{{name}}}, but no row has {name}; take it out, or "
                f"write {{{{{name}}}}} for plain braces"
            )

    # ------------------------------------------------------------------ by a chat template

    def _dialogue(self, row: Any, replies: Sequence[Reply], learn: bool, sampled: bool) -> Written:
        """As of `write`."""
        self.kinds.add(not isinstance(row.prompt, str))
        chat, source = self._chat, row.source
        turns = under(self._prefix, turns_of(row.prompt, row.columns))
        tools = row.columns.get("tools")
        messages = list(map(message_of, replies))
        check_loss_keys([*turns, *messages], source)
        self._counts.update(chat.reach.check(turns, messages, tools, source))
        if not sampled and self._data.special_tokens != "keep":
            chat.check_marks([*turns, *messages], source)
        turns, tools = self._plain(turns), self._plain(tools)
        own = [self._plain(reply) for reply in replies]
        if not own:
            return Written(chat.asked(turns, tools, source), [], True)
        asked, responses = chat.exchange(turns, own, tools, source)
        begun = asked[-OPENED:]  # where the template opens what the reply has itself
        for reply, response in zip(own, responses, strict=True):
            self._look_for(reply, begun + response)
        if not learn:
            return Written(asked, responses, True)
        dialogue = replied(turns, own[0])
        spans = self._learnt.spans(chat, row, dialogue, asked, tools)
        for place in self._learnt.earlier(row, dialogue) if spans else []:
            self._look_for(dialogue[place], asked)
        return Written(asked, responses, True, spans)

    def _look_for(self, reply: Reply, text: str) -> None:
        """A reply of which the chat template leaves out words, such as reasoning, is counted."""
        said = reply_text(reply).strip()
        if said not in text and "".join(said.split()) not in "".join(text.split()):
            what = "replies are learnt otherwise than they stand in the row: the chat template "
            self._counts[what + "rewrites them (reasoning that it leaves out?)"] += 1

    # ------------------------------------------------------------------ as text

    def _filled_in(
        self,
        template: TextTemplate,
        row: Any,
        prompt: str,
        columns: dict[str, Any],
        replies: Sequence[Reply],
    ) -> Written:
        """A row as text: no chat template is read.

        Args:
            prompt: the one question of the row.
            columns: what the template may show, a system message with it.
        """
        self.kinds.add(False)
        self._check_shown(row, columns, replies)
        if template.names:
            shown = {name: self._plain(columns[name]) for name in template.heads if name in columns}
            self._filled |= {name for name, value in shown.items() if value is not None}
            columns = {**columns, **shown}
        # a BOS that the row or the template spells is the one that the tokenizer puts there
        begin = self._ids.begin_text if self._ids.before else ""
        text = template.fill(self._plain(prompt.removeprefix(begin)), columns, row.source)
        text = self._prefix + text.removeprefix(begin)
        texts = [self._plain(self._without_eos(reply_text(reply))) for reply in replies]
        return Written(text, texts, False)

    def _check_shown(self, row: Any, columns: dict[str, Any], replies: Sequence[Reply]) -> None:
        """What a text leaves out of a row's messages is counted.

        Raises:
            UserError: it is something of a reply.
        """
        asked = row.prompt if isinstance(row.prompt, list) else []
        own = [message_of(reply) for reply in replies]
        check_loss_keys([*asked, *own], row.source)
        for message in asked:
            for key in message.keys() - READ - LOSS:
                self._counts[f"messages have {key}, which data.template does not show"] += 1
        if columns.get("tools"):
            self._counts["rows have tools, which data.template does not show"] += 1
        for message in own:
            if more := message.keys() - {"role", "content", "weight"} - LOSS:
                raise UserError(
                    f"{row.source}: a reply has {', '.join(sorted(more))}, which only a chat "
                    "template writes; set data.template=chat"
                )

    def _plain(self, value: Any) -> Any:
        """A row's text, in which special tokens that it spells are text, or tokens if data says so.

        They are counted.
        """
        if not (count := self._ids.spelt(value)):
            return value
        kept = self._data.special_tokens == "keep"
        said = "read as tokens" if kept else "read as text (data.special_tokens=keep: as tokens)"
        self._counts[f"special tokens spelt in rows are {said}"] += count
        return value if kept else self._ids.hide(value)

    def _without_eos(self, text: str) -> str:
        """A text without the EOS that it ends with, for one is added."""
        bare = text.rstrip()
        return bare.removesuffix(self._eos) if bare.endswith(self._eos) else text


def _template_of(
    data: Data, tokenizer: PreTrainedTokenizerBase, counts: Counter[str]
) -> TextTemplate | None:
    """The text that data.template is; None for the chat template.

    The tokenizer gets data.chat_template, with which it is saved.

    Raises:
        UserError: there is no such template.
    """
    if data.chat_template is not None:
        tokenizer.chat_template = chat_template_of(data.chat_template)
        missing = _unknown_controls(tokenizer)
        if missing:
            counts[
                f"tokens of data.chat_template={data.chat_template} are none of this "
                f"tokenizer's, and read as text: {', '.join(missing)}"
            ] = len(missing)
    template = data.template or (CHAT if data.chat_template else PLAIN)
    if template == CHAT and not tokenizer.chat_template:
        raise UserError(
            f"data.template=chat, but the tokenizer of {tokenizer.name_or_path} has no chat "
            "template; set data.chat_template, or write one as "
            'data.template="...{prompt}..."'
        )
    if data.chat_template and template not in (CHAT, PLAIN):
        raise UserError(
            f"data.chat_template={data.chat_template} is not used where data.template is a "
            "text; leave one of them out"
        )
    return None if template == CHAT else TextTemplate(template)


def _unknown_controls(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What looks like a token of turns in the chat template and is none of the tokenizer's."""
    vocabulary = tokenizer.get_vocab()
    written = dict.fromkeys(CONTROL.findall(str(tokenizer.chat_template)))
    return [token for token in written if token not in vocabulary]
