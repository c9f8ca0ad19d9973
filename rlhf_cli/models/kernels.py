"""Modules of Triton kernels, which stand beside plain versions of the same."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from rlhf_cli.reporting.console import say


def tried(module: str, trial: Callable[[Any], object], what: str) -> Any:
    """A module whose kernels run here; None where Triton is not installed, or has no compiler.

    Args:
        trial: runs the kernels on something small.
        what: is computed by them, for what is said where they do not run.
    """
    if find_spec("triton") is None:
        return None
    try:
        kernels = import_module(module)
        trial(kernels)
    except Exception as error:  # in many ways
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        say(f"{what} without Triton, whose kernels do not compile here: {first}")
        return None
    return kernels
