"""Tables that fit: cells wrap at words; where even that is too wide each row becomes a block."""

import math
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

GAP = "  "  # between columns
INDENT = "  "  # of a block
LONGEST_WORD = 40  # characters that stay on one line; longer ones are folded
LEAST_TEXT = 16  # a column of text is never narrower, if it has that much
MOST_DECIMALS = 5  # with more zeros than digits a number has an exponent
LEAST_LIMIT = 20  # no terminal is taken for narrower

_console = Console(width=80)  # by whose rules text wraps; it prints nothing


def show(value: object) -> str:
    """A value as tables show it: floats with four digits, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def with_error(value: float, stderr: float | None) -> str:
    """0.745 ± 0.023: as many decimals as tell two digits of the error; without one, four digits."""
    if not stderr or not math.isfinite(stderr):
        return show(value)
    decimals = max(0, 1 - math.floor(math.log10(stderr)))
    if decimals > MOST_DECIMALS:
        return f"{value:.2g} ± {stderr:.2g}"
    return f"{value:.{decimals}f} ± {stderr:.{decimals}f}"


def laid_out(heads: Sequence[str], rows: Sequence[Sequence[str]], limit: int) -> list[str]:
    """The lines of a table, none wider than `limit` columns; its head comes first.

    Numbers stand on the right and are never cut: a cut one is another number. Where the columns do
    not fit side by side, each row is a block of lines `head  cell`, and no head comes first.
    """
    limit = max(limit, LEAST_LIMIT)
    columns = _columns(heads, rows)
    numeric = [bool(column[1:]) and all(map(_is_number, column[1:])) for column in columns]
    natural = [max(map(_widest_line, column)) for column in columns]
    least = [_least(column, is_number) for column, is_number in zip(columns, numeric, strict=True)]
    widths = shared_out(natural, least, limit - len(GAP) * (len(heads) - 1))
    if widths is None:
        return _blocks(heads, rows or [[""] * len(heads)], limit)
    lines: list[str] = []
    for row in [heads, *rows]:
        lines += _side_by_side(row, widths, numeric)
    return lines


def side_by_side(heads: Sequence[str], rows: Sequence[Sequence[str]], limit: int) -> bool:
    """Whether the columns of a table fit beside each other, each row on one line."""
    natural = [max(map(_widest_line, column)) for column in _columns(heads, rows)]
    return sum(natural) + len(GAP) * (len(heads) - 1) <= limit


def _columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Each column with its head before its cells."""
    return [[head, *cells] for head, cells in zip(heads, _turned(rows, len(heads)), strict=True)]


def shared_out(natural: Sequence[int], least: Sequence[int], limit: int) -> list[int] | None:
    """A width for each column, the widest ones made narrower first; None where there is no room."""
    if sum(least) > limit:
        return None
    widths = list(natural)
    while sum(widths) > limit:
        widest = max(range(len(widths)), key=lambda i: widths[i] if widths[i] > least[i] else -1)
        widths[widest] -= 1
    return widths


def wrapped(text: str, width: int) -> list[str]:
    """A text in lines of at most `width` columns, parted at words where that can be."""
    parts = Text(text).wrap(_console, width, overflow="fold")
    return [part.plain.rstrip() for part in parts] or [""]


def _turned(rows: Sequence[Sequence[str]], count: int) -> list[list[str]]:
    return [[row[i] for row in rows] for i in range(count)]


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.lstrip("-+")[:1].isdigit()


def _widest_line(cell: str) -> int:
    return max(map(cell_len, cell.splitlines()), default=0)


def _least(column: Sequence[str], is_number: bool) -> int:
    """How narrow a column may be: its words stay whole, and so do its numbers."""
    words = [min(cell_len(word), LONGEST_WORD) for cell in column for word in cell.split()]
    longest = max(words, default=0)
    if is_number:
        return max(longest, *map(_widest_line, column[1:]))
    return max(longest, min(max(map(_widest_line, column)), LEAST_TEXT))


def _side_by_side(row: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> list[str]:
    """The lines of one row."""
    cells = [wrapped(cell, width) for cell, width in zip(row, widths, strict=True)]
    lines = []
    for i in range(max(map(len, cells))):
        parts = []
        for cell, width, right in zip(cells, widths, numeric, strict=True):
            part = cell[i] if i < len(cell) else ""
            space = " " * (width - cell_len(part))
            parts.append(space + part if right else part + space)
        lines.append(GAP.join(parts).rstrip())
    return lines


def _blocks(heads: Sequence[str], rows: Sequence[Sequence[str]], limit: int) -> list[str]:
    """Each row as lines of its own, with an empty line between two rows."""
    label = min(max(map(cell_len, heads)), limit // 2)
    lines: list[str] = []
    for row in rows:
        lines += [""] * bool(lines)
        for head, cell in zip(heads, row, strict=True):
            names = wrapped(head, label)
            values = wrapped(cell, limit - len(INDENT) - label - len(GAP))
            for i in range(max(len(names), len(values))):
                name = names[i] if i < len(names) else ""
                value = values[i] if i < len(values) else ""
                padded = name + " " * (label - cell_len(name))
                lines.append(f"{INDENT}{padded}{GAP}{value}".rstrip())
    return lines
