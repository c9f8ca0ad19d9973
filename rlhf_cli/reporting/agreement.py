"""What ranks must be at one about: errors, which end all of them alike, and metrics."""

import zlib
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.ranks.world import alone, world

Value = TypeVar("Value")
FAILURES = (RunError, UserError)
BITS = 24  # of a checksum: squares of it, summed over many ranks, are still whole numbers of int64
BY_CLOCK = ("seconds", "tokens_per_second")  # what the names of metrics that differ begin with


def on_every_rank(work: Callable[[], Value]) -> Value:
    """What this rank's `work` gives, done as if there were no others, once theirs is done, too.

    Raises:
        RunError, UserError: what the first rank raised whose work failed, on all ranks alike.
    """
    if world().size == 1:
        return work()
    failure: RunError | UserError | None = None
    try:
        with alone():
            done = work()
    except FAILURES as error:
        failure = error
    if not world().any(failure is not None):
        return done
    told = world().gather([] if failure is None else [_written(failure)])
    raise _read(told[0]) from failure


def on_main(work: Callable[[], Value]) -> Value | None:
    """What `work` gives on rank 0, None on all others; errors as in `on_every_rank`."""
    is_main = world().is_main
    return on_every_rank(lambda: work() if is_main else None)


def _written(error: RunError | UserError) -> Tensor:
    """Which error, and the bytes of what it says."""
    return torch.tensor([FAILURES.index(type(error)), *str(error).encode()])


def _read(row: Tensor) -> RunError | UserError:
    kind, *text = row.tolist()
    return FAILURES[kind](bytes(text).decode())


def check_alike(step: int, metrics: Mapping[str, object]) -> None:
    """All ranks have the same metrics, to the bit; what a clock says is left out.

    All take the same decisions because all rests on the same numbers. One small sum tells whether
    it does, so that what splits the ranks, such as a random loss of the user's, ends the run.

    Raises:
        RunError: which rank has another value than rank 0, and of which metric.
    """
    own = world()
    if own.size == 1:
        return
    known = {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not name.startswith(BY_CLOCK)
    }
    names, values = list(known), torch.tensor(list(known.values()), dtype=torch.float64)
    check = zlib.crc32(repr(names).encode() + values.numpy().tobytes()) % 2**BITS
    sums = torch.tensor([check, check**2])
    own.sum([sums])
    total, squares = sums.tolist()
    if total**2 == squares * own.size:  # their variance is 0
        return
    of_main: list[str] = own.from_main(names)
    rows = own.gather([torch.tensor([known.get(name, torch.nan) for name in of_main]).double()])
    lengths = own.gather([torch.tensor([len(names)])])
    raise RunError(f"step {step}: {_difference(of_main, rows, lengths)}")


def _difference(names: list[str], rows: list[Tensor], lengths: list[Tensor]) -> str:
    """The first metric of the first rank that is not as rank 0 has it.

    Args:
        rows: of each rank the values of these names, NaN where it has none.
        lengths: of each rank how many it has.
    """
    why = "ranks no longer compute the same, as by a loss or a disk that is not the same everywhere"
    for rank, row in enumerate(rows):
        other = [
            place
            for place, (ours, theirs) in enumerate(zip(rows[0].tolist(), row.tolist(), strict=True))
            if repr(ours) != repr(theirs)
        ]
        if other:
            name, ours, theirs = names[other[0]], rows[0][other[0]], row[other[0]]
            return (
                f"{name} is {ours.item()!r} on rank 0 and {theirs.item()!r} on rank {rank}: {why}"
            )
    rank = next(i for i, length in enumerate(lengths) if length.item() != len(names))
    return f"rank {rank} has {int(lengths[rank])} metrics and rank 0 has {len(names)}: {why}"
