"""Text and dialogues as rows have them: messages of one form, and a prompt apart from its replies.

Wherever a row has text it may have messages: as a list of them, as one, or as JSON in a cell.
"""

import json
import re
from contextlib import suppress
from typing import Any

from rlhf_cli.data.columns import column, is_given, shown
from rlhf_cli.data.kinds import Message, Reply, Turns, reply_text
from rlhf_cli.data.raw import Raw, RowError

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "function_response"), "tool"),
    "system": "system",
    "developer": "developer",
    "function_call": "assistant",  # what it says is the call
}
USUAL = ("user", "assistant", "system", "tool", "developer")
SYSTEM = ("system", "developer")

PLAIN = frozenset(("role", "content"))
MEDIA = ("images", "image", "audio", "audios", "video", "videos")
WRITTEN_BY_PYTHON = re.compile(  # also by numpy, which has no commas between messages
    r"(?:array\(|[\s(\[])*\{(?=\s*'\w+'\s*:)(?=.*'(?:role|from)'\s*:)"
    r"(?=.*'(?:content|value)'\s*:).*[\])}]\s*$",
    re.DOTALL,
)

Cell = str | Turns
"""What a column of text holds: text, or messages."""


# --------------------------------------------------------------------------- text


def cell_of(raw: Raw, name: str, source: str) -> Cell:
    """A column that must hold text or messages, neither of them empty.

    Text is taken for messages only where all of it is a JSON list of messages, or one message.
    """
    value = column(raw, name, source)
    if isinstance(value, str):
        said = value.strip()
        if not said:
            raise RowError(f"{source}: column {name!r} is empty")
        if said[0] in "[{" and (turns := turns_in(said, name, source)) is not None:
            return turns
        check_text(value, name, source)
        return value
    if isinstance(value, list) and value:
        return turns_of(value, name, source)
    if isinstance(value, dict) and ("role" in value or "from" in value):
        return turns_of([value], name, source)
    has = "nothing" if value == [] else type(value).__name__
    raise RowError(f"{source}: column {name!r} holds {has}, expected text")


def turns_in(text: str, name: str, source: str) -> Turns | None:
    """The messages that a text is in JSON, as tables have them; None where it is something else."""
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, dict):
            speaker = value.get("role", value.get("from"))
            one = is_message(value) and len(value) == 2 and str(speaker).lower() in ROLES
            return turns_of([value], name, source) if one else None
        if value and all(isinstance(each, dict) and is_message(each) for each in value):
            return turns_of(value, name, source)
    return None


def is_message(value: Raw) -> bool:
    """Whether an object has who speaks and what is said."""
    said = not value.keys().isdisjoint(("content", "tool_calls", "function_call"))
    return ("role" in value and said) or ("from" in value and "value" in value)


def text_of(raw: Raw, name: str, source: str) -> str:
    """A column that must hold text, or a message whose text it is."""
    cell = cell_of(raw, name, source)
    if isinstance(cell, str):
        return cell
    text = reply_text(cell[-1])
    if len(cell) > 1 or not text.strip():
        raise RowError(f"{source}: column {name!r} holds {len(cell)} messages, expected text")
    return text


def check_text(text: str, name: str, source: str) -> None:
    """Text has whole characters, and is not messages as a table of Python's printed them."""
    if WRITTEN_BY_PYTHON.match(text):
        raise RowError(
            f"{source}: column {name!r} holds messages as Python prints them; write them as JSON"
        )
    check_characters(text, name, source)


