"""Tables of figures by name, of which what is not known anywhere is left out."""

from collections.abc import Callable, Mapping
from typing import Any

from rlhf_cli.reporting.plots import numbers
from rlhf_cli.views.html import cell, said, table

Column = Callable[[Mapping[str, Any]], str | None]
"""What a table says of figures; None where they do not know it."""


def grid(head: str, told: Mapping[str, Mapping[str, Any]], columns: Mapping[str, Column]) -> str:
    """A table with a row for each name, and the columns of which something is known."""
    cells = {title: [of(each) for each in told.values()] for title, of in columns.items()}
    known = {title: column for title, column in cells.items() if any(column)}
    rows = [list(row) for row in zip(map(said, told), *known.values(), strict=True)]
    return table([head, *known], rows) if rows and known else ""


def count_of(key: str) -> Column:
    """A column of whole numbers."""
    return lambda each: cell(each, key, ".0f")


def share_of(key: str) -> Column:
    """A column of shares."""
    return lambda each: cell(each, key, ".3f")


def within(key: str, low: str = "low", high: str = "high") -> Column:
    """A column of shares, each with its 95% interval, under the names of all three."""

    def share(each: Mapping[str, Any]) -> str | None:
        value, ends = cell(each, key, ".3f"), numbers(each, low, high)
        return f"{value} ({ends[0]:.3f} to {ends[1]:.3f})" if value and ends else value

    return share
