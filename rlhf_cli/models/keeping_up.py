"""Work on sharded models that does not succeed on one rank, while the others wait for it within.

Each gathers what the others hold and sums gradients with them, in the same order on all ranks,
whatever a batch holds. So a rank that broke off does the same passes again on next to nothing,
skips what it has done with the others already, and from there on keeps up with them to the end.
What comes of it is thrown away everywhere: all ranks then do the work again in another way.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar
from weakref import WeakSet

from rlhf_cli.config.errors import RunError
from rlhf_cli.models.out_of_memory import Group, halves, if_it_fits, in_groups
from rlhf_cli.ranks.world import world

Result = TypeVar("Result")


class Steps:
    """Counts what this rank has gathered and summed with the others.

    done: since the work began.
    past: of what is to come, how much it has done with them already.
    models: that do so; what is left of their pass that broke off is to be freed.
    """

    done = 0
    past = 0
    models: "WeakSet[Any]" = WeakSet()

    def begin(self) -> None:
        """The work begins."""
        self.done = self.past = 0

    def begin_again(self) -> None:
        """It begins on next to nothing, after it broke off."""
        self.done, self.past = 0, self.done
        for model in list(self.models):
            model.reset_iter_state()

    def is_past(self) -> bool:
        """Whether the next one was done before; it is counted."""
        self.done += 1
        if not self.past:
            return False
        self.past -= 1
        return True


STEPS = Steps()


def keep_up(
    work: Callable[[], Result | None],
    least: Callable[[], object] | None,
    again: Callable[[], object] | None = None,
) -> Result | None:
    """What `work` gives; None on all ranks where memory ran out on one, or where it gives None.

    Args:
        least: the passes of `work` on as little as can be; None where it has none that are shared.
        again: what to do before work that shares none is done once more, as `if_it_fits` has it.

    Raises:
        RunError: memory is too small even for that.
    """
    shares = world().mesh is not None
    if not shares:
        done = if_it_fits(work, again)
        return done if world().all(done is not None) else None
    STEPS.begin()
    done = if_it_fits(work)
    if done is None:
        STEPS.begin_again()
        if least is None or world().mesh.ndim > 1 or if_it_fits(lambda: (least(),)) is None:
            raise RunError(
                "out of memory on a rank, where the others cannot be told; lower "
                "hardware.tokens_per_microbatch, or set hardware.gradient_checkpointing=true"
            )
    return done if world().all(done is not None) else None


def in_shared_groups(
    groups: Sequence[Group],
    work: Callable[[Group], Result],
    failure: Callable[[Group], RunError],
    told: Callable[[Group], object] = lambda group: None,
) -> tuple[Sequence[Group], list[tuple[Group, Result]]]:
    """What `in_groups` gives of the groups that are this rank's, and the groups of all ranks.

    Of sharded models they are then in halves, as on all ranks, where memory ran out on one.

    Args:
        told: of each of this rank's groups that is done.
    """

    def each(found: Iterable[tuple[Group, Result]]) -> list[tuple[Group, Result]]:
        pairs = []
        for group, result in found:
            pairs.append((group, result))
            told(group)
        return pairs

    if world().mesh is None:
        return groups, each(in_groups(world().dealt(groups), work, failure))

    def all_of_them() -> list[tuple[Group, Result]]:
        done = each((group, work(group)) for group in world().dealt(groups))
        for group in world().idle(groups):
            work(group)
        return done

    def least() -> None:
        for group in [*world().dealt(groups), *world().idle(groups)]:
            work(group[:1])  # type: ignore[arg-type]

    while (done := keep_up(all_of_them, least)) is None:
        if all(len(group) == 1 for group in groups):
            raise failure(groups[0])
        groups = [half for group in groups for half in halves(group)]
    return groups, done


def counted(group: Any) -> None:
    """Count what a group of sharded weights gathers and sums."""
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
        DefaultAllGather,
        DefaultReduceScatter,
    )

    class Gather(DefaultAllGather):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return None if STEPS.is_past() else super().__call__(*args, **kwargs)

    class Scatter(DefaultReduceScatter):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return None if STEPS.is_past() else super().__call__(*args, **kwargs)

    for each in group._get_fsdp_state()._fsdp_param_groups:
        each._all_gather_comm, each._reduce_scatter_comm = Gather(), Scatter()
