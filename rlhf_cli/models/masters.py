"""Weights in bfloat16 to compute with, and the float32 values behind them.

With model.dtype=bfloat16 a module holds one working copy of its weights, which rollouts, scoring,
forward and backward pass share. What is trained has a float32 master beside it: updates below the
resolution of bfloat16 add up there, and gradients are summed in its `grad` over micro-batches. The
working copy is always the rounded master, at an address that stays, so that what was captured with
it goes on being right. In float32 a weight is its own master, and nothing here does anything.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlhf_cli.models.shards import is_sharded, own_part, part_of, whole

HELD = torch.bfloat16
_MASTER = "master"


def master_of(weight: Tensor) -> Tensor:
    """The float32 values behind a working copy; any other weight itself."""
    master: Tensor = getattr(weight, _MASTER, weight)
    return master


@torch.no_grad()
def hold(
    weights: Mapping[str, nn.Parameter],
    trained: bool,
    written: Callable[[str], bool] = lambda name: False,
    device: torch.device | None = None,
) -> None:
    """Hold float32 weights in bfloat16 from now on.

    Args:
        weights: by name; those of another type are left alone.
        trained: whether those that want a gradient are to be trained, and get a master.
        written: of which other weights, by name, float32 values are kept for what is written, where
            rounding changes them; on the CPU, if they are there.
        device: where masters go; None: they stay where they are.
    """
    for name, weight in weights.items():
        if weight.dtype != torch.float32:
            continue
        exact = weight.data
        if trained and weight.requires_grad:
            exact = exact if device is None else exact.to(device)
            setattr(weight, _MASTER, exact)
        elif written(name) and not torch.equal(exact.to(HELD).float(), exact):
            setattr(weight, _MASTER, exact)
        weight.data = exact.to(HELD)


def give_masters(weights: Iterable[nn.Parameter]) -> None:
    """Let held weights be trained that were loaded as frozen ones."""
    for weight in weights:
        if weight.dtype == HELD and master_of(weight).device != weight.device:
            setattr(weight, _MASTER, master_of(weight).detach().to(weight.device))
        if weight.dtype == HELD and not hasattr(weight, _MASTER):
            setattr(weight, _MASTER, weight.detach().float())


def release(weights: Iterable[nn.Parameter]) -> None:
    """Hold weights in float32 from now on, as to change their shapes; they are not trained then."""
    for weight in weights:
        if weight.dtype == HELD:
            weight.data = master_of(weight).detach().to(weight.device, torch.float32)
            vars(weight).pop(_MASTER, None)


@torch.no_grad()
def put(weight: Tensor, value: Tensor) -> None:
    """Give a weight a value, in place: its master takes it as it is, the working copy rounded.

    A sharded weight takes its part of a whole value, a whole one all of a sharded value.
    """
    master = master_of(weight)
    if is_sharded(value):
        value = own_part(value) if is_sharded(master) else whole(value)
    else:
        value = part_of(value, master)
    own_part(master).copy_(value)
    if master is not weight:
        weight.copy_(master)


@torch.no_grad()
def follow(weights: Iterable[Tensor]) -> None:
    """Give working copies the values of their masters, in place, once those were changed."""
    pairs = [(weight, master_of(weight)) for weight in weights]
    held = [pair for pair in pairs if pair[0] is not pair[1]]
    if held:
        copies, masters = zip(*held, strict=True)
        torch._foreach_copy_(list(copies), list(masters))


# --------------------------------------------------------------------------- gradients


@torch.no_grad()
def gather(weights: Iterable[nn.Parameter]) -> None:
    """Move the gradients that a backward pass left to the masters, and add them up in float32.

    All at once: on a GPU a kernel for each would take longer to launch than to run.
    """
    sums: list[Tensor] = []
    fresh: list[Tensor] = []
    added: tuple[list[Tensor], list[Tensor]] = ([], [])
    for weight in weights:
        master, gradient = master_of(weight), weight.grad
        if gradient is None or master is weight:
            continue
        weight.grad = None
        if master.grad is not None:
            added[0].append(master.grad)
            added[1].append(gradient)
        elif gradient.dtype == torch.float32:
            master.grad = gradient
        else:
            master.grad = torch.empty_like(master)
            sums.append(master.grad)
            fresh.append(gradient)
    if fresh:
        torch._foreach_copy_(sums, fresh)
    if added[0]:
        torch._foreach_add_(*added)


def sum_uses_in_float32(weights: Iterable[nn.Parameter]) -> None:
    """Sum in float32 what several uses of a weight in one pass say, as those by chunks of logits.

    For the unembedding alone, as it costs a cast of the gradient; torch knows it from 2.13 on.
    """
    for weight in weights:
        if weight.dtype == HELD and weight.requires_grad and hasattr(weight, "grad_dtype"):
            weight.grad_dtype = torch.float32


# --------------------------------------------------------------------------- other types


@contextmanager
def held_as(
    dtype: torch.dtype, weights: Iterable[nn.Parameter], lasting: bool = True
) -> Iterator[None]:
    """Hold weights in another type within this block, from their masters.

    What they are rounded by stays; so does, in float32, what is changed in place. Of frozen weights
    in bfloat16 it does not: those are as they were.

    Args:
        lasting: otherwise all are as they were, and take memory beside those that are held so.
    """
    own = list(weights)
    working = {weight: weight.data for weight in own if weight.dtype == HELD or not lasting}
    for weight in own:
        if weight.dtype != dtype:  # a working copy is its master rounded already
            weight.data = master_of(weight).data.to(dtype)
    try:
        yield
    finally:
        for weight in own:
            if weight not in working:
                weight.data = weight.data.float()
                continue
            value, weight.data = weight.data, working[weight]
            if lasting and hasattr(weight, _MASTER):
                put(weight, value)


def unrounded(model: nn.Module) -> dict[int, nn.Parameter]:
    """Float32 stand-ins for what is held in bfloat16, for a deep copy of a model: its memo."""
    return {
        id(weight): nn.Parameter(
            master_of(weight).detach().to(weight.device, torch.float32, copy=True),
            weight.requires_grad,
        )
        for weight in model.parameters()
        if weight.dtype == HELD
    }
