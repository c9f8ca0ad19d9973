"""What of a dialogue a chat template writes, and what it leaves out without a word.

A template is a program, so it is asked: it writes a small dialogue whose parts are words that no
template has of itself, and what does not come out it leaves out. The answers are kept by the roles
of a message and of its neighbours.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.kinds import Message, Turns
from rlhf_cli.data.templates import replied

SAID, NAME, VALUE, AROUND = "Qzsaid", "qzname", "qzvalue", "Qzaround"
TOOL: Message = {
    "type": "function",
    "function": {
        "name": "qztool",
        "description": AROUND,
        "parameters": {"type": "object", "properties": {}},
    },
}
READ = frozenset(("role", "content", "tool_calls", "tool_call_id", "weight"))
LOSS = frozenset(("train", "trainable", "loss", "mask", "loss_mask"))  # as others have `weight`
CONTENT, CALLS = "content", "tool_calls"

Render = Callable[[Turns, Any], str]
"""The text of a dialogue with its tools; raises UserError where the template does."""


class Form(NamedTuple):
    """What decides whether a template writes a message: who speaks, words, and calls (two: more).

    nested: whether its calls stand under `function`.
    """

    role: str
    says: bool = True
    calls: int = 0
    nested: bool = True


def form_of(message: Message) -> Form:
    """The form of a message."""
    calls = message.get("tool_calls")
    if not calls:
        return Form(message["role"])
    nested = isinstance(calls[0].get("function"), dict)
    return Form(message["role"], bool(message.get("content")), min(len(calls), 2), nested)


def example(form: Form) -> Message:
    """A message of a form, in words that no template writes."""
    message: Message = {"role": form.role, "content": SAID if form.says else None}
    if form.role == "tool":
        message |= {"tool_call_id": "qzcall000", "name": "qztool"}
    if form.calls:
        calls = [{"name": f"{NAME}{i}", "arguments": {"x": VALUE}} for i in range(form.calls)]
        message["tool_calls"] = [
            {"id": f"qzcall00{i}", "type": "function", "function": call} if form.nested else call
            for i, call in enumerate(calls)
        ]
    return message


def around(form: Form) -> Message:
    """A neighbour of the message that is asked about."""
    message = example(form)
    return {**message, "content": AROUND} if form.says else message


def lead_to(form: Form | None) -> Turns:
    """A dialogue that ends in a message of a form."""
    if form is None:
        return []
    before = {"assistant": [Form("user")], "tool": [Form("user"), Form("assistant", False, 1)]}
    return [around(each) for each in (*before.get(form.role, []), form)]


class Reach:
    """What one chat template writes.

    render: the text of a dialogue, as a whole or up to where the model writes.
    name: of the tokenizer's folder, for messages.
    """

    def __init__(self, render: Render, name: str) -> None:
        self._render, self._name = render, name
        self._known: dict[tuple[Form | None, Form, Form | None], set[str] | str] = {}
        self._keys: dict[tuple[str, str, type], bool] = {}
        self._tools: bool | None = None

    def check(self, turns: Turns, replies: list[Message], tools: Any, source: str) -> Iterator[str]:
        """A line on each thing that is left out of a dialogue with which a run can go on.

        Args:
            replies: of which each may end the dialogue.

        Raises:
            UserError: a message is left out, or its calls.
        """
        for number, whole in enumerate([replied(turns, each) for each in replies] or [turns]):
            for place, lost, why in self._left_out(whole):
                message = whole[place]
                if CALLS in lost:
                    raise UserError(
                        f"{source}: a message has tool_calls, which the chat template of "
                        f"{self._name} does not write{why and f' (it fails: {why})'}; set "
                        "data.chat_template=qwen, or a template of your own that does"
                    )
                if not message.get("tool_calls"):
                    raise UserError(
                        f"{source}: the chat template of {self._name} leaves out message "
                        f"{place + 1} of the dialogue, of the {message['role']}; take it out, or "
                        "set data.chat_template to one that writes it"
                    )
                if not number or place >= len(turns):
                    yield (
                        "messages have words beside tool_calls, which the chat template does not "
                        "write"
                    )
        for message in (*turns, *replies):
            for key in message.keys() - READ - LOSS if len(message) > 2 else ():
                value = message[key]
                if value and not self._reads_key(message["role"], key, value):
                    yield f"messages have {key}, which the chat template does not write"
        if tools and not self._reads_tools():
            yield "rows have tools, which the chat template does not write"

    def _left_out(self, turns: Turns) -> list[tuple[int, set[str], str]]:
        """Of messages that are not written whole: their place, what is left out, and why if the
        template says it.
        """
        forms = [form_of(turn) for turn in turns]
        found = []
        for i, form in enumerate(forms):
            key = (forms[i - 1] if i else None, form, forms[i + 1] if i + 1 < len(forms) else None)
            if key not in self._known:
                self._known[key] = self._asked(*key)
            lost = self._known[key]
            if isinstance(lost, set):
                if lost:
                    found.append((i, lost, ""))
            elif form.calls:  # of what else it refuses it will speak itself
                found.append((i, {CALLS}, lost))
        return found

    def _asked(self, before: Form | None, form: Form, after: Form | None) -> set[str] | str:
        """What of the message is left out; a text where the template refuses, for what it says."""
        lead = lead_to(before)
        if before is None and form.role == "tool":
            lead = lead_to(Form("assistant", False, 1))
        turns = [*lead, example(form), *([] if after is None else [around(after)])]
        starts: list[Turns] = [[]]
        if before is not None and before.role not in ("system", "developer"):
            starts.append([{"role": "system", "content": AROUND}])  # some need one
        said = ""
        for start in starts:
            for tools in (None, [TOOL]):
                try:
                    text = self._render([*start, *turns], tools)
                except UserError as error:
                    said = said or str(error).partition(" fails: ")[2] or str(error)
                    continue
                calls = [f"{NAME}{i}" for i in range(form.calls)]
                lost = {CONTENT} if form.says and SAID not in text else set()
                if any(name not in text for name in calls) or (calls and VALUE not in text):
                    lost.add(CALLS)
                return lost
        return said

    def _reads_key(self, role: str, key: str, value: Any) -> bool:
        """Whether a key of a message, beside role and content, changes what is written."""
        known = (role, key, type(value))
        if known not in self._keys:
            turns = lead_to(Form(role))
            more = [*turns[:-1], {**turns[-1], key: value}]
            bare = [*turns[:-1], {k: v for k, v in turns[-1].items() if k != key}]
            try:
                self._keys[known] = self._render(more, None) != self._render(bare, None)
            except UserError:  # without the key, or with it
                self._keys[known] = False
        return self._keys[known]

    def _reads_tools(self) -> bool:
        """Whether the tools of a row are written."""
        if self._tools is None:
            try:
                self._tools = "qztool" in self._render([around(Form("user"))], [TOOL])
            except UserError:
                self._tools = False
        return self._tools


def check_loss_keys(turns: Turns, source: str) -> None:
    """Keys that other programs read as `weight` say no more than what is done anyway.

    Raises:
        UserError: one says something else, or may.
    """
    for turn in turns:
        for key in LOSS.intersection(turn):
            learnt = turn["role"] == "assistant"
            plain = turn[key] in ((True, 1) if learnt else (False, 0))
            if "mask" in key or not plain:
                raise UserError(
                    f"{source}: a message of the {turn['role']} has {key}={turn[key]!r}, which is "
                    "not read; write weight: 0 in a reply that is not to be learnt"
                )
