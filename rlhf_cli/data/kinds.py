"""The kinds of rows, and which kind is soundly derived from which."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

Turns = list[dict[str, str]]
"""A dialogue: messages with `role` and `content`."""


@dataclass
class Prompt:
    """Something to respond to; `columns` keeps the row's other fields for rules (answer, ...)."""

    prompt: str | Turns
    columns: dict[str, Any] = field(default_factory=dict)
    source: str = ""


@dataclass
class Demonstration:
    """A prompt with a response to imitate, and the row's other fields."""

    prompt: str | Turns
    completion: str
    source: str = ""
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass
class Text:
    """Plain text: every token is trained on."""

    text: str
    source: str = ""


@dataclass
class Preference:
    """Two responses to one prompt, the first preferred."""

    prompt: str | Turns
    chosen: str
    rejected: str
    source: str = ""


@dataclass
class Ranking:
    """K >= 2 responses to one prompt; rank 1 is best and ties are allowed."""

    prompt: str | Turns
    responses: list[str]
    ranks: list[float]
    source: str = ""


Row = Prompt | Demonstration | Text | Preference | Ranking


def pairs_of(row: Ranking) -> list[Preference]:
    """All C(K, 2) comparisons of a ranking; ties are no comparison."""
    pairs = []
    for i, j in combinations(range(len(row.responses)), 2):
        if row.ranks[i] != row.ranks[j]:
            better, worse = (i, j) if row.ranks[i] < row.ranks[j] else (j, i)
            pairs.append(
                Preference(row.prompt, row.responses[better], row.responses[worse], row.source)
            )
    return pairs


def best_of(row: Ranking) -> Demonstration:
    """The best response of a ranking; the first of several."""
    best = min(range(len(row.ranks)), key=row.ranks.__getitem__)
    return Demonstration(row.prompt, row.responses[best], row.source)


Derive = Callable[[Any], list[Any]]

DERIVATIONS: dict[type, dict[type, Derive]] = {
    Demonstration: {
        Text: lambda row: [row],  # sft trains on all tokens of plain text
        Preference: lambda row: [Demonstration(row.prompt, row.chosen, row.source)],
        Ranking: lambda row: [best_of(row)],
    },
    Preference: {Ranking: pairs_of},
    Prompt: {
        Demonstration: lambda row: [Prompt(row.prompt, row.columns, row.source)],
        Preference: lambda row: [Prompt(row.prompt, {}, row.source)],
        Ranking: lambda row: [Prompt(row.prompt, {}, row.source)],
    },
    Text: {},
}


def derive(rows: list[Row], kind: type) -> tuple[list[Any], list[Row]]:
    """Rows of `kind` made from `rows`, and the rows from which none can be made."""
    made: list[Any] = []
    unfit: list[Row] = []
    for row in rows:
        if isinstance(row, kind):
            made.append(row)
        elif derivation := DERIVATIONS[kind].get(type(row)):
            made.extend(derivation(row))
        else:
            unfit.append(row)
    return made, unfit
