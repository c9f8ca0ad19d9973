"""Which cases run at every change, and which with the slow tests."""

from collections.abc import Callable, Container, Iterable
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A case for the slow tests."""
    return pytest.param(*values, marks=pytest.mark.slow)


def fast(quick: Container[Any] | Callable[[Any], bool], cases: Iterable[Any]) -> list[Any]:
    """All cases, of which these alone are for every change.

    Args:
        quick: the fast ones themselves, or what tells them.
        cases: values of one parameter, or tuples of several.
    """
    tell = quick if callable(quick) else quick.__contains__
    return [
        each if tell(each) else slow(*(each if isinstance(each, tuple) else (each,)))
        for each in cases
    ]
