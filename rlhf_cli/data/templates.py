"""Texts with {columns} in them, the chat templates that are shipped, and rows as dialogues."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.data import Data
from rlhf_cli.data.columns import OURS, value_at
from rlhf_cli.data.kinds import Message, Reply, Turns, reply_text

CHAT = "chat"
PLAIN = "{prompt}"
SHIPPED = Path(__file__).parent / "templates"
MAY_BE_EMPTY = ("input", "context", "system")  # columns that rows may leave out
PIECE = re.compile(r"\{\{|\}\}|\{([^\W\d]\w*(?:\.\w+)*)\}|\{([^{}\"'\\]*)\}")
SLIP = re.compile(
    r"\A\s*(.*?)\s*(?:[!:].*)?\Z", re.DOTALL
)  # a name with blanks or a format around it


# --------------------------------------------------------------------------- text


@dataclass
class TextTemplate:
    """A text with {prompt} and other {columns} in it; doubled braces are braces.

    A name may be a path into a column, such as {info.title}. A brace that is not around a name, as
    in JSON, is itself.
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
            if match[2] is not None:
                plain += match[0]
            elif match[1] is None:
                plain += match[0][0]
            else:
                parts.append((plain, match[1]))
                plain = ""
        return [*parts, (plain + self.text[start:], None)]

    @cached_property
    def slips(self) -> dict[str, str]:
        """What stands in braces and is no name, with the name that may have been meant."""
        inside = [str(match[2]) for match in PIECE.finditer(self.text) if match[2] is not None]
        return {each: SLIP.sub(r"\1", each, count=1) for each in inside}

    @cached_property
    def names(self) -> list[str]:
        """The columns that it shows, the prompt beside them."""
        return [name for _, name in self.parts if name is not None and name != "prompt"]

    @cached_property
    def heads(self) -> set[str]:
        """The columns into which its names lead."""
        return {name.partition(".")[0] for name in self.names}

    def fill(self, prompt: str, columns: dict[str, Any], source: str) -> str:
        """The text of a row.

        Raises:
            UserError: the row lacks a column, or has a system message that the text does not show,
                or the text has a column in braces as no column is written.
        """
        for slip, meant in self.slips.items():
            if meant == "prompt" or meant in columns:
                raise UserError(
                    f"{source}: data.template has {{{slip}}}, which is not how a column is "
                    f"written: {{name}}, of letters, digits and _; data.columns renames one, and "
                    f"{{{{{slip}}}}} is plain braces"
                )
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
    head = name.partition(".")[0]
    value = columns.get(name)
    if value is None and head in columns and head != name:
        value = value_at(columns, name, f"{source}: data.template")
    if value is None and name not in MAY_BE_EMPTY:
        known = ", ".join(["prompt", *columns])
        why = f"the row has no {name} (it has {known})"
        if name in OURS:
            why = f"{name} says what a row is and is shown by no template (copy it to a new column)"
        raise UserError(
            f"{source}: data.template has {{{name}}}, but {why}; write {{{{{name}}}}} for plain "
            "braces"
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


def prefix_of(data: Data) -> str:
    """The text that stands before every prompt; "" without data.prefix.

    Raises:
        UserError: the file cannot be read, or is empty.
    """
    if data.prefix is None:
        return ""
    try:
        text = Path(data.prefix).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"data.prefix={data.prefix}: {reason}") from None
    if not text.strip():
        raise UserError(f"data.prefix={data.prefix} is empty")
    return text


def under(prefix: str, turns: Turns) -> Turns:
    """A dialogue whose system message begins with a prefix; it has one from then on."""
    if not prefix:
        return turns
    system, rest = (turns[:1], turns[1:]) if turns[0]["role"] == "system" else ([], turns)
    content = "\n\n".join([prefix.rstrip(), *map(reply_text, system)])
    return [{"role": "system", "content": content}, *rest]


def turns_of(prompt: str | Turns, columns: dict[str, Any]) -> Turns:
    """A prompt as a dialogue."""
    if not isinstance(prompt, str):
        return prompt
    system = columns.get("system")
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": prompt}]


def asked_alone(prompt: str | Turns, columns: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The prompt and the columns of a dialogue that is one question, under a system message or not;
    None of another.
    """
    if isinstance(prompt, str):
        return prompt, columns
    *before, last = prompt
    if [turn["role"] for turn in prompt] == ["system", "user"]:
        return str(last["content"]), {**columns, "system": before[0]["content"]}
    return (str(last["content"]), columns) if not before and last["role"] == "user" else None


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
