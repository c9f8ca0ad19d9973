"""Whatever makes one kind of feedback out of another: done only where data.convert names it."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.data import Data
from rlhf_cli.data.kinds import (
    Feedback,
    Preference,
    Ranking,
    Row,
    Stepwise,
    cut_steps,
    name_of,
    pairs_of,
    prompt_key,
    reply_key,
    reply_text,
)

Made = tuple[list[Any], Counter[str]]
"""Rows, and how often something happened on the way that a user should know."""


@dataclass(frozen=True)
class Conversion:
    """From rows of one kind to rows of another.

    whole: whether it puts rows together, and so needs all of them at once.
    """

    start: type
    end: type
    make: Callable[[list[Any], Data], Made]
    whole: bool = False


def ranking_to_preference(rows: list[Ranking], data: Data) -> Made:
    """All pairs of each ranking (InstructGPT 2203.02155 sec. 3.5)."""
    pairs = [pair for row in rows for pair in pairs_of(row)]
    possible = sum(len(row.ranks) * (len(row.ranks) - 1) // 2 for row in rows)
    return pairs, Counter({"ties dropped": possible - len(pairs)})


def preference_to_ranking(rows: list[Preference], data: Data) -> Made:
    """Rankings of two."""
    made = [
        Ranking(
            row.prompt,
            [row.chosen, row.rejected],
            [1.0, 2.0],
            row.source,
            row.group,
            row.columns,
        )
        for row in rows
    ]
    return made, Counter()


def preference_to_feedback(rows: list[Preference], data: Data) -> Made:
    """Chosen is good, rejected is bad, as KTO does it (2402.01306 sec. 4)."""
    made = [
        Feedback(row.prompt, completion, label, None, row.source, row.group, row.columns)
        for row in rows
        for completion, label in ((row.chosen, True), (row.rejected, False))
    ]
    return made, Counter()


def feedback_to_ranking(rows: list[Feedback], data: Data) -> Made:
    """All answers to one prompt in one ranking with ties: by score where all have one, or label."""
    prompts: dict[str, list[Feedback]] = defaultdict(list)
    for row in rows:
        prompts[prompt_key(row)].append(row)
    made: list[Ranking] = []
    counts: Counter[str] = Counter()
    for answers in prompts.values():
        by = "label" if any(row.score is None for row in answers) else "score"
        judged = [row for row in answers if getattr(row, by) is not None]
        counts["answers without a label dropped"] += len(answers) - len(judged)
        # the same answer may stand at two places, but it has no tie with itself
        distinct = {(reply_key(row.completion), float(getattr(row, by))): row for row in judged}
        values = [(row.completion, value) for (_, value), row in distinct.items()]
        counts["repeated answers counted once"] += len(judged) - len(values)
        places = sorted({value for _, value in values}, reverse=True)
        if len(values) < 2:
            counts["prompts with fewer than 2 answers dropped"] += 1
        elif len(places) < 2:
            counts["prompts with all answers tied dropped"] += 1
        else:
            first, groups = judged[0], {row.group for row in judged}
            made.append(
                Ranking(
                    first.prompt,
                    [reply for reply, _ in values],
                    [1.0 + places.index(value) for _, value in values],
                    first.source,
                    first.group if len(groups) == 1 else "",
                    first.columns,
                )
            )
    return made, counts


def steps_of(text: str, data: Data, source: str) -> list[str]:
    """The steps of a response; joined by data.step_join they are the response.

    Raises:
        UserError: they are not.
    """
    *others, last = cut_steps(text, data.step_end)
    steps = [step.removesuffix(data.step_join) for step in others] + [last]
    if data.step_join.join(steps) != text:
        raise UserError(
            f"{source}: the steps that data.step_end={data.step_end!r} ends, joined by "
            f"data.step_join={data.step_join!r}, are not this response again; "
            "data.step_join='' joins any steps"
        )
    return steps


def feedback_to_stepwise(rows: list[Feedback], data: Data) -> Made:
    """Each step gets the response's label: outcome supervision, as Cobbe 2110.14168 does it.

    Raises:
        UserError: data.step_join does not put the steps together again.
    """
    made = []
    judged = [row for row in rows if row.label is not None]
    for row in judged:
        steps = steps_of(reply_text(row.completion), data, row.source)
        labels = [float(bool(row.label))] * len(steps)
        made.append(Stepwise(row.prompt, steps, labels, row.source, row.columns))
    return made, Counter({"without a label dropped": len(rows) - len(judged)})


CONVERSIONS = {
    "feedback_to_ranking": Conversion(Feedback, Ranking, feedback_to_ranking, whole=True),
    "feedback_to_stepwise": Conversion(Feedback, Stepwise, feedback_to_stepwise),
    "preference_to_feedback": Conversion(Preference, Feedback, preference_to_feedback),
    "preference_to_ranking": Conversion(Preference, Ranking, preference_to_ranking),
    "ranking_to_preference": Conversion(Ranking, Preference, ranking_to_preference),
}


def convert(rows: list[Row], name: str, data: Data) -> tuple[list[Row], Counter[str]]:
    """Rows after one conversion: kinds that it does not start from stay as they are.

    Returns:
        The rows, and what was counted on the way, with `from` and `made`.
    """
    way = CONVERSIONS[name]
    mine = [row for row in rows if isinstance(row, way.start)]
    made, counts = way.make(mine, data)
    counts.update({"from": len(mine), "made": len(made)})
    return [row for row in rows if not isinstance(row, way.start)] + made, counts


def note_of(name: str, counts: Counter[str]) -> str:
    """A line on what `convert` has counted, over all of its calls."""
    way = CONVERSIONS[name]
    told = "".join(
        f", {count} {what}"
        for what, count in counts.items()
        if count and what not in ("from", "made")
    )
    return (
        f"{name}: {counts['made']} {name_of(way.end)} rows from {counts['from']} "
        f"{name_of(way.start)} rows{told}"
    )


def route(start: type, end: type) -> list[str] | None:
    """The fewest conversions from one kind to another; None where there is no way."""
    ways: dict[type, list[str]] = {start: []}
    reached = [start]
    for have in reached:  # grows while it is walked: nearest kinds first
        for name, way in CONVERSIONS.items():
            if way.start is have and way.end not in ways:
                ways[way.end] = [*ways[have], name]
                reached.append(way.end)
    return ways.get(end)
