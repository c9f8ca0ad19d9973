"""Rows of JSON: an object a line, a list of objects, or objects one after the other.

All are read as they come, one row at a time; only an object that holds all rows is read whole.
"""

import io
import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Any, TextIO

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.raw import NOT_UTF_8, Numbered, RowError, is_unicode

CHUNK = 1 << 20  # characters
TAIL = 16  # characters of a number, a word or an escape that the end of a chunk may have cut
MARK = "\ufeff"  # that some editors put first
BLANK = " \t\n\r" + MARK

# What a row has and an object that holds rows has not.
OF_ROWS = {
    *("prompt", "completion", "chosen", "rejected", "responses", "steps", "text", "messages"),
    *("conversations", "question", "instruction"),
}
OF_MESSAGES = ({"role", "content"}, {"from", "value"})


class _Scanner:
    """Python's decoder, which also notes what it would pass over: NaN, and names given twice."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)
        self.scan = decoder.raw_decode

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in made if names.count(name) > 1)
            self.faults.append(f"names {twice!r} twice")
        return made

    def _constant(self, name: str) -> None:
        self.faults.append(f"holds {name}, which is not JSON; null says that there is no value")

    def fault(self) -> str | None:
        """What was noted of the values since it was asked last."""
        said = self.faults[0] if self.faults else None
        self.faults.clear()
        return said

    def line(self, text: str) -> Any:
        """The one value of a line.

        Raises:
            ValueError: it has none, or more.
        """
        text = text.strip(BLANK)
        value, end = self.scan(text)
        if text[end:].strip(BLANK):
            raise json.JSONDecodeError("Extra data", text, end)
        return value


def parse_json(place: str, stream: TextIO, first: str) -> Numbered:
    """The rows of JSON text, whichever way they are written.

    Args:
        place: the file, for messages.
        first: the first character that is not blank.

    Returns:
        Each row, or its RowError, with its line, or of a list its place in it.
    """
    if first == "[":
        return _list(place, _Text(place, stream))
    return _unpacked(place, _lines(place, stream))


def _lines(place: str, stream: TextIO) -> Numbered:
    """Values, one a line, until one goes on in the next; blank lines are passed over."""
    scanner = _Scanner()
    scan, faults = scanner.scan, scanner.faults
    ahead: list[str] = []
    for number, line in enumerate(_with(ahead, stream), 1):
        if not (line.isascii() or is_unicode(line)):
            yield RowError(f"{place}:{number}: {NOT_UTF_8}"), number
            continue
        try:
            row, end = scan(line)  # the plain case, which is most of them
            if line[end:] not in ("\n", ""):
                row = scanner.line(line)
            if faults:
                row = RowError(f"{place}:{number}: the object {scanner.fault()}")
            yield row, number
        except (ValueError, RecursionError):
            faults.clear()
            if not line.strip(BLANK):
                continue
            after = next(stream, "")
            if _goes_on(line, after):
                yield from _values(place, _Text(place, stream, line + after, number))
                return
            ahead += [after] if after else []
            yield from ((row, number) for row in _rows_of_line(line, f"{place}:{number}"))


def _with(ahead: list[str], stream: TextIO) -> Iterator[str]:
    """The lines of a stream, those that were read of it ahead of their turn included."""
    for line in stream:
        yield line
        while ahead:
            yield ahead.pop()


def _goes_on(line: str, after: str) -> bool:
    """Whether an object that begins on a line seems to end on another: the line is fine as far as
    it goes, the next is no value of its own, and begins as the object would go on.
    """
    text, following = line.strip(BLANK), after.strip(BLANK)
    error = _fault(text)
    if error is None or not text.startswith("{") or _fault(following) is None:
        return False
    if error.pos < len(text) - 1 or error.msg.startswith(("Unterminated", "Extra")):
        return False
    joined = _fault(f"{text}\n{following}")
    return joined is None or joined.pos > len(text) + 1


def _fault(line: str) -> json.JSONDecodeError | None:
    """Why a line is not one value."""
    try:
        _Scanner().line(line)
    except json.JSONDecodeError as error:
        return error
    except (ValueError, RecursionError):
        return None
    return None


def _rows_of_line(line: str, where: str) -> list[Any]:
    """The values of a line, of which there may be several if all are objects, or its RowError."""
    if (error := _fault(line.strip(BLANK))) is not None and error.msg == "Extra data":
        text = _Text(where, io.StringIO(line))
        with suppress(UserError):
            rows = [row for row, _ in _values(where, text)]
            if all(isinstance(row, dict) for row in rows):
                return rows
    return [row_of_line(line, where)]


def row_of_line(line: str, where: str) -> Any:
    """The value of a line of JSON, or its RowError."""
    scanner = _Scanner()
    try:
        row = scanner.line(line)
    except (ValueError, RecursionError) as error:
        return RowError(f"{where}: not JSON: {_said(error)}")
    said = scanner.fault()
    return RowError(f"{where}: the object {said}") if said else row


def _said(error: Exception) -> str:
    """What is wrong with a line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (character {error.pos + 1})"
    return str(error)


