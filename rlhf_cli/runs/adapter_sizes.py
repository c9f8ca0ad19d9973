"""How many numbers an adapter has, and how many a base of few bits saves, from shapes alone."""

import math
import re
from pathlib import Path
from typing import Any

from rlhf_cli.config.schema.models import Model
from rlhf_cli.folders.adapter_use import CONTINUE, STACK, use_of
from rlhf_cli.folders.linear_shapes import linear_shapes, single_shapes
from rlhf_cli.folders.manifest import Shapes, shapes_of

ALL = "all-linear"


def trained_adapter(cfg: Any, shapes: Shapes) -> int:
    """Numbers that are trained of the adapter of a stage's policy; 0 where there is none."""
    if cfg.start is not None and use_of(cfg.start, cfg.model) == CONTINUE:
        return _numbers(shapes_of(Path(cfg.start)))
    return lora(shapes, cfg.model)


def adapter_below(cfg: Any) -> int:
    """Numbers of a frozen adapter that the trained one is stacked on."""
    if cfg.start is None or use_of(cfg.start, cfg.model) != STACK:
        return 0
    return _numbers(shapes_of(Path(cfg.start)))


def is_switched_off(cfg: Any) -> bool:
    """Whether the reference is the policy without its adapter, which is fresh and adds nothing."""
    return use_of(cfg.start, cfg.model) != CONTINUE and not cfg.model.use_dora


def lora(shapes: Shapes, model: Model) -> int:
    """Numbers of a fresh adapter on the weights of a model.

    A matrix of (out, in) gets A of (r, in) and B of (out, r); under DoRA, out lengths too.
    """
    if not model.lora_rank:
        return 0
    if model.lora_targets == ALL:
        matrices = (single_shapes if goes_without_experts(model) else linear_shapes)(shapes)
    else:
        matrices = _named(shapes, model.lora_targets)
    lengths = sum(shape[0] for shape in matrices.values()) if model.use_dora else 0
    whole = {
        name: shape
        for name, shape in shapes.items()
        if any(_fits(each, name.rpartition(".")[0]) for each in model.modules_to_save)
    }
    return model.lora_rank * sum(map(sum, matrices.values())) + lengths + _numbers(whole)


def goes_without_experts(model: Model) -> bool:
    """Whether what is asked of an adapter cannot be had of experts that are one tensor."""
    dropout = getattr(model, "lora_dropout", 0.0)
    return bool(dropout or model.use_dora or model.adapter == STACK or model.quantize)


def _named(shapes: Shapes, said: Any) -> Shapes:
    """The matrices that model.lora_targets means by names or an expression."""
    matrices = {
        name.removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) == 2
    }
    if isinstance(said, str) and not re.fullmatch(r"[\w.]+", said):
        try:
            return {name: shape for name, shape in matrices.items() if re.fullmatch(said, name)}
        except re.error:
            return {}  # told where the model is loaded
    names = said if isinstance(said, list) else [said]
    return {
        name: shape for name, shape in matrices.items() if any(_fits(each, name) for each in names)
    }


def saved_by_bits(shapes: Shapes, model: Model, width: int = 4) -> int:
    """By how many numbers a base is smaller with the matrices of its blocks in few bits.

    nf4 takes 4 bits, a scale of 8 bits for 64 numbers and one of 32 for 256 of these (2305.14314
    sec. 3); int8 takes 8 bits, and a scale of 32 for each row.

    Args:
        width: bytes of a number.
    """
    if model.quantize is None:
        return 0
    matrices = single_shapes(shapes).values()
    numbers = sum(map(math.prod, matrices))
    if model.quantize == "nf4":
        bits = numbers * (4 + 8 / 64 + 32 / (64 * 256))
    else:
        bits = numbers * 8 + 32 * sum(shape[0] for shape in matrices)
    return numbers - math.ceil(bits / (8 * width))


def _fits(name: str, module: str) -> bool:
    return f".{module}".endswith(f".{name}")


def _numbers(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))
