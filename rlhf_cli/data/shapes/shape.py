"""A published shape: the columns that it reads, and how they become ours.

What a shape does not read stays with the row, for rules and templates.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rlhf_cli.data.columns import COMMON, column, is_given
from rlhf_cli.data.kinds import Row
from rlhf_cli.data.raw import Raw, RowError
from rlhf_cli.data.readers import as_row, items_of

AsOurs = Callable[[Raw, str], Raw]
"""Our columns of a raw row; the text says where it stands, for messages. Raises RowError."""


@dataclass(frozen=True)
class Shape:
    """The columns that a shape reads, and what makes ours of them."""

    reads: tuple[str, ...]
    as_ours: AsOurs

    def __call__(self, raw: Raw, source: str) -> Row:
        """The row, with the columns that the shape does not read.

        Raises:
            RowError: a column is missing, or holds something else than the shape has there.
        """
        common = {name: raw[name] for name in COMMON if name in raw}
        row = as_row(common | self.as_ours(raw, source), source)
        for name, value in raw.items():
            if name not in self.reads and name not in COMMON and value is not None:
                row.columns.setdefault(name, value)
        return row


def reads(*names: str) -> Callable[[AsOurs], Shape]:
    """Makes a shape of the function that makes our columns of these."""
    return lambda as_ours: Shape(names, as_ours)


def given(raw: Raw, *names: str) -> Raw:
    """Those of some columns that a row fills."""
    return {name: raw[name] for name in names if is_given(raw, name)}


def needing(*names: str, also: tuple[str, ...] = ()) -> Shape:
    """A shape in our own columns, of which some must be there."""

    def as_ours(raw: Raw, source: str) -> Raw:
        return {name: column(raw, name, source) for name in names} | given(raw, *also)

    return Shape((*names, *also), as_ours)


def object_of(raw: Raw, name: str, source: str) -> Raw:
    """A column that must hold an object; CSV has it as JSON."""
    value = column(raw, name, source)
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, dict):
        has = type(value).__name__
        raise RowError(f"{source}: column {name!r} holds {has}, expected an object")
    return value


def objects_of(raw: Raw, name: str, source: str) -> list[Raw]:
    """A column that must hold a list of objects."""
    values = items_of(raw, name, source)
    if not all(isinstance(value, dict) for value in values):
        raise RowError(f"{source}: column {name!r} must hold a list of objects")
    return values


def inner(value: Raw, key: str, name: str, source: str) -> Any:
    """What an object of column `name` has under a key."""
    if value.get(key) is None:
        found = ", ".join(map(str, value)) or "none"
        raise RowError(f"{source}: column {name!r}: no {key!r}; found {found}")
    return value[key]
