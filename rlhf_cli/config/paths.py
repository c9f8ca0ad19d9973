"""Which texts can be a path at all; others must not reach the system, which answers with errors."""

LONGEST_NAME, LONGEST = 255, 4095  # bytes, of Linux and macOS


def is_path(text: str) -> bool:
    """Whether a text could name a file: no zero byte, no half character, not too long."""
    try:
        names = text.encode().split(b"/")
    except UnicodeEncodeError:
        return False
    short = all(len(name) <= LONGEST_NAME for name in names)
    return short and len(text.encode()) <= LONGEST and "\0" not in text
