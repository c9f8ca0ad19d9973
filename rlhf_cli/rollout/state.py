"""What a decoder keeps of the tokens that it has read, whatever it is made of.

Keys and values, the states of recurrent and convolutional layers, lists of tensors, tensors that
layers hold themselves: all are repeated and selected by row. rollout/feeding.py finds out how.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

from rlhf_cli.models.decoder import taken_by, trunk, unwrap


@dataclass(frozen=True)
class Way:
    """How a decoder is fed column by column.

    argument: the argument of its forward that takes the state back; None where each step is to read
        the whole row again.
    made: whether the state is made here and handed over; else the decoder makes its own.
    masked: whether a column comes with the mask of its whole row; else it comes without one.
    padded: whether rows that are padded on the left give what they give alone.
    alone: whether a row is to be read by itself, for the decoder mixes rows up.
    exact: whether nothing but rounding parts it from a pass over whole rows, many columns on.
    axes: the axis of the rows in each tensor of the state, by its place.
    held: attributes of modules that hold tensors of the state, as module.attribute.
    """

    argument: str | None = None
    made: bool = False
    masked: bool = True
    padded: bool = False
    alone: bool = False
    exact: bool = True
    axes: dict[str, int] = field(default_factory=dict)
    held: tuple[str, ...] = ()


class State:
    """The rows of a batch as far as they are read."""

    def __init__(self, model: nn.Module, way: Way) -> None:
        """Nothing is read yet; what modules hold of an earlier batch is forgotten."""
        self._trunk, self._way = trunk(model), way
        self._columns = self._rows = 0
        self.kept: Any = DynamicCache(config=unwrap(model).config) if way.made else None
        for name in way.held:
            self._hold(name, None)

    def read(self, seen: Tensor, attention: Tensor) -> Tensor:
        """The last hidden states of the last column, (B, d), after the columns that are new.

        Args:
            seen: (B, S) ids of all columns.
            attention: (B, S) False at pads, which are on the left.
        """
        way = self._way
        new = slice(self._columns if way.argument else 0, None)
        positions = (attention.long().cumsum(-1) - 1).clamp(min=0)
        more: dict[str, Any] = {}
        if way.masked or self._columns == 0:
            more["attention_mask"] = attention.long()
        if self.kept is not None and way.argument:
            more[way.argument] = self.kept
        inputs = taken_by(
            self._trunk,
            input_ids=seen[:, new],
            position_ids=positions[:, new],
            use_cache=way.argument is not None,
            **more,
        )
        output = self._trunk(**inputs)
        self._rows, self._columns = seen.shape
        if way.argument:
            self.kept = getattr(output, way.argument, self.kept)
        hidden: Tensor = output.last_hidden_state[:, -1]
        return hidden

    def repeat(self, times: int) -> None:
        """Each row so many times, one after the other."""
        self._change(lambda rows: rows.repeat_interleave(times, 0))

    def select(self, places: Tensor) -> None:
        """Only the rows at these places go on."""
        self._change(lambda rows: rows[places.to(rows.device)])

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by its place."""
        found: dict[str, Tensor] = {}

        def note(place: str, tensor: Tensor) -> Tensor:
            found[place] = tensor
            return tensor

        self._walk(note)
        return found

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        axes = self._way.axes

        def changed(place: str, tensor: Tensor) -> Tensor:
            if place not in axes:
                return tensor
            # some states have the heads of a row beside each other on the axis of the rows
            rows = tensor.movedim(axes[place], 0).unflatten(0, (self._rows, -1))
            return change(rows).flatten(0, 1).movedim(0, axes[place]).contiguous()

        self._walk(changed)
        self._rows = len(change(torch.empty(self._rows)))

    def _walk(self, change: Callable[[str, Tensor], Tensor]) -> None:
        done: dict[int, Any] = {}  # by identity: a tensor in two places stays one
        self.kept = _replaced(self.kept, change, "", done)
        for name in self._way.held:
            module, _, attribute = name.rpartition(".")
            tensor = getattr(self._trunk.get_submodule(module), attribute)
            self._hold(name, _replaced(tensor, change, name, done))

    def _hold(self, name: str, value: Any) -> None:
        module, _, attribute = name.rpartition(".")
        setattr(self._trunk.get_submodule(module), attribute, value)


def _replaced(
    node: Any, change: Callable[[str, Tensor], Tensor], place: str, done: dict[int, Any]
) -> Any:
    """The node with every tensor in it changed; lists, dictionaries and objects stay themselves."""
    if id(node) in done:
        return done[id(node)][0]
    if isinstance(node, tuple):
        return tuple(_replaced(x, change, f"{place}.{i}", done) for i, x in enumerate(node))
    made = change(place, node) if isinstance(node, Tensor) else node
    done[id(node)] = made, node  # the node stays alive, and with it its identity
    for key, value in _parts(node):
        parts = node if isinstance(node, list | dict) else vars(node)
        parts[key] = _replaced(value, change, f"{place}.{key}", done)
    return made


def _parts(node: Any) -> list[tuple[Any, Any]]:
    """What a list, a dictionary or an object of a cache holds, with the index or name of each."""
    if isinstance(node, list):
        return list(enumerate(node))
    if isinstance(node, dict):
        return list(node.items())
    if isinstance(node, Tensor | nn.Module | PreTrainedConfig | type):
        return []
    return list(vars(node).items()) if hasattr(node, "__dict__") else []