class _Text:
    """A stream of JSON text, read in chunks, from the place on that was come to."""

    def __init__(self, place: str, stream: TextIO, ahead: str = "", line: int = 1) -> None:
        self.place, self.stream = place, stream
        self.text, self.at, self.line, self.over = ahead, 0, line, False
        self.scanner = _Scanner()

    def peek(self) -> str:
        """The next character that is not blank, come to; nothing at the end."""
        while True:
            text, at = self.text, self.at
            while at < len(text) and text[at] in BLANK:
                self.line += text[at] == "\n"
                at += 1
            self.at = at
            if at < len(text):
                return text[at]
            if self.over:
                return ""
            self._more()

    def _more(self) -> None:
        """As much again as is at hand, so that a long value is not looked through often."""
        rest = self.text[self.at :]
        chunk = self.stream.read(max(CHUNK, len(rest)))
        self.text, self.at, self.over = rest + chunk, 0, not chunk

    def value(self, number: int | None = None) -> Any:
        """The value that begins here, come past; its RowError where it is one that nobody meant.

        Args:
            number: of the value, to name it by; that of the line if None.

        Raises:
            UserError: here is no JSON.
        """
        number = self.line if number is None else number
        while True:
            try:
                value, end = self.scanner.scan(self.text, self.at)
                if end < len(self.text) or self.over:  # else a number may go on
                    return self._past(value, end, f"{self.place}:{number}")
            except json.JSONDecodeError as error:
                if self.over or not self._is_cut(error):
                    raise self.error(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self.error(str(error), self.at) from None
            self.scanner.fault()
            self._more()

    def _is_cut(self, fault: json.JSONDecodeError) -> bool:
        at_the_end = fault.pos >= len(self.text) - TAIL
        return at_the_end or fault.msg.startswith("Unterminated")

    def _past(self, value: Any, end: int, where: str) -> Any:
        text, said = self.text[self.at : end], self.scanner.fault()
        self.line += text.count("\n")
        self.at = end
        if not is_unicode(text):
            return RowError(f"{where}: {NOT_UTF_8}")
        return RowError(f"{where}: the object {said}") if said else value

    def error(self, what: str, at: int) -> UserError:
        """What is wrong at a character that was read, by its line."""
        line = self.line + self.text.count("\n", self.at, at)
        return UserError(f"{self.place}:{line}: not JSON: {what}")


def _values(place: str, text: _Text) -> Numbered:
    """Values one after the other, whatever is blank between them; the number is a line."""
    while text.peek():
        line = text.line
        yield text.value(), line


def _list(place: str, text: _Text) -> Numbered:
    """The values of a list; the number is the place in it."""
    text.peek()
    text.at += 1
    number, following = 0, text.peek()
    while following != "]":
        number += 1
        yield text.value(number), number
        following = text.peek()
        if following not in (",", "]"):
            raise text.error("the list ends within" if not following else "Expecting ','", text.at)
        if following == ",":
            text.at += 1
            text.peek()
    text.at += 1
    if text.peek():
        raise text.error("more follows the list", text.at)


def _unpacked(place: str, rows: Numbered) -> Numbered:
    """The rows, or those that the only object of a file holds: {"version": 1, "data": [...]}.

    Raises:
        UserError: it holds several lists of objects.
    """
    ahead = [each for each in (next(rows, None), next(rows, None)) if each is not None]
    if len(ahead) != 1 or not isinstance(ahead[0][0], dict):
        yield from chain(ahead, rows)
        return
    whole = ahead[0][0]
    lists = [name for name, value in whole.items() if _is_list_of_rows(value)]
    if not lists or OF_ROWS & (whole.keys() - {*lists[:1]}) or _has_messages(whole):
        yield from ahead
        return
    if len(lists) > 1:
        raise UserError(
            f"{place}: one object with several lists of objects ({', '.join(lists)}); write the "
            "list to be read to a file of its own"
        )
    yield from ((row, number) for number, row in enumerate(whole[lists[0]], 1))


def _is_list_of_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _has_messages(whole: dict[str, Any]) -> bool:
    """Whether a list of it is a dialogue."""
    return any(
        message <= value[0].keys()
        for value in whole.values()
        if _is_list_of_rows(value)
        for message in OF_MESSAGES
    )
