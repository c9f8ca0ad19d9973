"""Dropout: off in whatever is loaded, on in the residual stream where sft asks for it.

Models stand in evaluation mode in every stage, which turns off whatever a family does at random in
training. Alone what has to stand in training mode does: blocks that are computed again in backward,
or whose residual dropout sft asks for, and dropout of adapters that it asks for.
"""

import copy
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.batches import collate
from rlhf_cli.data.items import Tokens
from rlhf_cli.models.decoder import hidden_states, unwrap
from rlhf_cli.models.experts import decoder_of
from rlhf_cli.models.lora_places import in_short
from rlhf_cli.reporting.console import say

DROPPING = re.compile("drop")  # in the names of numbers that modules and configs hold
RESIDUAL = "residual_dropout"  # an attribute of blocks: what their branches pass through


def disable_dropout(model: nn.Module) -> None:
    """Evaluation mode, and no dropout in the other one: only sft has some, by `residual_dropout`.

    The config of the model, which is written with it, keeps what it says; what its parts read of it
    while they run says 0.
    """
    model.eval()
    whole = unwrap(model)
    silent: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in _rates(vars(module)):
            setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        if module is not whole and isinstance(config, PreTrainedConfig) and _rates(vars(config)):
            if id(config) not in silent:
                silent[id(config)] = without_rates(config)
            module.config = silent[id(config)]


def _rates(values: dict[str, Any]) -> list[str]:
    """The names of dropout rates that are not 0."""
    return [
        name
        for name, value in values.items()
        if DROPPING.search(name)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and value
    ]


