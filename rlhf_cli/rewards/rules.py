"""Rewards that are plain functions of a prompt row and a response; no torch here.

A rule is named in the config as `name` or `name:argument`, such as `reward=exact_answer` or
`reward="keywords:happy|friend"`.
"""

import json
import math
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.data.kinds import Demonstration, Prompt
from rlhf_cli.data.time_limit import time_limit
from rlhf_cli.demo.gold import gold_score
from rlhf_cli.rewards.answers import close_answer, exact_answer, math_answer, quantity_of

Score = Callable[[Prompt, str], float | None]
"""The reward of a response to a row; None where the rule does not apply."""

WORD = re.compile(r"\w+(?:[-']\w+)*")  # of a lexicon: don't and well-known are one word
TAG = re.compile(r"[A-Za-z][\w-]*")


@dataclass
class Rule:
    """A named rule: its score, what it means, and the row column that it reads, if any.

    numeric: whether that column must hold a number.
    """

    spec: str
    score: Score
    meaning: str
    column: str | None = None
    numeric: bool = False


# --------------------------------------------------------------------------- rules of text


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

    def score(row: Prompt, response: str) -> float:
        try:
            with time_limit():
                return float(pattern.search(response) is not None)
        except TimeoutError as error:
            raise RunError(f"reward=regex:{argument}: on {response[:40]!r} {error}") from None

    return score


def _length(argument: str) -> Score:
    """1 at so many words, falling by 1 / that number with each word more or less, not below 0."""
    target = _count("length", "a number of words", argument, 20)
    return lambda row, response: max(0.0, 1 - abs(len(response.split()) - target) / target)


def _repetition(argument: str) -> Score:
    """Share of the runs of so many words that stood before in the response: 0 for none, up to 1;
    a penalty where its weight is negative.
    """
    size = _count("repetition", "the length of a run in words", argument, 3)

    return lambda row, response: repeated_share(response.casefold().split(), size)


