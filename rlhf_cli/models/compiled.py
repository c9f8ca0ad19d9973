"""Blocks of a decoder compiled for training passes: one graph for all of them and all lengths.

A block's class is replaced by one whose forward is compiled where there is a gradient; what is
computed again in backward calls the compiled one again. Weights keep their names.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from rlhf_cli.models.decoder import unwrap
from rlhf_cli.models.dropout import RESIDUAL, blocks_of
from rlhf_cli.models.experts import decoder_of, routers_of

BACKEND = "inductor"
PLAIN = "class_that_is_compiled"  # an attribute of blocks' classes


def compile_blocks(model: nn.Module, backend: str | Callable[..., Any] = BACKEND) -> int:
    """Compile a decoder's blocks at their next training pass; returns how many they are.

    None where their code goes by values, as experts do, or where `model.dropout` reads along.
    """
    if not hasattr(unwrap(model), "config") or routers_of(decoder_of(unwrap(model))[1]):
        return 0
    blocks: list[Any] = blocks_of(model)
    if any(callable(getattr(block, RESIDUAL, None)) for block in blocks):
        return 0
    for block in blocks:
        kind: Any = type(block)
        block.__class__ = _compiling(getattr(kind, PLAIN, kind), backend)
    return len(blocks)


def run_plainly(model: nn.Module) -> None:
    """Let blocks run as their code says again."""
    for module in model.modules():
        kind: Any = type(module)
        module.__class__ = getattr(kind, PLAIN, kind)


@cache
def _compiling(kind: Any, backend: str | Callable[..., Any]) -> Any:
    """The class of a block whose training passes are compiled."""
    own = kind.forward
    if own.__code__.co_name == "forward_with_checkpointing":  # ours is wrapped so, too
        own = own.__wrapped__
    compiled = torch.compile(own, dynamic=True, backend=backend)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = compiled if torch.is_grad_enabled() else own
        return run(self, *args, **kwargs)

    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {"forward": forward, PLAIN: kind, **named})
