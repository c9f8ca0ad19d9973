"""When memory runs out, work on several items is done again on fewer of them at once.

Losses are summed over items and results are an item's own, so that nothing but time changes.
"""

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

import torch

from rlhf_cli.config.errors import RunError
from rlhf_cli.config.schema.hardware import Hardware


class Spare(Protocol):
    """Who keeps tensors that can be made again."""

    def release(self) -> bool:
        """Let them go; whether there were any."""


SPARE: "WeakSet[Spare]" = WeakSet()  # asked where memory runs out
Result = TypeVar("Result")
Group = TypeVar("Group", bound=Sequence[Any])

SIGNS = (  # in what torch, its allocators and the libraries below say when memory runs out
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there is no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def if_it_fits(
    work: Callable[[], Result], again: Callable[[], object] | None = None
) -> Result | None:
    """What `work` gives; None where memory ran out, and then all that it held is free again.

    Args:
        again: what to do before work is done once more, where somebody could spare memory; None
            where it must not be.
    """
    try:
        return work()
    except Exception as error:
        if not ran_out(error):
            raise
    # Here, and not before, the error's frames are gone, and with them their tensors.
    spared = spare()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if not spared or again is None:
        return None
    again()
    return if_it_fits(work)


def spare() -> bool:
    """Have everybody let go of what can be made again; whether there was any."""
    found = [each.release() for each in list(SPARE)]
    return any(found)


def halves(group: Group) -> list[Group]:
    """A group in two; a group of one as it is."""
    half = len(group) // 2
    return [group[:half], group[half:]] if half else [group]  # type: ignore[list-item]


def in_groups(
    groups: Iterable[Group],
    work: Callable[[Group], Result],
    failure: Callable[[Group], RunError],
    halve: Callable[[Group], list[Group]] = halves,
) -> Iterator[tuple[Group, Result]]:
    """Each group with what `work` gives for it; one that does not fit is halved, as all after it.

    Args:
        failure: what to say where a group that cannot be halved does not fit.
    """
    waiting = deque(groups)
    while waiting:
        group = waiting[0]
        result = if_it_fits(lambda group=group: work(group), _nothing)  # type: ignore[misc]
        if result is not None:
            waiting.popleft()
            yield group, result
        elif len(halve(group)) == 1:
            raise failure(group)
        else:
            waiting = deque(part for each in waiting for part in halve(each))


def _nothing() -> None:
    pass


# --------------------------------------------------------------------------- messages


def oom_error(phase: str, rows: int, longest: int, keys: Sequence[str] = ()) -> RunError:
    """What to say where the least piece of work does not fit.

    Args:
        rows: sequences of that piece.
        longest: tokens of the longest of them.
        keys: what would make it smaller, by `keys_that_help`.
    """
    sequences = "sequence" if rows == 1 else "sequences"
    ways = [*keys, "shorter data.max_prompt_tokens and max_response_tokens", "a smaller model"]
    return RunError(
        f"out of memory in {phase}, with as little at once as can be: {rows} {sequences} x "
        f"{longest} = {rows * longest} padded tokens; what helps: {', '.join(ways)}"
    )


def keys_that_help(
    hardware: Hardware, longest: int, *, logits: bool, gradient: bool = False
) -> list[str]:
    """The keys of `hardware` that make a single item take less memory, as they could be set.

    Those that cut a batch are not among them, for it has been cut as far as it goes.

    Args:
        longest: tokens of the item's longest sequence.
        logits: whether the work holds logits.
        gradient: whether it keeps activations for a backward pass.
    """
    keys = []
    positions = min(hardware.logits_at_once, longest)  # whose logits exist at once
    if logits and positions > 1:
        keys.append(f"hardware.logprob_chunk={positions // 2}")
    if gradient and hardware.gradient_checkpointing is False:
        keys.append("hardware.gradient_checkpointing=true")
    return keys
