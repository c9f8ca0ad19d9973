"""Prompts and rows that are piped in."""

import io
import sys
from collections.abc import Iterator
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.json_rows import row_of_line
from rlhf_cli.data.raw import ESCAPED, NOT_UTF_8, Raw, RowError, is_unicode

STDIN = "-"  # as a path

_stdin: dict[str, Any] = {}  # the stream that was read, and its lines


def stdin_lines() -> list[str]:
    """The lines of standard input, which is read once; bytes that are no UTF-8 are escaped.

    Raises:
        UserError: it is closed, or is not to be read.
    """
    stream = sys.stdin
    if stream is None:
        raise UserError(f"data.path={STDIN}: standard input is closed; pipe the prompts in")
    if _stdin.get("stream") is not stream:
        try:
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8-sig", errors=ESCAPED)
            lines = list(stream)
        except (OSError, ValueError) as error:  # a folder, a file that is only written, closed
            fault = error.strerror if isinstance(error, OSError) else None
            raise UserError(
                f"data.path={STDIN}: standard input cannot be read: {fault or error}"
            ) from None
        _stdin.update(stream=stream, lines=lines)
    return list(_stdin["lines"])


def read_stdin() -> Iterator[tuple[Raw | RowError, str]]:
    """Each line as the row that it is in JSON, or else as a prompt, with `stdin:line`; blank lines
    are passed over.
    """
    for number, line in enumerate(stdin_lines(), 1):
        if line.strip():
            yield _row_of(line.rstrip("\r\n"), f"stdin:{number}"), f"stdin:{number}"


def _row_of(line: str, where: str) -> Raw | RowError:
    if not is_unicode(line):
        return RowError(f"{where}: {NOT_UTF_8}")
    if line.lstrip().startswith("{"):
        row = row_of_line(line, where)
        # a prompt may begin with a brace; with the name of a column it is a row that was cut
        if isinstance(row, dict) or line.lstrip().startswith('{"'):
            return row
    return {"prompt": line}
