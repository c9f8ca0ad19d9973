"""The world of ranks: which of several processes this one is, and what they do together.

Every rank runs the whole stage: it reads the same rows, draws the same batches, and takes the same
decisions, because what these rest on is the same everywhere. Only costly work is dealt out, which
is micro-batches, items to score and prompts to sample from; what comes of it is summed or gathered
in an order that the number of ranks does not change. So no stage knows of ranks.

Here is the world of one process, in which all of this is nothing. `ranks/group.py` has the other
one, which alone imports torch.distributed; this module imports nothing, for it is read at start-up.
"""

from __future__ import annotations

from contextlib import contextmanager

TYPE_CHECKING = False  # as type checkers read it
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, TypeVar

    from torch import Tensor

    Value = TypeVar("Value")


class World:
    """A process that runs alone, as rank 0 of 1.

    rank, size: of this process, and how many there are.
    local_rank, local_size: the same among those of its machine.
    mesh: of torch.distributed, over which weights are sharded; None where each rank holds all.
    """

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1
    mesh: Any = None

    @property
    def is_main(self) -> bool:
        """Whether it is rank 0, which alone writes files and speaks."""
        return self.rank == 0

    def shard(self, over: str) -> None:
        """From now on models that are loaded are sharded, as hardware.shard says.

        One process holds all of them, whatever it says.
        """

    def share(self, count: int) -> range:
        """The places of this rank among `count`: runs as even as can be, in the order of ranks."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def dealt(self, groups: Sequence[Value]) -> Sequence[Value]:
        """The groups that are this rank's work: they are dealt one by one, round and round."""
        return groups[self.rank :: self.size]

    def idle(self, groups: Sequence[Value]) -> Sequence[Value]:
        """A group to do for nothing, where weights are sharded and others have one more to do.

        They gather the weights for each pass together.
        """
        left = len(groups) % self.size
        return groups[:1] if self.mesh is not None and left and self.rank >= left else []

    def place(self, turn: int) -> int:
        """The place among all groups of the one that `dealt` has at `turn`."""
        return turn * self.size + self.rank

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, in place."""

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of all ranks, rank by rank, on the CPU.

        Those of one call have one type and one number of dimensions, at least one, of which all
        but the first are the same; each rank may give any number of them.
        """
        return [tensor.cpu() for tensor in tensors]

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        return flag

    def all(self, flag: bool) -> bool:
        """Whether it holds on every rank."""
        return not self.any(not flag)

    def from_all(self, value: Value) -> list[Value]:
        """What each rank has, by rank: values of JSON."""
        return [value]

    def from_main(self, value: Value) -> Value:
        """What rank 0 has: a value of JSON, for what a clock or a disk decides."""
        return value

    def send(self, tensor: Tensor) -> None:
        """Replace a tensor by that of rank 0, in place; it lies on the CPU, and is contiguous."""

    def lead(self, work: Callable[[], Value], leads: bool | None = None) -> Value | None:
        """What `work` gives on the ranks that do it; None on others, who wait for as long as those
        are at it.

        Args:
            leads: whether this rank is one of them; by default rank 0 is.
        """
        return work() if leads or (leads is None and self.is_main) else None

    def barrier(self, until: str) -> None:
        """Wait for all ranks; `until` says for what, should one not come."""


_worlds = [World()]  # the last one counts


def world() -> World:
    """The world of this process."""
    return _worlds[-1]


def enter(own: World) -> None:
    """From now on this is the world of this process."""
    _worlds[:] = [own]


@contextmanager
def alone() -> Iterator[None]:
    """Within this block the process works on its own share, as if there were no others."""
    _worlds.append(World())
    try:
        yield
    finally:
        _worlds.pop()