def check_characters(text: str, name: str, source: str) -> None:
    """Every character is a whole one: JSON can write halves, which no tokenizer takes."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise RowError(f"{source}: column {name!r} holds half a character: {half}") from None


# --------------------------------------------------------------------------- messages


def turns_of(value: Any, name: str, source: str) -> Turns:
    """A list of messages, checked and in one form; cells of tables have it as JSON."""
    if isinstance(value, str):
        check_text(value, name, source)
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list) or not value:
        raise RowError(f"{source}: column {name!r} must hold a list of messages")
    return [message_of(message, name, source) for message in value]


def message_of(value: Any, name: str, source: str) -> Message:
    """A message with the role and content of `kinds.Message`; null keys are not there.

    Raises:
        RowError: it has no role or content, or one of another form.
    """
    where = f"{source}: column {name!r}"
    if not isinstance(value, dict):
        raise RowError(f"{where} needs messages with role and content")
    if len(value) == 2 and value.get("role") in USUAL and isinstance(value.get("content"), str):
        check_content(value, name, source)
        return value
    message = {key: part for key, part in value.items() if part is not None}
    if "role" not in message and "from" in message:
        message = {"role": message.pop("from"), "content": message.pop("value", None), **message}
    spelt, content = message.get("role"), message.get("content")
    if spelt is None or not isinstance(spelt, str):
        has = "" if spelt is None else f": role holds {type(spelt).__name__}, expected text"
        raise RowError(f"{where}{has or ' needs messages with role and content'}")
    role = ROLES.get(spelt.strip().lower())
    if role is None:
        raise RowError(
            f"{where}: role {shown(spelt)} is none of system, user, assistant and tool, nor "
            "another word for one of them (human, gpt, ...)"
        )
    message["role"] = role
    if spelt == "function_call":
        message["tool_calls"], content = [call_in(content, where)], None
    calls = calls_of(message, where)
    if content is None and not calls:
        has = (
            ": content holds NoneType, expected text" if {"content", "value"} & value.keys() else ""
        )
        raise RowError(f"{where}{has or ' needs messages with role and content'}")
    message["content"] = content if content is None else content_of(content, where)
    check_content(message, name, source)
    if media := next((key for key in MEDIA if message.get(key)), None):
        raise RowError(f"{where}: a message holds {media!r}; only text is read")
    if "weight" in message:
        check_message_weight(message, where)
    return message


def check_content(message: Message, name: str, source: str) -> None:
    """What a message says is sound text; a tool may well have printed a message."""
    if isinstance(message["content"], str):
        check = check_characters if message["role"] == "tool" else check_text
        check(message["content"], name, source)


def content_of(value: Any, where: str) -> str:
    """What a message says: text, or a list of parts of text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RowError(f"{where}: content holds {type(value).__name__}, expected text")
    parts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            has = f"a part of type {shown(kind)}" if kind != "text" else "a part without text"
            raise RowError(f"{where}: content holds {has}; only text is read, no images or sounds")
        parts.append(text)
    return "".join(parts)


def calls_of(message: Message, where: str) -> bool:
    """Whether a message calls tools; its `tool_calls` are brought into the form templates read.

    Their arguments are objects there, which some write as JSON text: a template would quote it.
    """
    once = message.pop("function_call", None)  # as OpenAI had it before
    if once and message.get("tool_calls"):
        raise RowError(f"{where}: a message has both function_call and tool_calls")
    if once:
        message["tool_calls"] = [call_in(once, where)]
    calls = message.get("tool_calls")
    if isinstance(calls, str):
        with suppress(ValueError, RecursionError):
            calls = json.loads(calls)
    if not calls:
        message.pop("tool_calls", None)
        return False
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(f"{where}: tool_calls holds {shown(calls)}, expected a list of calls")
    if message["role"] != "assistant":
        raise RowError(f"{where}: tool_calls stand in a message of the {message['role']}")
    message["tool_calls"] = [with_arguments(call) for call in calls]
    return True


def with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A call whose arguments are an object, where they are one in JSON."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": with_arguments(call["function"])}
    if isinstance(call.get("arguments"), str):
        with suppress(ValueError, RecursionError):
            given = json.loads(call["arguments"])
            return {**call, "arguments": given} if isinstance(given, dict) else call
    return call


def call_in(content: Any, where: str) -> dict[str, Any]:
    """The call that a message of role or key function_call says: {name, arguments}, or its JSON."""
    call = content
    if isinstance(content, str):
        with suppress(ValueError, RecursionError):
            call = json.loads(content)
    if not isinstance(call, dict) or "name" not in call:
        raise RowError(f"{where}: function_call holds {shown(content)}, expected a call in JSON")
    return {"type": "function", "function": call}


def check_message_weight(message: Message, where: str) -> None:
    """A message's weight says whether a reply is learnt: kept where it is 0, as 1 is the usual."""
    weight = message["weight"]
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(
            f"{where}: the weight of a message is 0 or 1, this one holds {shown(weight)}"
        )
    if weight == 1 and message["role"] != "assistant":
        raise RowError(
            f"{where}: a message of the {message['role']} has weight 1, but only the "
            "assistant's are learnt"
        )
    if weight == 1 or message["role"] != "assistant":
        del message["weight"]


