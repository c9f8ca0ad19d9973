"""Why a step is not finite: which tensor, and which rows.

Looked for from the cause to its effects: a weight; what an item brings along, such as its
advantages; the loss of an item by itself; the gradient of an item by itself.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_cli.data.order import derived_seed
from rlhf_cli.models.masters import master_of
from rlhf_cli.models.nonfinite import first_nonfinite, is_finite
from rlhf_cli.ranks.world import world
from rlhf_cli.training.loss_term import LossTerm

NAMED = 3  # rows that are named; of more there is the number


@dataclass
class One:
    """An item of a step, and the part that it is in."""

    part: LossTerm
    item: Any
    alone: Any  # a micro-batch of it


def cause_of(networks: dict[str, nn.Module], parts: Sequence[LossTerm]) -> str:
    """What is not finite in a step, and of which rows, as `loss/value of rows.jsonl:12`.

    The gradients of the step must still be there, unclipped; they are gone afterwards. Nothing
    else changes: weights, moments and random states stay as they are.
    """
    weights = {
        f"{network}: {name}": weight
        for network, module in networks.items()
        for name, weight in module.named_parameters()
    }
    if (bad := first_nonfinite(weights)) is not None:
        return f"weight {bad}"
    gradients = {name: master_of(weight).grad for name, weight in weights.items()}
    known = {name: each for name, each in gradients.items() if each is not None}
    gradient = first_nonfinite(known)
    trained = [weights[name] for name in known]
    ones = [
        One(part, batch[i], batch[i : i + 1])
        for part in parts
        for batch in part.batches
        for i in range(len(batch))
    ]
    rewind = draws_again()
    try:
        return (
            _in_items(ones)
            or _in_losses(ones)
            or _in_gradients(ones, trained, gradient)
            or f"sum over {len(ones)} rows, though each is"
        )
    finally:
        rewind()
        for weight in weights.values():
            weight.grad = master_of(weight).grad = None


def _in_items(ones: Sequence[One]) -> str | None:
    """The first of the tensors that items hold, in the order of their fields, and whose it is."""
    bad: dict[tuple[int, str], list[Any]] = {}
    for one in ones:
        for place, (name, tensor) in enumerate(tensors_in(one.item).items()):
            if not is_finite(tensor):
                bad.setdefault((place, name), []).append(one.item)
    if not bad:
        return None
    first = min(bad)
    return f"{first[1]} of {rows_of(bad[first])}"


@torch.no_grad()
def _in_losses(ones: Sequence[One]) -> str | None:
    """The first term of the loss, or the loss, and the items that it is not finite for."""
    bad: dict[str, list[Any]] = {}
    for one in ones:
        loss, metrics = one.part.loss(one.alone)
        if not is_finite(loss):
            terms = {name: value for name, value in metrics.items() if name.startswith("loss/")}
            bad.setdefault(first_nonfinite(terms) or "loss", []).append(one.item)
    return next((f"{name} of {rows_of(items)}" for name, items in bad.items()), None)


def _in_gradients(
    ones: Sequence[One], weights: Sequence[Tensor], gradient: str | None
) -> str | None:
    """The gradient named, and the items that give a bad one by themselves."""
    if gradient is None:
        return None
    items = []
    for one in ones:
        for weight in weights:
            weight.grad = None
        loss, _ = one.part.loss(one.alone)
        (loss * (one.part.weight / one.part.count)).backward()
        if not all(is_finite(weight.grad) for weight in weights if weight.grad is not None):
            items.append(one.item)
    return f"gradient of {gradient}" + (f", by {rows_of(items)}" if items else "")


def tensors_in(item: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors that an item holds, and what it holds, by their names."""
    tensors: dict[str, Tensor] = {}
    for name, value in getattr(item, "__dict__", {}).items():
        if isinstance(value, Tensor):
            tensors[prefix + name] = value
        else:
            tensors |= tensors_in(value, f"{prefix}{name}.")
    return tensors


def rows_of(items: Sequence[Any]) -> str:
    """Where the rows of some items stand: a few by name, and how many more there are."""
    names = list(dict.fromkeys(getattr(item, "source", "") for item in items))
    if names == [""]:
        return f"{len(items)} rows"
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(name or "a row" for name in names[:NAMED]) + more


def draws_again() -> Callable[[], None]:
    """Remember the random states; the function that is returned brings them back."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def rewind() -> None:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return rewind


@contextmanager
def draws_of_rank() -> Iterator[None]:
    """Within this block each of several ranks draws its own masks of dropout; afterwards all go on
    from the random states that they had.
    """
    if world().size == 1:
        yield
        return
    rewind = draws_again()
    if not world().is_main:
        torch.manual_seed(derived_seed(torch.initial_seed(), "rank", world().rank))
    try:
        yield
    finally:
        rewind()
