"""A sharded model put together on the CPU of rank 0, to be written as any other."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlhf_cli.models.adapters import POLICY, below, is_adapted, trained, weights_of
from rlhf_cli.models.sharding import class_before
from rlhf_cli.models.shards import is_sharded, whole
from rlhf_cli.ranks.world import world

# where fully_shard puts what gathers a module, none of which can be copied
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks")
STATE = "__composable_api_state_key"


@contextmanager
def assembled(model: nn.Module, adapter_alone: bool = False) -> Iterator[None]:
    """Within this block a model on rank 0 is a plain one, with whole weights on the CPU.

    All ranks enter it; weights are gathered one by one, so that no device holds the model twice. It
    may be copied and written there, and computes nothing. After it all is as it was; a model that
    is not sharded stays as it is.

    Args:
        adapter_alone: what is frozen is not written, and not gathered, but for embeddings.
    """
    if not any(map(is_sharded, model.parameters())):
        yield
        return
    wanted = {id(each) for each in model.parameters()}
    if adapter_alone and is_adapted(model):
        names = [POLICY, *below(model)]
        wanted = {id(each) for name in names for each in weights_of(model, name).values()}
        wanted |= {id(each) for each in trained(model).values()}
        wanted |= {id(each) for each in _embeddings(model)}
    full = _gathered_weights(model, wanted)
    if not world().is_main:
        yield
        return
    # of a scorer on another's base, the modules that its adapter is on as well
    modules = [*model.modules(), *getattr(model, "lender", nn.Module()).modules()]
    undo = [_make_plain(module, full) for module in modules]
    try:
        yield
    finally:
        for module, (own_class, weights, hooks) in zip(modules, undo, strict=True):
            module.__class__ = own_class
            module._parameters.update(weights)
            vars(module).update(hooks)


def _embeddings(model: nn.Module) -> Iterator[nn.Parameter]:
    for ends in (model.get_input_embeddings(), model.get_output_embeddings()):  # type: ignore[operator]
        if ends is not None:
            yield from ends.parameters()


@torch.no_grad()
def _gathered_weights(model: nn.Module, wanted: set[int]) -> dict[int, nn.Parameter]:
    """What stands for each sharded weight on rank 0, by its id; nothing on others."""
    full = {}
    for weight in model.parameters():
        if is_sharded(weight) and id(weight) in wanted:
            value: Tensor = whole(weight.detach())
            if world().is_main:
                full[id(weight)] = nn.Parameter(value.to("cpu", copy=True), weight.requires_grad)
    return full


def _make_plain(
    module: nn.Module, full: dict[int, nn.Parameter]
) -> tuple[type, dict[str, nn.Parameter | None], dict[str, object]]:
    """Put whole weights into a module; returns what was there: class, weights and hooks."""
    own_class = type(module)
    weights = {name: each for name, each in module._parameters.items() if id(each) in full}
    hooks: dict[str, object] = {}
    if (plain := class_before(own_class)) is not None:
        module.__class__ = plain
        hooks = {
            name: value
            for name, value in vars(module).items()
            if name in HOOKS or name.startswith(STATE)
        }
        vars(module).update({name: OrderedDict() for name in hooks})
    for name, weight in weights.items():
        module._parameters[name] = full[id(weight)]
    return own_class, weights, hooks
