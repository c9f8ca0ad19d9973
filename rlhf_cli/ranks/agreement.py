"""What ranks must be at one about: errors, which end all of them alike, and metrics."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.ranks.world import alone, world

Value = TypeVar("Value")
FAILURES = {each.__name__: each for each in (RunError, UserError)}
BITS = 24  # of a checksum: squares of it, summed over many ranks, are still whole numbers of int64
BY_CLOCK = ("seconds", "tokens_per_second")  # what the names of metrics that differ begin with


def together(work: Callable[[], Value]) -> Value:
    """What this rank's `work` gives, once that of all others is done, too.

    Raises:
        RunError, UserError: what the first rank raised whose work failed, on all ranks alike.
    """
    if world().size == 1:
        return work()
    failure: RunError | UserError | None = None
    try:
        done = work()
    except (RunError, UserError) as error:
        failure = error
    if not world().any(failure is not None):
        return done
    told = world().from_all(None if failure is None else [type(failure).__name__, str(failure)])
    kind, text = next(each for each in told if each is not None)
    raise FAILURES[kind](text) from failure


def on_every_rank(work: Callable[[], Value]) -> Value:
    """`together`, each as if there were no others."""

    def own() -> Value:
        with alone():
            return work()

    return together(own)


def by_main(work: Callable[[], Value]) -> Value:
    """What `work` gives on rank 0, which alone does it: a value of JSON. Errors are of all."""
    done: Any = together(lambda: work() if world().is_main else None)
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
        if isinstance(value, int | float) and not name.startswith(BY_CLOCK)
    }
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
