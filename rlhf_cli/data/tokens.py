"""Text becomes token ids here and nowhere else: template, boundary, loss, EOS, limits.

A prompt is tokenised alone, so that it has the same ids in training and in sampling; a response is
tokenised as it stands after it (data/text_ids.py).
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, combinations
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.data import Data
from rlhf_cli.data.chat import ChatTemplate
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
    Turns,
    cut_steps,
    reply_key,
    reply_text,
)
from rlhf_cli.data.limits import Lengths, Limits
from rlhf_cli.data.reach import LOSS, READ, check_loss_keys
from rlhf_cli.data.step_cutter import StepCutter
from rlhf_cli.data.templates import (
    CHAT,
    PLAIN,
    TextTemplate,
    asked_alone,
    chat_template_of,
    continues,
    message_of,
    replied,
    turns_of,
    under,
)
from rlhf_cli.data.text_ids import Span, TextIds

OPENED = 100  # characters of a reply, at most, that a generation prompt opens
END = 2**62  # of a text, whatever its length
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


def unknown_controls(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What looks like a token of turns in the chat template and is none of the tokenizer's."""
    template = str(tokenizer.chat_template)
    vocabulary = tokenizer.get_vocab()
    written = dict.fromkeys(CONTROL.findall(template))
    return [token for token in written if token not in vocabulary]