def without_rates(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a config in which all dropout rates are 0."""
    silent = copy.deepcopy(config)
    for name in _rates(vars(silent)):
        setattr(silent, name, 0.0)
    return silent


# --------------------------------------------------------------------------- training mode


def training_mode(model: nn.Module) -> None:
    """Training mode where something of ours needs it, evaluation mode elsewhere."""
    _blocks_in_training(model)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            module.training = True


def _blocks_in_training(model: nn.Module) -> None:
    model.eval()
    for module in model.modules():
        recomputed = getattr(module, "gradient_checkpointing", False)
        module.training = bool(recomputed) or callable(getattr(module, RESIDUAL, None))


@torch.no_grad()
def check_training_mode(model: nn.Module) -> None:
    """Stop where blocks in training mode compute something else, as by dropout out of reach.

    What sft drops in them is left out of it.

    The model is in `training_mode` then.

    Raises:
        UserError: naming the architecture.
    """
    outcomes = []
    dropping = {block: getattr(block, RESIDUAL, None) for block in blocks_of(model)}
    for block in dropping:
        if callable(dropping[block]):
            _drop_by(block, _kept)
    for mode in (nn.Module.eval, _blocks_in_training, _blocks_in_training):
        mode(model)
        outcomes.append(hidden_states(model, _probe(model)))
    for block, drop in dropping.items():
        if callable(drop):
            _drop_by(block, drop)
    if not all(torch.equal(outcomes[0], each) for each in outcomes):
        raise UserError(
            f"{type(unwrap(model)).__name__} computes something else in training mode, by dropout "
            "or noise of its own: no hardware.gradient_checkpointing or model.dropout with it"
        )
    training_mode(model)


def _probe(model: nn.Module) -> Any:
    return collate([Tokens([0, 1, 2], [3, 1])], next(model.parameters()).device)


# --------------------------------------------------------------------------- residual dropout


class Branches(TorchFunctionMode):
    """Within a block, whatever is added to the residual stream passes through `drop` first.

    The stream is what the block was given, under other shapes and types and after a LayerNorm too
    (where that comes after the sum), and whatever is the sum of it and a branch.
    """

    SUMS = ("add", "__add__", "__radd__", "add_", "__iadd__")
    SAME = ("to", "float", "type_as", "view", "reshape", "contiguous", "clone", "layer_norm")

    def __init__(self, stream: Tensor, drop: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._stream, self._drop = [stream], drop

    def _streams(self, value: Any) -> bool:
        return any(value is each for each in self._stream)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        pair = args[:2]
        streams = [self._streams(each) for each in pair]
        summed = (
            name in self.SUMS and sum(streams) == 1 and all(isinstance(t, Tensor) for t in pair)
        )
        if summed and pair[0].shape == pair[1].shape:
            dropped = (
                each if ours else self._drop(each) for each, ours in zip(pair, streams, strict=True)
            )
            result = func(*dropped, *args[2:], **(kwargs or {}))
            self._stream.append(result)
            return result
        result = func(*args, **(kwargs or {}))
        if name in self.SAME and streams and streams[0]:
            self._stream.append(result)
        return result


def residual_dropout(model: nn.Module, p: float) -> None:
    """Drop what each block adds to the residual stream, where `training_mode` was called.

    Says what it does not reach.

    Raises:
        UserError: it reaches nothing.
    """
    blocks = blocks_of(model)
    for block in blocks:
        _drop_by(block, _kept)
    check_training_mode(model)
    reached, beyond = reach_of(model)
    if not reached:
        raise UserError(
            f"{type(unwrap(model)).__name__}: nothing found that blocks add to the residual stream "
            "for model.dropout; set it to 0"
        )
    if beyond:
        say(f"note: model.dropout does not reach {', '.join(in_short(beyond))}")
    for block in blocks:
        _drop_by(block, lambda branch: nn.functional.dropout(branch, p))
    model.eval()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The decoder's blocks: of its lists of modules, the one that holds most of the weights."""
    lists = [
        each for each in decoder_of(unwrap(model))[1].modules() if isinstance(each, nn.ModuleList)
    ]
    sizes = [sum(weight.numel() for weight in each.parameters()) for each in lists]
    return list(lists[sizes.index(max(sizes))]) if lists else []  # the outermost comes first


def reach_of(model: nn.Module) -> tuple[int, list[str]]:
    """How many branches are found, and the matrices of blocks that matter without all of them."""
    found = 0

    def drop_all(branch: Tensor) -> Tensor:
        nonlocal found
        found += 1
        return torch.zeros_like(branch)

    blocks = blocks_of(model)
    for block in blocks:
        _drop_by(block, drop_all)
    training_mode(model)
    with torch.enable_grad():
        beyond = _that_matter(model, hidden_states(model, _probe(model)))
    for block in blocks:
        _drop_by(block, None)
    model.eval()
    return found, beyond


def _that_matter(model: nn.Module, output: Tensor) -> list[str]:
    """The names of the trained matrices of blocks that an output depends on."""
    inside = {id(weight) for block in blocks_of(model) for weight in block.parameters()}
    weights = {
        name: weight
        for name, weight in model.named_parameters()
        if id(weight) in inside and weight.ndim > 1 and weight.requires_grad
    }
    if not output.requires_grad or not weights:
        return []
    gradients = torch.autograd.grad(output.sum(), list(weights.values()), allow_unused=True)
    return [name for name, each in zip(weights, gradients, strict=True) if each is not None]


def _kept(branch: Tensor) -> Tensor:
    return branch


def _drop_by(block: nn.Module, drop: Callable[[Tensor], Tensor] | None) -> None:
    """Let a block's branches pass through `drop` in training mode; None: through nothing."""
    if not hasattr(block, RESIDUAL):
        kind: Any = type(block)
        block.__class__ = _dropping(kind)
    setattr(block, RESIDUAL, drop)


@cache
def _dropping(kind: Any) -> Any:
    """The class of a block with `Branches` around what it computes, in backward again too."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        drop = getattr(self, RESIDUAL)
        if drop is None or not self.training:
            return kind.forward(self, *args, **kwargs)
        with Branches(_stream_in(args, kwargs), drop):
            return kind.forward(self, *args, **kwargs)

    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {"forward": forward, **named})


def _stream_in(args: Any, kwargs: Any) -> Tensor:
    """What a block is given: its first input that is not of whole numbers."""
    inputs: Iterator[Any] = iter((*args, *kwargs.values()))
    return next(each for each in inputs if isinstance(each, Tensor) and each.is_floating_point())
