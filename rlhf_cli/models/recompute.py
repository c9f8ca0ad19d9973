"""Gradient checkpointing: backward computes blocks again, not keeping what it needs of them."""

import math
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, Self

from torch import nn

from rlhf_cli.config.errors import UserError
from rlhf_cli.models.adapters import Acting, is_adapted, unite
from rlhf_cli.models.decoder import unwrap
from rlhf_cli.models.dropout import blocks_of, check_training_mode, training_mode
from rlhf_cli.models.row_attention import recomputing
from rlhf_cli.models.shared import SharedScorer


def recompute_activations(model: Any, share: float = 1.0) -> int:
    """Let backward compute blocks again, by the adapter that acted then.

    Layers below the first trained one stay out of backward, as they do without it. A scorer on the
    policy's base does as the policy does, a bare head has no blocks.

    Args:
        share: of the blocks that are trained, the lowest ones, whose turn in backward comes when
            what the others keep is gone; all, where a family knows only all or none.

    Returns:
        How many blocks that are.

    Raises:
        UserError: the family cannot, or computes something else then.
    """
    base = unwrap(model)
    if isinstance(model, SharedScorer) or not hasattr(base, "supports_gradient_checkpointing"):
        return 0
    settings: dict[str, Any] = {"use_reentrant": False, "context_fn": partial(_contexts, model)}
    if is_adapted(model):
        unite(model)
    if not base.supports_gradient_checkpointing:
        raise UserError(
            f"{type(base).__name__} cannot compute its blocks again in backward; set "
            "hardware.gradient_checkpointing=false"
        )
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    base.disable_input_require_grads()
    count = _keep_to(model, share)
    try:
        check_training_mode(model)  # and stay in it: transformers recomputes in no other
    except UserError:  # where it goes on, it goes on as it was
        base.gradient_checkpointing_disable()
        training_mode(model)
        raise
    return count


Block = AbstractContextManager[object]


def _contexts(model: Any) -> tuple[Block, Block]:
    """Around a block's forward, and around it in backward: there it finds layout and adapter of
    then.
    """
    once, again = recomputing(model)
    return once, _Within(again, Acting(model, *model.acting)) if is_adapted(model) else again


class _Within(ExitStack):
    """Several blocks, one in the other, which may be entered again: backward may come twice."""

    def __init__(self, *blocks: Block) -> None:
        super().__init__()
        self._blocks = blocks

    def __enter__(self) -> Self:
        for block in self._blocks:
            self.enter_context(block)
        return self


def _keep_to(model: nn.Module, share: float) -> int:
    """Switch recomputation off again in the blocks above a share; returns how many are left."""
    trained = [
        block
        for block in blocks_of(model)
        if any(weight.requires_grad for weight in block.parameters())
    ]
    count = math.ceil(share * len(trained))
    switched = [[each for each in block.modules() if _recomputes(each)] for block in trained]
    if not any(switched):  # the decoder has one switch for all
        return len(trained)
    for modules in switched[count:]:
        for module in modules:
            module.gradient_checkpointing = False  # type: ignore[assignment]
    return count


def _recomputes(module: nn.Module) -> bool:
    return bool(getattr(module, "gradient_checkpointing", False))