def repeated_share(items: Sequence[Hashable], size: int) -> float:
    """Share of the runs of `size` items that stood before; 0 where there is no run."""
    runs = [tuple(items[i : i + size]) for i in range(len(items) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _lexicon(argument: str) -> Score:
    """Mean weight of the response's words by a file of WORD, or WORD<tab>WEIGHT, one a line; words
    that it lacks weigh 0.
    """
    weights = read_lexicon(Path(argument))

    def score(row: Prompt, response: str) -> float:
        words = WORD.findall(plain(response))
        return sum(weights.get(word, 0.0) for word in words) / max(len(words), 1)

    return score


def plain(text: str) -> str:
    """In lower case, with straight apostrophes."""
    return text.casefold().replace("\u2019", "'")


def read_lexicon(file: Path) -> dict[str, float]:
    """Words in lower case and what each weighs, 1 where the line says nothing.

    Empty lines, and those that begin with #, are skipped.

    Raises:
        UserError: naming the line that is no word, holds no weight, or comes again.
    """
    try:
        if not file.is_file():  # of a pipe, reading would not end
            raise FileNotFoundError
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        raise UserError(
            f"reward=lexicon:{file}: no such text file; it has a word a line, or WORD<tab>WEIGHT"
        ) from None
    weights: dict[str, float] = {}
    for place, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        word, _, weight = (part.strip() for part in line.partition("\t"))
        word = plain(word)
        value = _float(weight or "1")
        if value is None:
            raise UserError(f"{file} line {place}: {weight!r} is no weight")
        if not WORD.fullmatch(word):
            raise UserError(f"{file} line {place}: {word!r} is not one word")
        if word in weights:
            raise UserError(f"{file} line {place}: {word!r} is there already")
        weights[word] = value
    if not weights:
        raise UserError(f"reward=lexicon:{file}: the file holds no words")
    return weights


# --------------------------------------------------------------------------- rules of form


def _json(argument: str) -> Score:
    """1 where the whole response is JSON (with keys given, as json:a|b, an object that has them),
    else 0.
    """
    keys = {key.strip() for key in argument.split("|") if key.strip()}
    if argument and not keys:
        raise UserError('reward=json takes keys, as in reward="json:name|age", or none')

    def score(row: Prompt, response: str) -> float:
        try:
            # numbers stay text: neither their size nor their digits matter here
            value = json.loads(
                response, parse_int=str, parse_float=str, parse_constant=_refuse_constant
            )
        except (ValueError, RecursionError):
            return 0.0
        return float(not keys or (isinstance(value, dict) and keys <= value.keys()))

    return score


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _tags(argument: str) -> Score:
    """1 where the response is <a>...</a><b>...</b> and no more, given as a|b: each tag once, in
    this order, blanks between; else 0.
    """
    names = [name.strip() for name in argument.split("|")]
    if not all(TAG.fullmatch(name) for name in names) or len(set(names)) < len(names):
        raise UserError('reward=tags needs names of tags, as in reward="tags:think|answer"')
    whole = re.compile(r"\s*".join(rf"<{name}>(?:.*)</{name}>" for name in names), re.DOTALL)
    marks = [mark for name in names for mark in (f"<{name}>", f"</{name}>")]

    def score(row: Prompt, response: str) -> float:
        once = all(response.count(mark) == 1 for mark in marks)
        return float(once and whole.fullmatch(response.strip()) is not None)

    return score


# --------------------------------------------------------------------------- rules of answers


def _numeric_answer(argument: str) -> Score:
    """1 where the response's final answer (the line after the last ####, else the last
    \\boxed or word with a digit) is a number within that share of the row's `answer`, as in
    numeric_answer:0.01 for one percent; else 0.
    """
    tolerance = _float(argument)
    if tolerance is None or tolerance < 0:
        raise UserError("reward=numeric_answer needs a tolerance, as in reward=numeric_answer:0.01")
    return partial(close_answer, tolerance=tolerance)


def _gold(row: Prompt, response: str) -> float:
    """The score by which the demo judges: right facts, greetings and manners."""
    if not isinstance(row.prompt, str):
        raise UserError(f"{row.source}: demo_gold scores the demo's own prompts only")
    try:
        return gold_score(row.prompt, response)
    except ValueError as error:
        raise UserError(f"{row.source}: demo_gold: {error}") from None


# --------------------------------------------------------------------------- by name

PLAIN_RULES: dict[str, tuple[Score, str | None]] = {
    "exact_answer": (exact_answer, "answer"),
    "math_answer": (math_answer, "answer"),
    "demo_gold": (_gold, None),
}
RULES_WITH_ARGUMENT: dict[str, Callable[[str], Score]] = {
    "numeric_answer": _numeric_answer,
    "regex": _regex,
    "json": _json,
    "tags": _tags,
    "length": _length,
    "repetition": _repetition,
    "keywords": _keywords,
    "lexicon": _lexicon,
}
RULE_NAMES = (*PLAIN_RULES, *(f"{name}:..." for name in RULES_WITH_ARGUMENT))


def is_rule(spec: str) -> bool:
    """Whether a term names a rule, whatever its argument."""
    name = spec.partition(":")[0]
    return name in PLAIN_RULES or name in RULES_WITH_ARGUMENT


def rule_of(spec: str) -> Rule | None:
    """The rule that a term names; None where it names a function, folder or hub id.

    Raises:
        UserError: a rule's argument is missing or wrong.
    """
    name, _, argument = spec.partition(":")
    if name in PLAIN_RULES:
        if argument:
            raise UserError(f"reward={name} takes no argument, got {argument!r}")
        score, column = PLAIN_RULES[name]
        return Rule(spec, score, _sentence(score), column)
    if name in RULES_WITH_ARGUMENT:
        make = RULES_WITH_ARGUMENT[name]
        numeric = name == "numeric_answer"
        return Rule(spec, make(argument), _sentence(make), "answer" if numeric else None, numeric)
    return None


def check_columns(rule: Rule, rows: Sequence[Prompt | Demonstration]) -> None:
    """Stop where a row lacks the column that a rule reads, or has no number in it."""
    if rule.column is None:
        return
    for row in rows:
        value = row.columns.get(rule.column)
        if value is None:
            columns = ", ".join(["prompt", *row.columns])
            raise UserError(
                f"{row.source}: reward={rule.spec} needs a column {rule.column!r}; found {columns}"
            )
        if rule.numeric and quantity_of(str(value)) is None:
            raise UserError(
                f"{row.source}: reward={rule.spec} needs a number in column {rule.column!r}, "
                f"got {value!r}"
            )


def _sentence(function: Callable[..., object]) -> str:
    """The docstring on one line, without its full stop."""
    return " ".join((function.__doc__ or "").split()).removesuffix(".")


def _count(name: str, what: str, argument: str, example: int) -> int:
    """A whole number above 0, of 9 digits at most."""
    if not argument.isdecimal() or len(argument) > 9 or int(argument) == 0:
        raise UserError(f"reward={name} needs {what}, as in reward={name}:{example}")
    return int(argument)


def _float(text: str) -> float | None:
    """A finite number; None for any other text."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
