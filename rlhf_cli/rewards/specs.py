r"""What `reward=` says, read without torch: a sum of terms, each a model, a rule or a function.

    reward="runs/demo/reward + 0.2*length:20 + -1*checks.py:polite"

Terms are joined by " + " and may begin with `WEIGHT*`; a weight of 0 logs a term that is not
learned from. A pattern that holds " + " must write it otherwise, such as `\s\+\s`.
"""

import ast
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.paths import is_path
from rlhf_cli.data.kinds import Demonstration, Prompt
from rlhf_cli.folders.manifest import RESPONSE, STEP, implicit_reward_of, level_of
from rlhf_cli.rewards.rules import check_columns, is_rule, rule_of

PLUS = re.compile(r"(?:^| +)\+(?= |$)")
WEIGHT = re.compile(r"([^:/*]*)\*(.*)", re.DOTALL)
FUNCTION = re.compile(r"(.+\.py):([^\W\d]\w*)")


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


def refreshed_model(spec: str) -> str:
    """The one term of a reward that algo.refresh_reward trains: a reward model of responses.

    Raises:
        UserError: there is none, or several.
    """
    learners = [
        term.spec
        for term in terms_of(spec)
        if term.weight and is_model(term.spec) and implicit_reward_of(term.spec) is None
    ]
    learners = [name for name in learners if level_of(name) == RESPONSE]
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


@dataclass(frozen=True)
class Signature:
    """How a user's function wants to be called.

    given: the names of its first two parameters: prompts, and responses or steps.
    columns: the row columns that it names; required: those of them without a default.
    takes_all: whether it has **kwargs, and so gets every column.
    is_async: whether it is called once per response, rather than once per batch.
    """

    given: tuple[str, str]
    columns: tuple[str, ...]
    required: tuple[str, ...]
    takes_all: bool
    is_async: bool

    @property
    def judges(self) -> str:
        """`step` where the second parameter is called steps, else `response`."""
        return "step" if self.given[1] == "steps" else "response"


def function_of(spec: str) -> tuple[Path, str] | None:
    """File and name of the function that a term names as path/to/file.py:function, if it does."""
    match = None if is_rule(spec) else FUNCTION.fullmatch(spec)
    return (Path(match[1]), match[2]) if match else None


def signature_of(file: Path, name: str) -> Signature:
    """The signature of a function, read from its source; nothing is run.

    Raises:
        UserError: there is no such file or function, or it cannot be called with two lists.
    """
    spec = f"reward={file}:{name}"
    if not file.is_file():  # of a pipe, reading would not end
        raise UserError(f"{spec}: no such file: {file}")
    try:
        body = ast.parse(file.read_bytes(), str(file)).body
    except OSError:
        raise UserError(f"{spec}: no such file: {file}") from None
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise UserError(f"{spec}: {file} line {line} is not Python: {error.args[0]}") from None
    defined = [node for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    matching = [node for node in defined if node.name == name]
    if not matching:
        names = ", ".join(node.name for node in defined) or "none"
        raise UserError(f"{spec}: {file} defines no function {name} (functions: {names})")
    node = matching[-1]
    positional = [*node.args.posonlyargs, *node.args.args]
    if len(positional) < 2:
        raise UserError(
            f"{spec}: a reward function takes prompts and responses (or steps) first, then row "
            "columns by name"
        )
    without_default = positional[2 : max(2, len(positional) - len(node.args.defaults))]
    named = list(zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True))
    return Signature(
        given=(positional[0].arg, positional[1].arg),
        columns=tuple(arg.arg for arg in [*positional[2:], *node.args.kwonlyargs]),
        required=tuple(
            arg.arg
            for arg in [*without_default, *(arg for arg, default in named if default is None)]
        ),
        takes_all=node.args.kwarg is not None,
        is_async=isinstance(node, ast.AsyncFunctionDef),
    )


def check_function_columns(
    spec: str, signature: Signature, rows: Sequence[Prompt | Demonstration]
) -> None:
    """Stop where a function names a column that no row has."""
    columns = {name for row in rows for name in row.columns}
    for name in signature.required:
        if rows and name not in columns:
            raise UserError(
                f"{rows[0].source}: reward={spec} needs a column {name!r}; found "
                + ", ".join(["prompt", *sorted(columns)])
            )
