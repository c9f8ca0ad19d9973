"""Work of ranks that counts only if it was done by each: an error of one is an error of all."""

from __future__ import annotations

import json
from importlib import import_module

from rlhf_cli.ranks.world import world

TYPE_CHECKING = False  # as type checkers read it; this is read at start-up
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    Value = TypeVar("Value")


def together(work: Callable[[], Value]) -> Value:
    """What `work` gives on this rank. An error is raised on all ranks, wherever it was.

    Of several it is that of the lowest rank. So no rank waits for one that is gone, and all of them
    say the same.
    """
    if world().size == 1:
        return work()
    own: Exception | None = None
    try:
        done = work()
    except Exception as error:
        own = error
    told = world().from_all(None if own is None else _told(own))
    for rank, error_there in enumerate(told):
        if error_there is not None:
            raise own if own is not None and rank == world().rank else _raised(error_there)
    return done


def by_main(work: Callable[[], Value]) -> Value:
    """What `work` gives on rank 0, which alone does it: a value of JSON.

    An error is raised on all ranks.
    """
    done: Any = together(lambda: work() if world().is_main else None)
    given: Value = world().from_main(done)
    return given


def _told(error: Exception) -> dict[str, Any]:
    """An error as JSON: its class by name, and what that is made from."""
    kind, arguments = type(error), list(error.args)
    if isinstance(error, OSError):
        arguments = [error.errno, error.strerror, error.filename and str(error.filename)]
    try:
        json.dumps(arguments)
    except TypeError:
        arguments = [str(error)]
    return {"module": kind.__module__, "name": kind.__qualname__, "arguments": arguments}


def _raised(told: dict[str, Any]) -> Exception:
    """The error that another rank told; of a class that cannot be made of it, its words."""
    try:
        error = getattr(import_module(told["module"]), told["name"])(*told["arguments"])
        assert isinstance(error, Exception)
    except Exception:
        return RuntimeError(*map(str, told["arguments"]))
    return error
