r"""What `reward=` says, read without torch: a sum of terms, each a model, a rule or a function.

    reward="runs/demo/reward + 0.2*length:20 + -1*checks.py:polite"

Terms are joined by " + " and may begin with `WEIGHT*`; a weight of 0 logs a term that is not
learned from. A pattern that holds " + " must write it otherwise, such as `\s\+\s`.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.own_code import function_named, parameters_of
from rlhf_cli.config.paths import is_path
from rlhf_cli.data.kinds import Demonstration, Prompt
from rlhf_cli.folders.manifest import RESPONSE, STEP, implicit_reward_of, level_of
from rlhf_cli.rewards.rules import check_columns, is_rule, rule_of

PLUS = re.compile(r"(?:^| +)\+(?= |$)")
WEIGHT = re.compile(r"([^:/*]*)\*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Term:
    """One term of a reward: what it is worth, and where it comes from."""

    weight: float
    spec: str


def terms_of(spec: str) -> list[Term]:
    """The terms of a reward.

    Raises:
        UserError: a term is empty or given twice, a weight is no number, or all weights are 0.
    """
    terms = [_term(text.strip(), spec) for text in PLUS.split(spec)]
    names = [term.spec for term in terms]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"reward={spec}: the term {name} is given twice; add up its weights")
    if not any(term.weight for term in terms):
        raise UserError(f"reward={spec}: every weight is 0, so there is nothing to learn from")
    return terms


def _term(text: str, whole: str) -> Term:
    match = WEIGHT.fullmatch(text)
    weight, name = (match[1].strip(), match[2].strip()) if match else ("1", text)
    if not name:
        raise UserError(
            f"reward={whole}: a term is empty; terms are joined by ' + ', and a pattern that "
            r"holds that is written with \s\+\s"
        )
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(
            f"reward={whole}: {weight!r} is no weight; a term is WEIGHT*TERM, as in 0.2*length:20"
        )
    if not is_rule(name) and not is_path(name):
        raise UserError(f"reward={whole}: {name} is no rule, and cannot be a path: it is too long")
    return Term(value, name)


def is_model(spec: str) -> bool:
    """Whether a term names a folder or hub id."""
    return not is_rule(spec) and function_of(spec) is None


def models_of(spec: str) -> list[str]:
    """The folders and hub ids that a reward names, in the order of its terms."""
    return [term.spec for term in terms_of(spec) if is_model(term.spec)]


def files_of(spec: str) -> list[Path]:
    """The files that the terms of a reward are read from: functions, and lists of words."""
    files = []
    for term in terms_of(spec) if spec else []:
        name, _, argument = term.spec.partition(":")
        if (function := function_of(term.spec)) is not None:
            files.append(function[0])
        elif name == "lexicon":
            files.append(Path(argument))
    return files


def response_models(spec: str) -> list[str]:
    """The reward models of whole responses among the terms of a reward that count."""
    models = [term.spec for term in terms_of(spec) if term.weight and is_model(term.spec)]
    scorers = [name for name in models if implicit_reward_of(name) is None]
    return [name for name in scorers if level_of(name) == RESPONSE]


def refreshed_model(spec: str) -> str:
    """The one term of a reward that algo.refresh_reward trains: a reward model of responses.

    Raises:
        UserError: there is none, or several.
    """
    learners = response_models(spec)
    if len(learners) != 1:
        has = f"has {len(learners)} ({', '.join(learners)})" if learners else "has none"
        raise UserError(
            f"algo.refresh_reward trains one reward model of whole responses, but reward={spec} "
            f"{has}; give one that `rlhf-cli reward` wrote"
        )
    return learners[0]


def meaning_of(spec: str) -> str:
    """What a term stands for, in a sentence."""
    if (rule := rule_of(spec)) is not None:
        return rule.meaning
    if (function := function_of(spec)) is not None:
        signature = signature_of(*function)
        return f"what {function[1]} of {function[0]} gives each {signature.judges}"
    if implicit_reward_of(spec) is not None:
        return "beta log(policy / reference) of the response, normalised"
    steps = ", made of those of its steps" if level_of(spec) == STEP else ""
    return f"the score that this model gives the response{steps}, normalised"


def judges_steps(spec: str) -> bool:
    """Whether a term can give a reward to each step of a response."""
    if (function := function_of(spec)) is not None:
        return signature_of(*function).judges == "step"
    return is_model(spec) and implicit_reward_of(spec) is None and level_of(spec) == STEP


def check_rows_of(spec: str, rows: Sequence[Prompt | Demonstration]) -> None:
    """Stop where rows lack what a term reads; models read the prompt alone."""
    if (rule := rule_of(spec)) is not None:
        check_columns(rule, rows)
    elif (function := function_of(spec)) is not None:
        check_function_columns(spec, signature_of(*function), rows)


# --------------------------------------------------------------------------- functions

OF_ALL = ("prompts", "completions", "responses", "solution_strs")  # lists, of a whole batch
OF_ONE = (
    "prompt",
    "completion",
    "response",
    "solution_str",
)  # of the one response it is called for
OF_EITHER = ("steps", "completion_ids")
JUDGED = ("completions", "responses", "solution_strs", *OF_ONE[1:], *OF_EITHER)
TRL = ("prompts", "completions", "completion_ids")  # what **kwargs hold there beside columns
PLURALS = {  # of verl's, beside solution_strs
    "data_sources": "data_source",
    "ground_truths": "ground_truth",
    "extra_infos": "extra_info",
}
NAMES = (
    "completions or responses (lists), or completion, response or solution_str (called for each); "
    "prompts or prompt, steps, completion_ids, columns of the rows by name, and **kwargs"
)


@dataclass(frozen=True)
class Signature:
    """How a user's function wants to be called; everything is given by name.

    given: its parameters that are given what is judged, as OF_ALL, OF_ONE and OF_EITHER name it.
    columns: the other ones, which are given the row column of that name; required: those of them
        without a default.
    takes_all: whether it has **kwargs, and so gets every column.
    one_by_one: whether it is called once per response, rather than once per batch.
    """

    given: tuple[str, ...]
    columns: tuple[str, ...]
    required: tuple[str, ...]
    takes_all: bool
    one_by_one: bool
    is_async: bool

    @property
    def judges(self) -> str:
        """`step` where it names steps, else `response`."""
        return "step" if "steps" in self.given else "response"

    def column(self, parameter: str) -> str:
        """The column that a parameter is given; verl names those of a batch in the plural."""
        return PLURALS.get(parameter, parameter) if "solution_strs" in self.given else parameter


def function_of(spec: str) -> tuple[Path, str] | None:
    """File and name of the function that a term names as path/to/file.py:function, if it does."""
    return None if is_rule(spec) else function_named(spec)


def signature_of(file: Path, name: str) -> Signature:
    """The signature of a function, read from its source; nothing is run.

    Raises:
        UserError: there is no such file or function, or it names nothing that could be judged, or
            both lists of a batch and what is one response's.
    """
    spec, found = f"reward={file}:{name}", parameters_of("reward", file, name)
    given = tuple(each for each in found.names if each in (*OF_ALL, *OF_ONE, *OF_EITHER))
    one = next((each for each in given if each in OF_ONE), None)
    judges = any(each in JUDGED for each in given)
    if found.takes_all and one is None and (not judges or "completions" in given):
        given = tuple(dict.fromkeys((*given, *TRL)))
    elif not judges:
        raise UserError(
            f"{spec}({', '.join(found.names)}) names nothing to judge; parameters are given by "
            f"name: {NAMES}"
        )
    whole = next((each for each in given if each in OF_ALL), None)
    if one and whole:
        raise UserError(
            f"{spec} names {whole}, a list of a batch, beside {one} of one response; it is called "
            f"either for all or for each: {NAMES}"
        )
    return Signature(
        given=given,
        columns=tuple(each for each in found.names if each not in given),
        required=tuple(each for each in found.required if each not in given),
        takes_all=found.takes_all,
        one_by_one=one is not None or (whole is None and found.is_async),
        is_async=found.is_async,
    )


def check_function_columns(
    spec: str, signature: Signature, rows: Sequence[Prompt | Demonstration]
) -> None:
    """Stop where a function cannot do without a parameter that is a column of no row."""
    columns = {name for row in rows for name in row.columns}
    for name in signature.required:
        if rows and all(value_of(row, signature.column(name)) is None for row in rows):
            raise UserError(
                f"{rows[0].source}: reward={spec} needs a column {name!r}; found "
                f"{', '.join(['prompt', *sorted(columns)])}; given by name are: {NAMES}"
            )


def value_of(row: Prompt | Demonstration, column: str) -> Any:
    """What a row has in a column, or None.

    verl keeps the ground truth within `reward_model`, a dialogue has its system message in its
    first one, and what a row says of its own responses (chosen, label, ...) is beside its columns.
    """
    if (value := row.columns.get(column)) is not None:
        return value
    within = row.columns.get("reward_model")
    if column == "ground_truth" and isinstance(within, dict):
        return within.get(column)
    if column == "system" and isinstance(row.prompt, list) and row.prompt[0]["role"] == column:
        return row.prompt[0]["content"]
    return row.beside.get(column) if isinstance(row, Prompt) else None
