"""Small parts of a decoder's layers compiled, for graphs of its steps.

A step of few tokens is bound by the number of its kernels, and a dozen of each layer's do no more
than turn queries and keys by their positions, norm, or multiply a gate. The parts are put in place
while a graph is made, which holds their kernels from then on, and nowhere else.
"""

import sys
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from rlhf_cli.models.decoder import trunk

ROTATION = "apply_rotary_pos_emb"  # what modules of transformers call the turning, and begin with


class Pieces:
    """Compiled parts of a model, which it computes with in a `with` block."""

    def __init__(self, model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
        """Find them; they are compiled as they are first run."""
        self._swaps: list[tuple[Any, str, Any]] = []  # an owner, a name, what is there in a block
        self._before: list[Any] = []
        compiled: dict[Any, Any] = {}

        def made(own: Any) -> Any:
            return compiled.setdefault(own, torch.compile(own, dynamic=True, backend=backend))

        homes = {type(module).__module__ for module in trunk(model).modules()}
        for home in (sys.modules[name] for name in sorted(homes)):
            for name, value in list(vars(home).items()):
                if isinstance(value, FunctionType) and name.startswith(ROTATION):
                    self._swaps.append((home, name, made(value)))
        for module in trunk(model).modules():
            if _is_gate(module) or _is_norm(module):
                own: Any = type(module).forward
                self._swaps.append((module, "forward", MethodType(made(own), module)))

    def __len__(self) -> int:
        return len(self._swaps)

    def __enter__(self) -> None:
        self._before = [vars(owner).get(name) for owner, name, _ in self._swaps]
        for owner, name, piece in self._swaps:
            vars(owner)[name] = piece

    def __exit__(self, *error: object) -> None:
        for (owner, name, _), before in zip(self._swaps, self._before, strict=True):
            if before is None:
                del vars(owner)[name]
            else:
                vars(owner)[name] = before


def _is_gate(module: nn.Module) -> bool:
    """Whether it is a plain MLP with a gate: no adapters on it, no experts in it."""
    parts = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    plain = all(type(part) is nn.Linear for part in parts)
    return plain and callable(getattr(module, "act_fn", None)) and "forward" not in vars(module)


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a norm of a family's own code, which is many kernels."""
    kind = type(module)
    own = kind.__module__.startswith("transformers.") and kind.__name__.endswith("Norm")
    return own and not list(module.children()) and "forward" not in vars(module)