class Encoder:
    """Tokenises rows for one tokenizer and one data config.

    `notes()` counts what was cut, dropped and not learnt; counts add up over calls.
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
        self.tokenizer = tokenizer
        self.name = tokenizer.name_or_path or "the model that is built here"
        self.data = data
        self._counts: Counter[str] = Counter()
        self.replaces_template = bool(data.chat_template and tokenizer.chat_template)
        if data.chat_template is not None:
            tokenizer.chat_template = chat_template_of(data.chat_template)  # it is saved with it
            missing = unknown_controls(tokenizer)
            if missing:
                self._counts[
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
        self._template = None if template == CHAT else TextTemplate(template)
        self._eos, self._eos_id = tokenizer.eos_token, tokenizer.eos_token_id
        self._kinds: set[bool] = set()  # of rows so far: whether they are dialogues
        self._filled: set[str] = set()  # columns that a row has filled into the template
        self._prefix, self._long_prompts = prefix, "error" if prefix else data.long_prompts
        own = None if prefix else data.max_prompt_tokens
        self.limits = Limits.of(replace(data, max_prompt_tokens=own), context, room)
        self.lengths = Lengths()
        self.ids = TextIds(tokenizer)
        self._begin = "".join(map(str, tokenizer.convert_ids_to_tokens(self.ids.begin)))
        self._others: set[int] = set()  # ids that end responses of the model so far
        self._taught: set[int] = set()  # ids with which replies end
        self._inside: set[int] = set()  # ids that stand within replies
        if self._template is None:
            self._chat.ending  # noqa: B018  a template that cannot work is told before any row

    @cached_property
    def _chat(self) -> ChatTemplate:
        """The chat template.

        Raises:
            UserError: there is none.
        """
        if not self.tokenizer.chat_template:
            raise UserError(
                f"the rows are messages, but the tokenizer of {self.name} has no chat template; "
                "set data.chat_template=chatml, or a file of your own"
            )
        return ChatTemplate(self.tokenizer, self.data.chat_args, self.ids, self.name)

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
        texts = [self._written(row, []) for row in rows]
        limited = zip(rows, self._prompts(texts, rows), strict=True)
        return [(row, ids) for row, ids in limited if ids is not None]

    def demonstrations(self, rows: Sequence[Demonstration | Text]) -> list[Tokens]:
        """Sequences to imitate; of plain text all tokens, of demonstrations the replies."""
        texts = [row for row in rows if isinstance(row, Text)]
        self.lengths.rows += len(rows) - len(texts)
        shown = [
            row for each in rows if isinstance(each, Demonstration) if (row := self._learnt(each))
        ]
        written = [self._written(row, [row.completion], learn=True) for row in shown]
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
        found = self.ids.of_each([self._bare(row.text) for row in rows])
        for row, own in zip(rows, found, strict=True):
            start = self._start(row.text)
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
        written = [self._written(row, each) for row, each in zip(rows, replies, strict=True)]
        prompts = self._prompts(written, rows)
        responses = self._responses(written, prompts, rows)
        items = []
        for row, prompt, ids in zip(rows, prompts, responses, strict=True):
            if prompt is None or ids is None or self._made_equal(row, ids):
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
            self._written(row, [response], sampled=True)
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
        return self._written(row, [])

    def _judged(self, row: Judgement) -> list[Reply]:
        """The responses that a row judges."""
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

    def _made_equal(self, row: Judgement, ids: list[list[int]]) -> bool:
        """Whether a row is left out because the length limit made a better and a worse side equal.

        Raises:
            UserError: it did, and data.doubtful_pairs is error.
        """
        if not isinstance(row, Preference | Ranking) or len(set(map(tuple, ids))) == len(ids):
            return False
        ranks = [1.0, 2.0] if isinstance(row, Preference) else row.ranks
        texts = self._judged(row)
        if not any(
            ids[i] == ids[j] and ranks[i] != ranks[j] and reply_key(texts[i]) != reply_key(texts[j])
            for i, j in combinations(range(len(ids)), 2)
        ):
            return False
        doubtful = self.data.doubtful_pairs
        if doubtful == "error":
            raise UserError(
                f"{row.source}: two sides have the same tokens once they are cut to "
                "data.max_response_tokens; raise it, or data.doubtful_pairs=keep or drop goes on"
            )
        self._counts[f"rows whose sides are equal once they are cut: {doubtful}"] += 1
        if doubtful == "drop":
            self.lengths.drop(row, "the sides of a row are equal once they are cut")
        return doubtful == "drop"

    # ------------------------------------------------------------------ what a run says

    def notes(self) -> list[str]:
        """What was cut, dropped or not learnt since the last call, a line each."""
        lines = [f"{count} {what}" for what, count in self._counts.items()]
        self._counts.clear()
        return lines

    def seen(self) -> dict[str, Any]:
        """What it knows of the rows so far, as JSON can say it, for `remember`."""
        return {
            "dialogues": sorted(self._kinds),
            "longest": [self.lengths.prompt, self.lengths.response],
            "ends": sorted(self._taught),
            "inside": sorted(self._inside),
        }

    def remember(self, seen: dict[str, Any]) -> None:
        """Take over what an encoder like this one has `seen` of rows that were kept."""
        self._kinds |= set(seen["dialogues"])
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
        if self.template != CHAT and True in self._kinds:
            how += ", messages by the chat template"
        written = [f"prompts are written {how}"] if self._kinds else []
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
        if self._template is not None and False in self._kinds:
            for name in sorted(self._template.heads):
                if name not in self._filled:
                    raise UserError(
                        f"data.template has {{{name}}}, but no row has {name}; take it out, or "
                        f"write {{{{{name}}}}} for plain braces"
                    )

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
        if self.data.template is None and self._kinds == {True}:
            return CHAT  # nothing but dialogues was seen
        return CHAT if self._template is None else self._template.text

    @property
    def end_of_turn(self) -> int:
        """What ends a reply: EOS, or the chat template's own token once one is in use."""
        end: int | None = None
        if self._template is None or True in self._kinds:
            end = self._chat.end_of_turn
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

    # ------------------------------------------------------------------ texts

    def _plain(self, value: Any) -> Any:
        """A row's text, in which special tokens that it spells are text, or tokens if data says so.

        They are counted.
        """
        if not (count := self.ids.spelt(value)):
            return value
        kept = self.data.special_tokens == "keep"
        said = "read as tokens" if kept else "read as text (data.special_tokens=keep: as tokens)"
        self._counts[f"special tokens spelt in rows are {said}"] += count
        return value if kept else self.ids.hide(value)

    def _written(
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
        dialogue = not isinstance(row.prompt, str)
        if not dialogue and template is not None:
            if self.data.chat_template:
                self._counts["rows are text, which data.chat_template does not write"] += 1
            return self._filled_in(template, row, row.prompt, row.columns, replies)
        self._kinds.add(dialogue)
        turns = under(self._prefix, turns_of(row.prompt, row.columns))
        self._check_reach(turns, replies, row.columns.get("tools"), row.source)
        if not sampled and self.data.special_tokens != "keep":
            self._check_marks([*turns, *map(message_of, replies)], row.source)
        turns = self._plain(turns)
        tools = self._plain(row.columns.get("tools"))
        chat, source = self._chat, row.source
        own = [self._plain(reply) for reply in replies]
        if not own:
            return Written(chat.asked(turns, tools, source), [], True)
        asked, responses = chat.exchange(turns, own, tools, source)
        written = Written(asked, responses, True)
        begun = asked[-OPENED:]  # where the template opens what the reply has itself
        self._count_rewritten(own, [begun + response for response in responses])
        if learn:
            written.spans = self._spans(row, turns, own[0], tools, asked)
            earlier = [turns[i] for i in self._wanted(row, turns)] if written.spans else []
            self._count_rewritten(earlier, [asked] * len(earlier))
        return written

    def _count_rewritten(self, replies: Sequence[Reply], texts: Sequence[str]) -> None:
        """Replies of which the chat template leaves out words, such as reasoning, are counted."""
        for reply, text in zip(replies, texts, strict=True):
            said = reply_text(reply).strip()
            if said not in text and "".join(said.split()) not in "".join(text.split()):
                what = "replies are learnt otherwise than they stand in the row: the chat template "
                self._counts[what + "rewrites them (reasoning that it leaves out?)"] += 1

    def _check_reach(self, turns: Turns, replies: Sequence[Reply], tools: Any, source: str) -> None:
        """The chat template writes all messages of a dialogue; what else it leaves out is counted.

        Raises:
            UserError: it leaves out a message, or its calls.
        """
        chat, counts = self._chat, self._counts
        own = [message_of(reply) for reply in replies]
        check_loss_keys([*turns, *own], source)
        for number, whole in enumerate([replied(turns, reply) for reply in replies] or [turns]):
            for place, lost, why in chat.reach.left_out(whole):
                message = whole[place]
                if "tool_calls" in lost:
                    raise UserError(
                        f"{source}: a message has tool_calls, which the chat template of "
                        f"{chat.name} does not write{why and f' (it fails: {why})'}; set "
                        "data.chat_template=qwen, or a template of your own that does"
                    )
                if not message.get("tool_calls"):
                    raise UserError(
                        f"{source}: the chat template of {chat.name} leaves out message "
                        f"{place + 1} of the dialogue, of the {message['role']}; take it out, or "
                        "set data.chat_template to one that writes it"
                    )
                if not number or place >= len(turns):
                    counts[
                        "messages have words beside tool_calls, which the chat template does not "
                        "write"
                    ] += 1
        for message in (*turns, *own):
            for key in message.keys() - READ - LOSS if len(message) > 2 else ():
                value = message[key]
                if value and not chat.reach.reads_key(message["role"], key, value):
                    counts[f"messages have {key}, which the chat template does not write"] += 1
        if tools and not chat.reach.reads_tools():
            counts["rows have tools, which the chat template does not write"] += 1

    def _check_marks(self, turns: Turns, source: str) -> None:
        """The assistant spells no special token with which the chat template marks part of a reply.

        It would be read as text, which the template does not know for its mark.

        Raises:
            UserError: it does.
        """
        for turn in turns:
            if turn["role"] == "assistant" and self.ids.spelt(turn):
                spelt = self.ids.special_in(reply_text(turn)) & self._chat.own_marks
                if spelt:
                    raise UserError(
                        f"{source}: a reply spells {min(spelt)}, with which the chat template of "
                        f"{self.name} marks part of a reply; set data.special_tokens=keep to have "
                        "it read as that token"
                    )

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
        source = row.source
        self._kinds.add(False)
        asked = row.prompt if isinstance(row.prompt, list) else []
        own = [message_of(reply) for reply in replies]
        check_loss_keys([*asked, *own], source)
        for message in asked:
            for key in message.keys() - READ - LOSS:
                self._counts[f"messages have {key}, which data.template does not show"] += 1
        if columns.get("tools"):
            self._counts["rows have tools, which data.template does not show"] += 1
        for message in own:
            if more := message.keys() - {"role", "content", "weight"} - LOSS:
                raise UserError(
                    f"{source}: a reply has {', '.join(sorted(more))}, which only a chat template "
                    "writes; set data.template=chat"
                )
        if template.names:
            shown = {name: self._plain(columns[name]) for name in template.heads if name in columns}
            self._filled |= {name for name, value in shown.items() if value is not None}
            columns = {**columns, **shown}
        # a BOS that the row or the template spells is the one that the tokenizer puts there
        begin = self._begin if self.ids.before else ""
        text = template.fill(self._plain(prompt.removeprefix(begin)), columns, source)
        text = self._prefix + text.removeprefix(begin)
        texts = [self._plain(self._without_eos(reply_text(reply))) for reply in replies]
        return Written(text, texts, False)

    def _without_eos(self, text: str) -> str:
        """A text without the EOS that it ends with, for one is added."""
        bare = text.rstrip()
        return bare.removesuffix(self._eos) if bare.endswith(self._eos) else text

    def _bare(self, text: str) -> str:
        """A document without the BOS and the EOS that it brings."""
        if self._begin and text.lstrip().startswith(self._begin):
            text = text.lstrip().removeprefix(self._begin)
        return str(self._plain(self._without_eos(text)))

    def _start(self, text: str) -> list[int]:
        """The ids before a document: what the tokenizer adds, or the BOS that the text brings."""
        brings = self._begin and text.lstrip().startswith(self._begin)
        return self.ids.before or (self.ids.begin if brings else [])

    # ------------------------------------------------------------------ loss

    def _learnt(self, row: Demonstration) -> Demonstration | None:
        """The row up to its last reply that carries loss; None where none does."""
        if isinstance(row.completion, str) or row.completion.get("weight", 1):
            return row
        self._counts["replies of weight 0 carry no loss"] += 1
        turns = row.prompt if isinstance(row.prompt, list) else []
        places = self._wanted(row, turns)
        if not places or self.data.loss_on == "last":
            self._counts["rows have no reply that carries loss: drop"] += 1
            self.lengths.drop(row, "a row has no reply that carries loss")
            return None
        last = places[-1]
        return replace(row, prompt=turns[:last], completion=turns[last])

    def _wanted(self, row: Demonstration, turns: list[dict[str, Any]]) -> list[int]:
        """The places of the replies in a prompt that are to carry loss."""
        learnable = range(row.learn_from, len(turns) - continues(turns))
        return [
            i for i in learnable if turns[i]["role"] == "assistant" and turns[i].get("weight", 1)
        ]

    def _spans(
        self, row: Demonstration, turns: Any, reply: Reply, tools: Any, asked: str
    ) -> list[Span] | None:
        """Where the replies of a dialogue that carry loss stand in its text, and are counted."""
        earlier = [
            i
            for i in range(row.learn_from, len(turns) - continues(turns))
            if turns[i]["role"] == "assistant"
        ]
        wanted = self._wanted(row, turns)
        if self.data.loss_on == "last":
            self._counts["earlier replies carry no loss (data.loss_on=last)"] += len(earlier)
            wanted = []
        else:
            zero = len(earlier) - len(wanted)
            if zero:
                self._counts["replies of weight 0 carry no loss"] += zero
        chat = self._chat
        whole = replied(turns, reply)
        marked = chat.marked_spans(whole, asked, tools, row.source) if chat.marks else None
        if marked is not None:
            order = [i for i, turn in enumerate(whole) if turn["role"] == "assistant"]
            self._count_learnt(len(wanted))
            start, end = marked[-1]
            own = (max(start, len(asked)), end)
            return [*(marked[order.index(i)] for i in wanted), own]
        if not wanted:
            return None
        spans = chat.earlier_spans(turns, wanted, asked, tools, row.source)
        if spans is None:
            self._counts[
                "earlier replies carry no loss: the chat template writes them otherwise once the "
                "dialogue goes on, and only the last reply of such a row is learnt"
            ] += len(wanted)
            return None
        self._count_learnt(len(wanted))
        return [*spans, (len(asked), END)]

    def _count_learnt(self, count: int) -> None:
        if count:
            what = (
                "earlier replies carry loss as well as the last (data.loss_on=last: the last alone)"
            )
            self._counts[what] += count

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

    # ------------------------------------------------------------------ ids

    def _prompts(self, texts: Sequence[Written], rows: Sequence[Any]) -> list[list[int] | None]:
        """The ids of each prompt, within the limit; None drops its row."""
        limit = self.limits.prompt
        cut = self._long_prompts == "cut"
        read = self.ids.ends if cut else self.ids.heads
        found = read([text.prompt for text in texts], limit)
        before = self.ids.before
        return [
            self._limited(ids if text.chat else [*before, *ids], text, row, limit)
            for ids, text, row in zip(found, texts, rows, strict=True)
        ]

    def _limited(
        self, ids: list[int], text: Written, row: Any, limit: int | None
    ) -> list[int] | None:
        """The prompt within the limit; None drops the row."""
        if limit is None or len(ids) <= limit:
            self.lengths.prompt = max(self.lengths.prompt, len(ids))
            return ids
        if self._long_prompts == "error":
            count = len(self.ids.of(text.prompt)) + len([] if text.chat else self.ids.before)
            remedy = "raise data.max_prompt_tokens or set data.long_prompts=cut or drop"
            if self._prefix:
                remedy = "data.prefix is too long for the model, or the row is"
            raise UserError(
                f"{row.source}: the prompt has {count} tokens, the limit is {limit}; {remedy}"
            )
        self._counts[f"prompts over max_prompt_tokens: {self._long_prompts}"] += 1
        if self._long_prompts == "drop":
            self.lengths.drop(row, f"a prompt is longer than data.max_prompt_tokens={limit}")
            return None
        start = self.ids.before
        if text.chat:
            begins = self._begin and text.prompt.startswith(self._begin)
            start = self.ids.begin if begins else []
        start = start[: limit - 1]
        return start + ids[len(ids) - limit + len(start) :]  # the end holds the question

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
            limited.append(self._cut(own, self.limits.response(len(prompt)), row))
        return limited

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

    def _cut(
        self, responses: list[list[int]], limit: int | None, row: Any
    ) -> list[list[int]] | None:
        """The responses within the limit; None drops the row.

        Raises:
            UserError: one is longer, and data.long_responses is error.
        """
        self.lengths.responses += len(responses)
        longest = max(map(len, responses))
        if limit is None or longest <= limit:
            self.lengths.response = max(self.lengths.response, longest)
            return responses
        how = self.data.long_responses
        if how == "error":
            raise UserError(
                f"{row.source}: a response has {longest} tokens or more, the limit is {limit}; "
                "raise data.max_response_tokens or set data.long_responses=cut or drop"
            )
        if how == "drop":
            self._counts["rows with a response over max_response_tokens: drop"] += 1
            self.lengths.drop(row, f"a response is longer than data.max_response_tokens={limit}")
            return None
        over = sum(len(each) > limit for each in responses)
        self.lengths.cut += over
        self.lengths.response = limit
        self._counts["responses cut to max_response_tokens (their EOS is lost)"] += over
        return [each[:limit] for each in responses]
