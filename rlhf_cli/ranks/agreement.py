"""What ranks must be at one about: errors, which end all of them alike, and metrics."""

import json
import zlib
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeVar

from rlhf_cli.config.errors import RunError
from rlhf_cli.ranks.world import alone, world

Value = TypeVar("Value")
BITS = 24  # of a checksum: squares of it, summed over many ranks, are still whole numbers of int64
BY_CLOCK = "second"  # in the names of metrics that a clock says


def together(work: Callable[[], Value]) -> Value:
    """What this rank's `work` gives, once that of all others is done, too.

    An error is raised on all ranks alike, wherever it was; of several that of the lowest rank. So
    none waits for one that is gone, and all say the same.
    """
    if world().size == 1:
        return work()
    failure: Exception | None = None
    try:
        done = work()
    except Exception as error:
        failure = error
    if not world().any(failure is not None):
        return done
    told = world().from_all(None if failure is None else _told(failure))
    for rank, error_there in enumerate(told):
        if error_there is not None and rank != world().rank:
            raise _raised(error_there) from failure
        if error_there is not None:
            break
    assert failure is not None
    raise failure


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
        return RunError(" ".join(map(str, told["arguments"])))
    return error


def on_every_rank(work: Callable[[], Value]) -> Value:
    """`together`, each as if there were no others."""

    def own() -> Value:
        with alone():
            return work()

    return together(own)


def by_main(work: Callable[[], Value]) -> Value:
    """What `work` gives on rank 0, which alone does it: a value of JSON. Errors are of all.

    It may take longer than ranks else wait for each other, as a user's function may, or a server.
    """
    done: Any = together(lambda: world().lead(work))
    given: Value = world().from_main(done)
    return given


def check_alike(step: int, metrics: Mapping[str, object]) -> None:
    """All ranks have the same metrics, to the bit; what a clock says is left out.

    All take the same decisions because all these rest on the same numbers. One small sum tells
    whether they do, so that what splits the ranks ends the run.

    Raises:
        RunError: which rank has another value than rank 0, and of which metric.
    """
    if world().size == 1:
        return
    known = {
        name: repr(value)
        for name, value in sorted(metrics.items())
        if isinstance(value, int | float) and BY_CLOCK not in name
    }
    import torch  # this module is read before it

    check = zlib.crc32(repr(known).encode()) % 2**BITS
    sums = torch.tensor([check, check**2])
    world().sum([sums])
    total, squares = sums.tolist()
    if total**2 == squares * world().size:  # their variance is 0
        return
    rows = world().from_all(known)
    rank, name = next(
        (rank, name)
        for rank, row in enumerate(rows)
        for name in [*rows[0], *row]
        if rows[0].get(name) != row.get(name)
    )
    ours, theirs = (row.get(name, "nothing") for row in (rows[0], rows[rank]))
    raise RunError(
        f"step {step}: {name} is {ours} on rank 0 and {theirs} on rank {rank}: the ranks do not "
        "compute the same any more; see to it that all have the same files and versions"
    )
