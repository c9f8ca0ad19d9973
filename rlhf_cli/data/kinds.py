"""The kinds of rows, and which kind is soundly derived from which.

A derivation is silent, so it decides nothing about feedback: that is data/conversions.py.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, get_args

from rlhf_cli.config.schema.stages import Run
from rlhf_cli.config.stages import row_kind_name

Message = dict[str, Any]
"""`role`, `content` and whatever else a chat template reads (tool_calls, name, ...).

The role is system, developer, user, assistant or tool. The content is text, or None beside
tool_calls. A reply with `weight` 0 carries no loss.
"""

Turns = list[Message]
"""A dialogue, whose last message the response answers, or continues where it is the assistant's."""

Reply = str | Message
"""A response: its text, or the assistant's message where that has more than role and content."""


def reply_text(reply: Reply) -> str:
    """What a response says, beside its tool calls."""
    return reply if isinstance(reply, str) else reply["content"] or ""


def reply_key(reply: Reply) -> str:
    """A text that two responses share if they are the same."""
    return reply if isinstance(reply, str) else json.dumps(reply, sort_keys=True, default=str)


@dataclass
class Prompt:
    """Something to respond to.

    columns: the row's other fields, for rules and templates (answer, ...). Of any kind of row,
        `tools` is the list that a chat template gets, and `system` the system message of a prompt
        that is plain text; that of a dialogue is in the dialogue.
    beside: what the row that it is derived from says of responses, for generate's samples.
    group: the source that it is of, where there are several.
    """

    prompt: str | Turns
    columns: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    beside: dict[str, Any] = field(default_factory=dict, compare=False)
    group: str = field(default="", compare=False)


@dataclass
class Demonstration:
    """A prompt with a response to imitate, and the row's other fields.

    learn_from: the first message of the prompt that may carry loss if it is a reply: 0 of a whole
        dialogue, their number where the row gives prompt and completion apart.
    """

    prompt: str | Turns
    completion: Reply
    source: str = ""
    columns: dict[str, Any] = field(default_factory=dict)
    learn_from: int = 0


@dataclass
class Text:
    """Plain text: every token is trained on."""

    text: str
    source: str = ""
    columns: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass
class Preference:
    """Two responses to one prompt, the first preferred; `group` is the part of the data it is of.

    margin: by how much, where the row says so; 0 or more.
    p: the chance that it is, where the row says so: a soft label.
    """

    prompt: str | Turns
    chosen: Reply
    rejected: Reply
    source: str = ""
    margin: float | None = None
    group: str = ""
    columns: dict[str, Any] = field(default_factory=dict, compare=False)
    p: float | None = None


@dataclass
class Ranking:
    """K >= 2 responses to one prompt; rank 1 is best and ties are allowed."""

    prompt: str | Turns
    responses: list[Reply]
    ranks: list[float]
    source: str = ""
    group: str = ""
    columns: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass
class Feedback:
    """A judgement of one response: thumbs, a number (higher is better), or both.

    spelling: how the row writes its thumbs, as data/labels.py counts it; empty without thumbs.
    """

    prompt: str | Turns
    completion: Reply
    label: bool | None = None
    score: float | None = None
    source: str = ""
    group: str = ""
    columns: dict[str, Any] = field(default_factory=dict)
    spelling: str = field(default="", compare=False)


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


def row_kind(cfg: Run) -> type:
    """The kind of rows that a stage learns from or answers."""
    return kind_named(row_kind_name(cfg))


# --------------------------------------------------------------------------- derivations

Derive = Callable[[Any, str], list[Any]]
"""Rows made from one row; steps are joined by the text given."""


def imitating(row: Any, completion: Reply) -> list[Demonstration]:
    """A response of a row that judges it: it is learnt, the replies before it are not."""
    before = 0 if isinstance(row.prompt, str) else len(row.prompt)
    return [Demonstration(row.prompt, completion, row.source, row.columns, before)]


def best_of(row: Ranking, join: str) -> list[Demonstration]:
    """The best response of a ranking; the first of several."""
    best = min(range(len(row.ranks)), key=row.ranks.__getitem__)
    return imitating(row, row.responses[best])


def if_liked(row: Feedback, join: str) -> list[Demonstration]:
    """A response that has no thumbs down; a score alone forbids no one to imitate it."""
    return [] if row.label is False else imitating(row, row.completion)


def if_right(row: Stepwise, join: str) -> list[Demonstration]:
    """A response without a step that is wrong."""
    return [] if min(row.labels) < 0.5 else imitating(row, join.join(row.steps))


SAID = (
    *("completion", "chosen", "rejected", "margin", "p", "responses", "ranks"),
    *("steps", "labels", "label", "score"),
)
"""What rows say of responses, by the names of their fields."""


def asked(row: Any, join: str) -> list[Prompt]:
    """What a row of any kind with responses asks."""
    said = {name: getattr(row, name, None) for name in SAID}
    beside = {name: value for name, value in said.items() if value is not None}
    group = getattr(row, "group", "")
    if group:
        beside |= {} if "source" in row.columns else {"source": group}
    return [Prompt(row.prompt, row.columns, row.source, beside, group)]


DERIVATIONS: dict[type, dict[type, Derive]] = {
    Demonstration: {
        Text: lambda row, join: [row],  # sft trains on all tokens of plain text
        Preference: lambda row, join: imitating(row, row.chosen),
        Ranking: best_of,
        Feedback: if_liked,
        Stepwise: if_right,
    },
    Prompt: dict.fromkeys((Demonstration, Preference, Ranking, Feedback, Stepwise), asked),
}


def derivable(have: type, kind: type) -> bool:
    """Whether rows of one kind are, or soundly give, rows of another."""
    return have is kind or have in DERIVATIONS.get(kind, {})


def prompt_key(row: Any) -> str:
    """A text that two rows share if they ask the same: prompt, system message and tools."""
    beside = {name: row.columns[name] for name in ("system", "tools") if name in row.columns}
    if isinstance(row.prompt, str) and not beside:
        return row.prompt
    return json.dumps([row.prompt, beside], sort_keys=True, default=str)


def derive(rows: list[Row], kind: type, join: str) -> list[Any]:
    """Rows of `kind` made from rows that are all derivable; a prompt that is judged often, once."""
    ways = DERIVATIONS.get(kind, {})
    made: list[Any] = []
    asked: set[str] = set()
    for row in rows:
        if kind is Prompt and isinstance(row, JUDGEMENTS):
            if (key := prompt_key(row)) in asked:
                continue
            asked.add(key)
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
