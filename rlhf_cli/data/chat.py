"""What a tokenizer's chat template makes of a dialogue: prompts, replies, and where each stands."""

import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.kinds import Reply, Turns, reply_text
from rlhf_cli.data.reach import Reach
from rlhf_cli.data.templates import continues, message_of, replied
from rlhf_cli.data.text_ids import Span, TextIds
from rlhf_cli.data.time_limit import time_limit

GENERATION = re.compile(r"\{%-?\s*generation\b")
QUESTION, PROBE = "Xyz", "Zyx"  # what no template writes of itself


class ChatTemplate:
    """A tokenizer's chat template.

    name: of the tokenizer's folder, for messages.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, arguments: dict[str, Any], ids: TextIds, name: str
    ) -> None:
        self._tokenizer = tokenizer
        self._arguments = arguments
        self._ids = ids
        self.name = name
        self.reach = Reach(self._sample, name)

    # ------------------------------------------------------------------ rendering

    def asked(self, turns: Turns, tools: Any, source: str) -> str:
        """What is given to the model: up to where it writes, or goes on with the last message."""
        if continues(turns):
            return self._render(turns, tools, source, continue_final_message=True)[0]
        return self._render(turns, tools, source, add_generation_prompt=True)[0]

    def whole(self, turns: Turns, tools: Any, source: str) -> str:
        """The dialogue up to what ends its last message."""
        text, _ = self._render(turns, tools, source)
        return text.removesuffix(self.trailer)

    def _sample(self, turns: Turns, tools: Any) -> str:
        """As `Reach` asks."""
        open_ended = turns[-1]["role"] != "assistant"
        return self._render(turns, tools, "", add_generation_prompt=open_ended)[0]

    def _render(
        self, turns: Turns, tools: Any, source: str, **how: bool
    ) -> tuple[str, list[list[Span]]]:
        """The text of a dialogue, and with return_assistant_tokens_mask its marked spans."""
        # as apply_chat_template does: many templates write a null out
        messages = [
            {name: each for name, each in turn.items() if each is not None and name != "weight"}
            for turn in turns
        ]
        try:
            with time_limit():
                render: Any = render_jinja_template  # which says that it gives a text alone
                texts, spans = render(
                    conversations=[messages],
                    tools=tools or None,
                    chat_template=self._tokenizer.get_chat_template(None, tools or None),
                    **how,
                    **{**self._tokenizer.special_tokens_map, **self._arguments},
                )
        except Exception as error:  # a program of the folder's, which runs in jinja's sandbox
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            place = f"{source}: " if source else ""
            raise UserError(f"{place}the chat template of {self.name} fails: {said}") from None
        return str(texts[0]), spans

    # ------------------------------------------------------------------ what it writes of itself

    @cached_property
    def _probed(self) -> tuple[str, str, str]:
        """What the generation prompt opens that a reply need not have, what ends a reply, and what
        the template writes after that.
        """
        question = [{"role": "user", "content": QUESTION}]
        asked = self.asked(question, None, "")
        text, _ = self._render([*question, message_of(PROBE)], None, "")
        place = text.rfind(PROBE)
        if place < 0:
            raise UserError(f"the chat template of {self.name} leaves out what is replied")
        same = next(
            (i for i, pair in enumerate(zip(asked, text, strict=False)) if pair[0] != pair[1]),
            min(len(asked), len(text)),
        )
        rest = text[place + len(PROBE) :]
        end = self._ids.first_control(rest)
        ending = rest.rstrip() if end is None else rest[:end]
        opening = asked[same:] if QUESTION in asked[:same] else ""
        return opening, ending, rest[len(ending) :]

    @property
    def opening(self) -> str:
        """What the generation prompt writes of the reply already, such as <think>."""
        return self._probed[0]

    @property
    def ending(self) -> str:
        """What ends a reply."""
        return self._probed[1]

    @property
    def trailer(self) -> str:
        """What follows that at the end of a dialogue, and is learnt by nobody."""
        return self._probed[2]

    @cached_property
    def end_of_turn(self) -> int | None:
        """The special token with which a reply ends; None where there is none."""
        return next(
            (id for text, id in self._ids.control.items() if self.ending.endswith(text)), None
        )

    @cached_property
    def own_marks(self) -> set[str]:
        """The special tokens with which it marks what is within a reply, such as reasoning."""
        question = {"role": "user", "content": QUESTION}
        begun = [question, message_of(PROBE)]
        turns, _ = self._render(begun, None, "")
        with suppress(UserError):  # of a reply within a dialogue no reasoning is written
            turns, _ = self._render([*begun, question], None, "")
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        named = {getattr(self._tokenizer, name) for name in names}
        of_turns = self._ids.special_in(turns) | self._ids.special_in(self.ending) | named
        return self._ids.special_in(self._tokenizer.get_chat_template()) - of_turns

    def check_marks(self, turns: Turns, source: str) -> None:
        """The assistant spells no special token of `own_marks`.

        It would be read as text, which the template does not know for its mark.

        Raises:
            UserError: it does.
        """
        for turn in turns:
            if turn["role"] == "assistant" and self._ids.spelt(turn):
                spelt = self._ids.special_in(reply_text(turn)) & self.own_marks
                if spelt:
                    raise UserError(
                        f"{source}: a reply spells {min(spelt)}, with which the chat template of "
                        f"{self.name} marks part of a reply; set data.special_tokens=keep to have "
                        "it read as that token"
                    )

    @cached_property
    def marks(self) -> bool:
        """Whether the template says which parts the assistant generates."""
        return GENERATION.search(self._tokenizer.get_chat_template()) is not None

    # ------------------------------------------------------------------ replies

    def exchange(
        self, turns: Turns, replies: Sequence[Reply], tools: Any, source: str
    ) -> tuple[str, list[str]]:
        """The text that is given to the model, and what each reply adds to it, with its end.

        Where the generation prompt opens a reply (<think>) that the template writes without, a
        reply that begins as it was opened goes on from there. If one does not, the prompt is what
        all have in common with it.

        Raises:
            UserError: the template writes the prompt otherwise when a reply follows.
        """
        asked = self.asked(turns, tools, source)
        wholes = [self.whole(replied(turns, reply), tools, source) for reply in replies]
        if all(whole.startswith(asked) for whole in wholes):
            return asked, [whole[len(asked) :] for whole in wholes]
        opening = self.opening
        base = asked.removesuffix(opening)
        if not opening or base == asked or not all(each.startswith(base) for each in wholes):
            raise UserError(
                f"{source + ': ' if source else ''}the chat template of {self.name} rewrites the "
                "prompt when a reply follows; give data.template as text with {prompt}"
            )
        rests = [
            whole[len(asked) :]
            if whole.startswith(asked)
            else self._opened(turns, reply, base, tools, source)
            for whole, reply in zip(wholes, replies, strict=True)
        ]
        if None not in rests:
            return asked, [rest or "" for rest in rests]
        return base, [
            whole[len(base) :] if rest is None else opening + rest
            for whole, rest in zip(wholes, rests, strict=True)
        ]

    def _opened(self, turns: Turns, reply: Reply, base: str, tools: Any, source: str) -> str | None:
        """What a reply says after what the generation prompt has opened; None if it begins else.

        Args:
            base: the prompt without that.
        """
        text, opening = reply_text(reply).lstrip(), self.opening
        if text.startswith(opening):
            rest = text[len(opening) :]
        elif text.startswith(opening.strip()):
            rest = text[len(opening.strip()) :].lstrip("\n")
        else:
            return None
        if isinstance(reply, str):
            return rest + self.ending
        # what follows the words, such as tool calls, as the template writes it after others
        whole = self.whole(replied(turns, {**reply, "content": PROBE}), tools, source)
        before, found, after = whole.removeprefix(base).partition(PROBE)
        return rest + after if found and not before.strip() else None

    def earlier_spans(
        self, turns: Turns, places: Sequence[int], asked: str, tools: Any, source: str
    ) -> list[Span] | None:
        """Where the replies at these places of a dialogue stand in `asked`, the text of it all.

        None where one of them stands otherwise in it than it did when it was the last.
        """
        spans = []
        for place in places:
            before = self.asked(turns[:place], tools, source)
            after = self.whole(turns[: place + 1], tools, source)
            if not (after.startswith(before) and asked.startswith(after)):
                return None
            spans.append((len(before), len(after)))
        return spans

    def marked_spans(self, turns: Turns, asked: str, tools: Any, source: str) -> list[Span] | None:
        """Where the template marks each reply of a dialogue, with its end; None if it is not clear
        which is which, or if the dialogue does not go on from `asked`.
        """
        text, found = self._render(turns, tools, source, return_assistant_tokens_mask=True)
        spans = found[0]
        count = sum(turn["role"] == "assistant" for turn in turns)
        if len(spans) != count or not text.startswith(asked):
            return None
        ending = self.ending
        return [
            (start, end + len(ending) if text.startswith(ending, end) else end)
            for start, end in spans
        ]
