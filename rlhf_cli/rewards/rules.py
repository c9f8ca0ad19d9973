"""Rewards that are plain functions of a prompt row and a response; no torch here.

A rule is named in the config as `name` or `name:argument`, such as `reward=exact_answer` or
`reward="keywords:happy|friend"`.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.demo.gold import gold_score

Score = Callable[[Prompt, str], float]

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass
class Rule:
    """A named rule: its score, what it means, and the row column that it needs, if any."""

    spec: str
    score: Score
    meaning: str
    column: str | None = None


def exact_answer(row: Prompt, response: str) -> float:
    """1 where the response's final answer equals the row's `answer`, else 0."""
    return float(same_answer(final_answer(response), str(row.columns["answer"])))


def final_answer(response: str) -> str:
    """The number after the last ####, or that line where it holds none; else the last number."""
    if "####" in response:
        line = (response.rsplit("####", 1)[1].strip().splitlines() or [""])[0].strip()
        number = NUMBER.search(line)
        return number[0] if number else line
    numbers = NUMBER.findall(response)
    return numbers[-1] if numbers else ""


def same_answer(given: str, expected: str) -> bool:
    """Equal as numbers where both are, else as text without case and outer spaces."""
    values = [number_of(text) for text in (given, expected)]
    if None not in values:
        return math.isclose(*values, rel_tol=1e-9)  # type: ignore[arg-type]
    return bool(given.strip()) and given.strip().casefold() == expected.strip().casefold()


def number_of(text: str) -> float | None:
    """A number, thousands separators and a currency sign allowed."""
    plain = text.strip().strip("$.").replace(",", "")
    return float(plain) if NUMBER.fullmatch(plain) else None


def _keywords(argument: str) -> Score:
    """Share of the words, given as a|b|c, that occur in the response."""
    words = [word.strip().casefold() for word in argument.split("|") if word.strip()]
    if not words:
        raise UserError('reward=keywords needs words, as in reward="keywords:happy|friend"')

    def score(row: Prompt, response: str) -> float:
        present = set(re.findall(r"\w+", response.casefold()))
        return sum(word in present for word in words) / len(words)

    return score


def _regex(argument: str) -> Score:
    """1 where the pattern is found in the response, else 0."""
    try:
        pattern = re.compile(argument)
    except re.error as error:
        raise UserError(f"reward=regex:{argument}: not a regular expression: {error}") from None
    return lambda row, response: float(pattern.search(response) is not None)


def _length(argument: str) -> Score:
    """1 at `argument` words, falling by 1 / argument with each word more or less, not below 0."""
    if not argument.isdigit() or int(argument) == 0:
        raise UserError('reward=length needs a number of words, as in reward="length:20"')
    target = int(argument)
    return lambda row, response: max(0.0, 1 - abs(len(response.split()) - target) / target)


def _gold(row: Prompt, response: str) -> float:
    if not isinstance(row.prompt, str):
        raise UserError(f"{row.source}: demo_gold scores the demo's own prompts only")
    try:
        return gold_score(row.prompt, response)
    except ValueError as error:
        raise UserError(f"{row.source}: demo_gold: {error}") from None


PLAIN_RULES: dict[str, tuple[Score, str | None]] = {
    "exact_answer": (exact_answer, "answer"),
    "demo_gold": (_gold, None),
}
RULES_WITH_ARGUMENT: dict[str, Callable[[str], Score]] = {
    "keywords": _keywords,
    "regex": _regex,
    "length": _length,
}
RULE_NAMES = (*PLAIN_RULES, *(f"{name}:..." for name in RULES_WITH_ARGUMENT))


def rule_of(spec: str) -> Rule | None:
    """The rule that a reward spec names; None where it names a folder or hub id.

    Raises:
        UserError: a rule's argument is missing or wrong.
    """
    name, _, argument = spec.partition(":")
    if name in PLAIN_RULES:
        if argument:
            raise UserError(f"reward={name} takes no argument, got {argument!r}")
        score, column = PLAIN_RULES[name]
        return Rule(spec, score, (score.__doc__ or "").strip(), column)
    if name in RULES_WITH_ARGUMENT:
        make = RULES_WITH_ARGUMENT[name]
        return Rule(spec, make(argument), (make.__doc__ or "").strip())
    return None


def check_columns(rule: Rule, rows: list[Prompt]) -> None:
    """Stop where a row lacks the column that a rule reads."""
    if rule.column is None:
        return
    for row in rows:
        if row.columns.get(rule.column) is None:
            found = ", ".join(["prompt", *row.columns])
            raise UserError(
                f"{row.source}: reward={rule.spec} needs a column {rule.column!r}; found {found}"
            )
