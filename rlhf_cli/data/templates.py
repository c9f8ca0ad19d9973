"""Texts with {columns} in them, the chat templates that are shipped, and rows as dialogues."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.kinds import Message, Reply, Turns, reply_text

CHAT = "chat"
PLAIN = "{prompt}"
SHIPPED = Path(__file__).parent / "templates"
MAY_BE_EMPTY = ("input", "context", "system")  # columns that rows may leave out
PIECE = re.compile(r"\{\{|\}\}|\{([^\W\d]\w*)\}")


# --------------------------------------------------------------------------- text


@dataclass
class TextTemplate:
    """A text with {prompt} and other {columns} in it; doubled braces are braces.

    A brace that is not around a name, as in JSON, is itself.
    """

    text: str

    @cached_property
    def parts(self) -> list[tuple[str, str | None]]:
        """Pieces of text, each with the column that comes after it; the last has none."""
        parts: list[tuple[str, str | None]] = []
        plain, start = "", 0
        for match in PIECE.finditer(self.text):
            plain += self.text[start : match.start()]
            start = match.end()
            if match[1] is None:
                plain += match[0][0]
            else:
                parts.append((plain, match[1]))
                plain = ""
        return [*parts, (plain + self.text[start:], None)]

    @cached_property
    def names(self) -> list[str]:
        """The columns that it shows, the prompt beside them."""
        return [name for _, name in self.parts if name is not None and name != "prompt"]

    def fill(self, prompt: str, columns: dict[str, Any], source: str) -> str:
        """The text of a row.

        Raises:
            UserError: the row lacks a column, or has a system message that the text does not show.
        """
        if columns.get("system") and "system" not in self.names:
            raise UserError(
                f"{source}: the row has a system message, but data.template={self.text!r} has no "
                "{system} to show it; write one into it, or set data.template=chat"
            )
        written = []
        for plain, name in self.parts:
            written.append(plain)
            if name == "prompt":
                written.append(prompt)
            elif name is not None:
                written.append(_column(name, columns, source))
        return "".join(written)


def _column(name: str, columns: dict[str, Any], source: str) -> str:
    """A column as text."""
    value = columns.get(name)
    if value is None and name not in MAY_BE_EMPTY:
        known = ", ".join(["prompt", *columns])
        raise UserError(
            f"{source}: data.template has {{{name}}}, but the row has no {name} (it has {known}); "
            f"write {{{{{name}}}}} for plain braces"
        )
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)


# --------------------------------------------------------------------------- chat


def chat_template_of(name: str) -> str:
    """The Jinja text of data.chat_template: one that is shipped, or a file.

    Raises:
        UserError: there is none of that name.
    """
    shipped = sorted(file.stem for file in SHIPPED.glob("*.jinja"))
    file = SHIPPED / f"{name}.jinja" if name in shipped else Path(name).expanduser()
    try:
        return file.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(
            f"data.chat_template={name}: {reason}; give a Jinja file or {', '.join(shipped)}"
        ) from None


def turns_of(prompt: str | Turns, columns: dict[str, Any]) -> Turns:
    """A prompt as a dialogue."""
    if not isinstance(prompt, str):
        return prompt
    system = columns.get("system")
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": prompt}]


def message_of(reply: Reply) -> Message:
    """A reply as the assistant's message."""
    return {"role": "assistant", "content": reply} if isinstance(reply, str) else reply


def continues(turns: Turns) -> bool:
    """Whether a response goes on with the last message."""
    last = turns[-1] if turns else {}
    return (
        last.get("role") == "assistant" and bool(last.get("content")) and not last.get("tool_calls")
    )


def replied(turns: Turns, reply: Reply) -> Turns:
    """The dialogue with its reply."""
    if not continues(turns):
        return [*turns, message_of(reply)]
    last = turns[-1]
    joined = {**last, **message_of(reply), "content": last["content"] + reply_text(reply)}
    return [*turns[:-1], joined]