# --------------------------------------------------------------------------- dialogues


def with_system(prompt: Turns, raw: Raw, source: str) -> Turns:
    """A dialogue under the row's system message, if it has a column for it."""
    system = system_of(raw, source)
    if system is None:
        return prompt
    if prompt[0]["role"] not in SYSTEM:
        return [{"role": "system", "content": system}, *prompt]
    if prompt[0]["content"].strip() != system.strip():
        raise RowError(f"{source}: column 'system' differs from the dialogue's system message")
    return prompt


def as_turns(prompt: Cell, raw: Raw, source: str) -> Turns:
    """A prompt as a dialogue, under the row's system message."""
    if isinstance(prompt, str):
        return with_system([{"role": "user", "content": prompt}], raw, source)
    return prompt


def system_of(raw: Raw, source: str) -> str | None:
    """The system message of a row, by its column; None where there is none."""
    return text_of(raw, "system", source) if is_given(raw, "system") else None


def split_turns(turns: Turns, name: str, source: str) -> tuple[Turns, Message]:
    """A dialogue as what is before its last message, and that message, the assistant's."""
    last = turns[-1]
    says = reply_text(last).strip() or "tool_calls" in last
    if last["role"] != "assistant" or not says:
        raise RowError(f"{source}: column {name!r} must end in a reply of the assistant")
    return turns[:-1], last


def reply_of(message: Message, name: str, source: str, judged: bool) -> Reply:
    """The assistant's last message as a response: its text where it has nothing else."""
    if message.keys() == PLAIN:
        return str(message["content"])
    if judged and "weight" in message:
        raise RowError(f"{source}: column {name!r}: a reply of weight 0 cannot be judged")
    return message


def answered(
    raw: Raw, prompt: Cell | None, name: str, cell: Cell, source: str, judged: bool = True
) -> tuple[Cell, Reply, int]:
    """A prompt and a response to it, where the response's cell may hold part of the dialogue.

    A cell of several messages is the whole dialogue, of which the prompt is the beginning or the
    last question; or what came after the prompt, beginning with the assistant.

    Args:
        prompt: the column prompt, without the system message of the column `system`; None where
            there is none.
        cell: what column `name` holds.

    Returns:
        The prompt (under the system message, if it is a dialogue), the response, and how many
        messages of the prompt are given as such.
    """
    head: Turns = []
    reply: Reply
    if isinstance(cell, str):
        reply = cell
    else:
        head, last = split_turns(cell, name, source)
        if head and head[-1]["role"] == "assistant" and not judged:
            raise RowError(
                f"{source}: column {name!r} ends in two messages of the assistant; join them"
            )
        reply = reply_of(last, name, source, judged)
    if prompt is None and not head:
        column(raw, "prompt", source)
    asked, given = joined(prompt, head, name, source)
    if isinstance(asked, str):
        return asked, reply, 0
    whole = with_system(asked, raw, source)
    return whole, reply, given + len(whole) - len(asked)


def joined(prompt: Cell | None, head: Turns, name: str, source: str) -> tuple[Cell, int]:
    """The messages that a response answers, and how many of them the prompt says.

    Args:
        head: what stands before the response in its column.
    """
    if prompt is None:
        return head, len(head)
    if not head:
        return prompt, len(prompt)
    mine = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    own = mine[:1] if mine[0]["role"] in SYSTEM and head[0]["role"] not in SYSTEM else []
    asked = mine[len(own) :]
    start = 1 if head[0]["role"] in SYSTEM and asked and asked[0]["role"] not in SYSTEM else 0
    for at in (len(head) - len(asked), start):  # the last question, or the beginning
        if same(head[at : at + len(asked)], asked):
            return [*own, *head], len(own) + at + len(asked)
    if head[0]["role"] == "assistant":
        return [*mine, *head], len(mine)
    raise RowError(
        f"{source}: column {name!r} is a dialogue that neither begins with column 'prompt' nor has "
        "it as the last question; leave out one of them"
    )


def same(some: Turns, others: Turns) -> bool:
    """Whether messages say the same, white space around them aside."""
    return len(some) == len(others) and all(
        one["role"] == two["role"] and reply_text(one).strip() == reply_text(two).strip()
        for one, two in zip(some, others, strict=True)
    )
