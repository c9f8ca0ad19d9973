"""Which texts can be a path at all; others must not reach the system, which answers with errors."""

import os

LONGEST_NAME, LONGEST = 255, 4095  # bytes, of Linux and macOS


def is_path(text: str) -> bool:
    """Whether a text could name a file: no zero byte, no half character, not too long."""
    try:
        whole = os.fsencode(text)
    except UnicodeEncodeError:
        return False
    names = whole.split(b"/")
    return b"\0" not in whole and len(whole) <= LONGEST and max(map(len, names)) <= LONGEST_NAME
