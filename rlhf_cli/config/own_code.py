"""Functions of users, as `path/to/file.py:function`: read without being run, then run where named.

What is known of a function before it runs is read from its source, so that a check runs nothing.
"""

import ast
import importlib.util
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_cli.config.errors import UserError

FUNCTION = re.compile(r"(.+\.py):([^\W\d]\w*)")
LIBRARIES = tuple(
    Path(path).resolve()
    for path in (
        *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")),
        str(Path(__file__).parents[1]),
    )
)


@dataclass(frozen=True)
class Parameters:
    """What a function takes by name.

    required: those of `names` without a default.
    takes_all: whether it has **kwargs.
    """

    names: tuple[str, ...]
    required: tuple[str, ...]
    takes_all: bool
    is_async: bool


def function_named(text: str) -> tuple[Path, str] | None:
    """File and name of the function that a text names as path/to/file.py:function, if it does."""
    match = FUNCTION.fullmatch(text)
    return (Path(match[1]), match[2]) if match else None


def parameters_of(key: str, file: Path, name: str) -> Parameters:
    """The parameters of a function, read from its source; nothing is run.

    Args:
        key: that names the function, for messages.

    Raises:
        UserError: there is no such file or function, or it takes what cannot be given by name.
    """
    spec = f"{key}={file}:{name}"
    if not file.is_file():  # of a pipe, reading would not end
        raise UserError(f"{spec}: no such file: {file}")
    try:
        body = ast.parse(file.read_bytes(), str(file)).body
    except OSError as error:
        raise UserError(f"{spec}: {file} cannot be read: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise UserError(f"{spec}: {file} line {line} is not Python: {error.args[0]}") from None
    defined = [node for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    matching = [node for node in defined if node.name == name]
    if not matching:
        names = ", ".join(node.name for node in defined) or "none"
        raise UserError(f"{spec}: {file} defines no function {name} (functions: {names})")
    node = matching[-1]
    if node.args.posonlyargs:
        raise UserError(
            f"{spec}: {node.args.posonlyargs[0].arg} stands before a / and cannot be given by "
            "name, as all is; remove the /"
        )
    positional, defaults = node.args.args, node.args.defaults
    required = positional[: len(positional) - len(defaults)]
    named = list(zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True))
    return Parameters(
        names=tuple(arg.arg for arg in [*positional, *node.args.kwonlyargs]),
        required=tuple(
            arg.arg for arg in [*required, *(arg for arg, default in named if default is None)]
        ),
        takes_all=node.args.kwarg is not None,
        is_async=isinstance(node, ast.AsyncFunctionDef),
    )


def function_in(key: str, file: Path, name: str) -> Callable[..., Any]:
    """The function itself; its file is run, once.

    Raises:
        UserError: the file raises, or what it has by that name is no function.
    """
    function = getattr(_loaded(file.resolve()), name, None)
    if not callable(function):
        raise UserError(f"{key}={file}:{name}: {name} is no function once {file} has run")
    return function


@cache
def _loaded(file: Path) -> ModuleType:
    name = f"rlhf_own_{file.stem}_{abs(hash(file))}"
    made = importlib.util.spec_from_file_location(name, file)
    assert made is not None and made.loader is not None
    module = importlib.util.module_from_spec(made)
    sys.modules[name] = module  # dataclasses and pickle look modules up
    try:
        with redirect_stdout(sys.stderr):  # standard output is for the path of what was made
            made.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"{file}: {said_by(error, file)}") from None
    return module


# --------------------------------------------------------------------------- what it raised


def said_by(error: BaseException, file: Path) -> str:
    """What an exception is and says, in one line, and the last line of the user's that it passed.

    Args:
        file: of the function.
    """
    text = f"{type(error).__name__}: {first_line(error)}"
    frames = own_frames(error, file)
    return f"{text} ({Path(frames[-1].filename).name} line {frames[-1].lineno})" if frames else text


def trace_of(error: BaseException, file: Path) -> list[str]:
    """The lines of the user's that an exception passed, the outermost first, a line each."""
    return [
        f"{frame.filename} line {frame.lineno} in {frame.name}: {frame.line}"
        for frame in own_frames(error, file)
    ]


def own_frames(error: BaseException, file: Path) -> list[traceback.FrameSummary]:
    """Those frames of an exception that are not of Python, of installed packages or of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if _is_own(frame.filename, file)]


def _is_own(filename: str, file: Path) -> bool:
    if filename.startswith("<"):  # of what is made as it runs, such as importlib's
        return False
    place = Path(filename).resolve()
    return place == file.resolve() or not any(place.is_relative_to(each) for each in LIBRARIES)


def first_line(error: BaseException) -> str:
    """The first line of what an exception says."""
    return (str(error).strip().splitlines() or ["no message"])[0]
