"""Columns of rows: found by name or by a path, renamed, and counted where nothing reads them.

A column that is null is not there: tables of mixed rows have every column in every row.
"""

import json
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.hints import nearest
from rlhf_cli.config.schema.data import Data
from rlhf_cli.data.raw import Raw, RowError


class MissingColumn(RowError):
    """A row lacks a column, and may be of another shape."""


PAIR = ("chosen", "rejected")

KINDS = (*PAIR, "messages", "responses", "steps", "completion", "text")
"""The columns that say of which kind a row is."""

COMMON = ("system", "tools", "weight", "source")
"""What a row of any shape may have beside what it asks and answers."""

OURS = ("prompt", *KINDS, "ranks", "scores", "labels", "label", "score", "margin", "p", *COMMON)
"""The columns that data/readers.py reads."""

RULE = "answer"  # the column that our rules read

CLOSE = 0.8  # a name so like one of ours was meant to be it


def is_given(raw: Raw, name: str) -> bool:
    """Whether a row fills a column; empty cells of CSV and pandas' NaN say nothing."""
    value = raw.get(name)
    return value is not None and value != "" and value == value  # NaN is not itself


def column(raw: Raw, name: str, source: str) -> Any:
    """The value of a column that must be there."""
    if raw.get(name) is None:
        raise no_column(raw, name, source)
    return raw[name]


def no_column(raw: Raw, name: str, source: str) -> MissingColumn:
    """The error that names the columns there are, and the nearest of them."""
    names = [str(each) for each in raw if raw[each] is not None]
    found = ", ".join(names) or "none"
    return MissingColumn(f"{source}: no column {name!r}; found {found}{nearest(name, names)}")


def shown(value: Any) -> str:
    """A value as an error line has room for."""
    text = repr(value)
    return text if len(text) <= 30 else f"{text[:27]}..."


def filled(raw: Raw) -> Raw:
    """A row without the columns that are not there: the null ones, and cells of CSV of other kinds.

    An empty text stands for nothing only where another column says of which kind the row is;
    elsewhere it is a fault of the row.
    """
    values = raw.values()
    if None in values:
        raw = {name: value for name, value in raw.items() if value is not None}
    if "" in values:
        said = {name for name in KINDS if raw.get(name)} - (
            {"text"} if raw.get("prompt") else set()
        )
        blank = {*KINDS} - ({*PAIR} if said & {*PAIR} else set()) if said else set()
        if said & {"messages", "text"} or isinstance(raw.get("chosen"), list):
            blank.add("prompt")
        raw = {name: value for name, value in raw.items() if value != "" or name not in blank}
    return raw


# --------------------------------------------------------------------------- renaming


def value_at(raw: Raw, path: str, source: str) -> Any:
    """The value of a column, or of a path into it such as `info.post` or `summaries.0.text`.

    None where the column, or what leads there, is null. Cells of CSV have what is nested as JSON.

    Raises:
        RowError: there is no such column, key or place.
    """
    if path in raw or "." not in path:
        return raw[path] if path in raw else column(raw, path, source)
    value: Any = raw
    walked: list[str] = []
    for key in path.split("."):
        if isinstance(value, str):
            with suppress(ValueError, RecursionError):
                value = json.loads(value)
        if value is None:
            return None
        if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        elif isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, dict):
            at = f" in column {'.'.join(walked)!r}" if walked else ""
            names = [str(name) for name in value]
            found = f"found {', '.join(names) or 'none'}{nearest(key, names)}"
            what = "column" if not walked else "key"
            raise RowError(f"{source}: no {what} {key!r}{at}, for {path!r}; {found}")
        else:
            has = f"{len(value)} values" if isinstance(value, list) else type(value).__name__
            raise RowError(
                f"{source}: column {'.'.join(walked)!r} holds {has}, without {key!r}, for {path!r}"
            )
        walked.append(key)
    return value


def renamed(raw: Raw, columns: dict[str, str], source: str) -> tuple[Raw, Raw]:
    """The row under our column names, by data.columns = {ours: yours}, and what it has beside them.

    What is named wins over a column of our name, and over what else would say of which kind the
    row is; a column has no longer the name it had.

    Returns:
        The columns to read, and those that must not be read though they have one of our names.
    """
    found = {ours: value_at(raw, yours, source) for ours, yours in columns.items()}
    moved = {yours for yours in columns.values() if yours in raw}
    within = {yours.partition(".")[0] for yours in columns.values() if yours not in raw}
    if not found.keys().isdisjoint(KINDS):
        within.update(KINDS)
    if "messages" in found:
        within.add("prompt")
    elif "prompt" in found:
        within.update(("messages", "text"))
    rest = {n: each for n, each in raw.items() if n not in found and n not in moved}
    freed = [name for name in within.intersection(OURS) if rest.get(name) is not None]
    beside = {name: rest.pop(name) for name in freed}
    return rest | found, beside


def check_names(columns: dict[str, str], reads: Collection[str], option: str) -> None:
    """What data.columns maps is read by the rows' shape, or is a column for rules and templates.

    Raises:
        UserError: a name is nearly one that the shape reads, and so a slip.
    """
    for name in columns.keys() - {*reads, RULE}:
        if meant := nearest(name, reads, "data.columns.", CLOSE):
            raise UserError(f"data.columns.{name}: data={option} reads no such column{meant}")


def unused_columns(columns: Counter[str], data: Data) -> Counter[str]:
    """Of the columns that rows keep, and in how many rows, those that nothing of `data` reads.

    `system`, `tools` and `source` are read wherever they are.
    """
    template = data.template or ""
    mapped = {path.partition(".")[0] for path in data.columns.values()}
    return Counter(
        {
            name: count
            for name, count in columns.items()
            if name not in (*COMMON, *mapped)
            and f"{{{name}}}" not in template
            and f"{{{name}." not in template
        }
    )


def unused_note(counts: Counter[str], rows: int) -> str:
    """One line for what `unused_columns` counts; in how many rows where it is not all of them."""
    told = [
        str(name) if count == rows else f"{name} ({count} rows)" for name, count in counts.items()
    ]
    return f"columns not read unless a reward or template names them: {', '.join(told)}"
