"""The kinds of rows, and which kind is soundly derived from which.

A derivation is silent, so it decides nothing about feedback: that is data/conversions.py.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, get_args

Turns = list[dict[str, str]]
"""A dialogue: messages with `role` and `content`."""


@dataclass
class Prompt:
    """Something to respond to; `columns` keeps the row's other fields for rules (answer, ...).

    beside: what the row that it is derived from says of responses, for generate's samples.
    """

    prompt: str | Turns
    columns: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    beside: dict[str, Any] = field(default_factory=dict, compare=False)


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
    """Two responses to one prompt, the first preferred; `group` is the part of the data it is of.

    margin: by how much, where the row says so; 0 or more.
    """

    prompt: str | Turns
    chosen: str
    rejected: str
    source: str = ""
    margin: float | None = None
    group: str = ""
    columns: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass
class Ranking:
    """K >= 2 responses to one prompt; rank 1 is best and ties are allowed."""

    prompt: str | Turns
    responses: list[str]
    ranks: list[float]
    source: str = ""
    group: str = ""
    columns: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass
class Feedback:
    """A judgement of one response: thumbs, a number (higher is better), or both."""

    prompt: str | Turns
    completion: str
    label: bool | None = None
    score: float | None = None
    source: str = ""
    group: str = ""
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass
class Stepwise:
    """A response in steps, each right (1) or wrong (0), or in between."""

    prompt: str | Turns
    steps: list[str]
    labels: list[float]
    source: str = ""
    columns: dict[str, Any] = field(default_factory=dict, compare=False)


Row = Prompt | Demonstration | Text | Preference | Ranking | Feedback | Stepwise

Judgement = Preference | Ranking | Feedback | Stepwise

JUDGEMENTS = (Preference, Ranking, Feedback, Stepwise)
"""The kinds that say how good responses are."""


def name_of(kind: type) -> str:
    """The word for a kind of row in what users read."""
    return kind.__name__.lower()


def kind_named(word: str) -> type:
    """The kind of rows that a word of config/stages.py names."""
    return next(kind for kind in get_args(Row) if name_of(kind) == word)


# --------------------------------------------------------------------------- derivations

Derive = Callable[[Any, str], list[Any]]
"""Rows made from one row; steps are joined by the text given."""


def best_of(row: Ranking, join: str) -> list[Demonstration]:
    """The best response of a ranking; the first of several."""
    best = min(range(len(row.ranks)), key=row.ranks.__getitem__)
    return [Demonstration(row.prompt, row.responses[best], row.source, row.columns)]


def if_liked(row: Feedback, join: str) -> list[Demonstration]:
    """A response that has no thumbs down; a score alone forbids no one to imitate it."""
    if row.label is False:
        return []
    return [Demonstration(row.prompt, row.completion, row.source, row.columns)]


def if_right(row: Stepwise, join: str) -> list[Demonstration]:
    """A response without a step that is wrong."""
    if min(row.labels) < 0.5:
        return []
    return [Demonstration(row.prompt, join.join(row.steps), row.source, row.columns)]


SAID = (
    *("completion", "chosen", "rejected", "margin", "responses", "ranks"),
    *("steps", "labels", "label", "score"),
)
"""What rows say of responses, by the names of their fields."""


def asked(row: Any, join: str) -> list[Prompt]:
    """What a row of any kind with responses asks."""
    said = {name: getattr(row, name, None) for name in SAID}
    beside = {name: value for name, value in said.items() if value is not None}
    if group := getattr(row, "group", ""):
        beside |= {} if "source" in row.columns else {"source": group}
    return [Prompt(row.prompt, row.columns, row.source, beside)]


DERIVATIONS: dict[type, dict[type, Derive]] = {
    Demonstration: {
        Text: lambda row, join: [row],  # sft trains on all tokens of plain text
        Preference: lambda row, join: [
            Demonstration(row.prompt, row.chosen, row.source, row.columns)
        ],
        Ranking: best_of,
        Feedback: if_liked,
        Stepwise: if_right,
    },
    Prompt: dict.fromkeys((Demonstration, Preference, Ranking, Feedback, Stepwise), asked),
}


def derivable(have: type, kind: type) -> bool:
    """Whether rows of one kind are, or soundly give, rows of another."""
    return have is kind or have in DERIVATIONS.get(kind, {})


def derive(rows: list[Row], kind: type, join: str) -> list[Any]:
    """Rows of `kind` made from rows that are all derivable; a prompt that is judged often, once."""
    ways = DERIVATIONS.get(kind, {})
    made: list[Any] = []
    asked: set[str] = set()
    for row in rows:
        if kind is Prompt and isinstance(row, JUDGEMENTS):
            if str(row.prompt) in asked:
                continue
            asked.add(str(row.prompt))
        made += [row] if isinstance(row, kind) else ways[type(row)](row, join)
    return made


# --------------------------------------------------------------------------- parts of rows


def pairs_of(row: Ranking) -> list[Preference]:
    """All C(K, 2) comparisons of a ranking; ties are no comparison."""
    pairs = []
    for i, j in combinations(range(len(row.responses)), 2):
        if row.ranks[i] != row.ranks[j]:
            better, worse = (i, j) if row.ranks[i] < row.ranks[j] else (j, i)
            chosen, rejected = row.responses[better], row.responses[worse]
            origin = row.source, None, row.group, row.columns
            pairs.append(Preference(row.prompt, chosen, rejected, *origin))
    return pairs


def cut_steps(text: str, step_end: str) -> list[str]:
    """The steps of a response: each ends where a match of `step_end` ends, the last with the text.

    Joined by "" they are the text again. None is blank, for a blank could not be judged: blanks
    belong to the step before them, or to the first step.
    """
    ends = [match.end() for match in re.finditer(step_end, text)]
    steps: list[str] = []
    start = 0
    for end in [*ends, len(text)]:
        piece = text[start:end]
        if steps and (not piece.strip() or not steps[-1].strip()):
            steps[-1] += piece
        elif piece:
            steps.append(piece)
        start = end
    return steps
