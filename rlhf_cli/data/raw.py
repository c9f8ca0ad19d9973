"""A row as a file holds it, and one that cannot be read."""

from collections.abc import Iterator
from typing import Any

from rlhf_cli.config.errors import UserError

Raw = dict[str, Any]


class RowError(UserError):
    """One row is unreadable, empty or misshapen; data.bad_rows says what to do about it."""


Numbered = Iterator[tuple[Any, int]]  # rows, of which each should be a Raw, and where they stand

NOT_UTF_8 = "not text in UTF-8"
ESCAPED = "surrogateescape"  # bytes that are not UTF-8 become half characters, which no UTF-8 has


def is_unicode(text: str) -> bool:
    """Whether text is what UTF-8 can say, as what was escaped is not."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
