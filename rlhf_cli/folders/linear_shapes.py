"""Which weights of a folder an adapter on every linear layer is put on, told without torch.

What models/lora_places.py finds in a model that is loaded, by the names and shapes of its weights.
"""

import math
import re

from rlhf_cli.folders.geometry import BLOCK
from rlhf_cli.folders.manifest import Shapes

EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(.+)\.weight")
ROUTER = re.compile(
    r"[^.]+|[^.]*(router|gate)[^.]*\..+"
)  # in a block of experts: a layer, or in one
Stacks = dict[str, tuple[str, int, tuple[int, ...]]]
"""By name: the module that holds the experts, how many, and their shape, E times as long."""


def linear_shapes(shapes: Shapes) -> Shapes:
    """The matrices that are adapted, by their names without `.weight`: of a decoder without head.

    Experts are adapted as one tensor for all of them. Its shape here is E times that of an expert,
    so that an adapter of rank r has r times the sum of each shape.
    """
    matrices, experts = _matrices_and_experts(shapes)
    return matrices | {name: shape for name, (_, _, shape) in experts.items()}


def single_shapes(shapes: Shapes) -> Shapes:
    """The same without experts."""
    return _matrices_and_experts(shapes)[0]


def expert_numbers(shapes: Shapes) -> int:
    """How many numbers the matrices of experts have."""
    _, experts = _matrices_and_experts(shapes)
    return sum(math.prod(shape) // count for _, count, shape in experts.values())


def _matrices_and_experts(shapes: Shapes) -> tuple[Shapes, Stacks]:
    """Matrices of single layers, and those of experts, of a decoder without head or routers."""
    experts = _stacked(shapes) | _one_by_one(shapes)
    inside = {name for name in shapes if EXPERT.fullmatch(name)}
    blocks = {block: count for holder, count, _ in experts.values() for block in _around(holder)}
    matrices = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and name not in inside and _is_linear(name)
    }
    routers = {name for name, shape in matrices.items() if _weighs(name, shape, blocks)}
    # a tensor of three dimensions without a router beside it is of no experts
    used = {holder for holder in blocks if any(name.startswith(f"{holder}.") for name in routers)}
    rest = routers | _past_layers(shapes)
    plain: Shapes = {name: shape for name, shape in matrices.items() if name not in rest}
    return plain, {
        name: each for name, each in experts.items() if not used.isdisjoint(_around(each[0]))
    }


def _around(holder: str) -> list[str]:
    """The module around one that holds experts, and that around one that is called so."""
    block = holder.rpartition(".")[0]
    outer, _, last = block.rpartition(".")
    return [block, outer] if last == "experts" else [block]


def _is_linear(name: str) -> bool:
    """Whether a matrix is of a layer: all in blocks are, and projections outside of them."""
    return BLOCK.search(name) is not None or "proj" in name


def _past_layers(shapes: Shapes) -> set[str]:
    """The layers whose matrices are computed with past them, and routers of experts in one matrix.

    Kernels compute a state-space mixer from its first layer on; where norms are in between, its
    steps alone.
    """
    past: set[str] = set()
    for name in shapes:
        mixer, _, leaf = name.rpartition(".")
        if leaf == "A_log" and f"{mixer}.D" in shapes:
            normed = f"{mixer}.dt_layernorm.weight" in shapes
            layers = ("dt_proj",) if normed else ("dt_proj", "x_proj", "out_proj")
            past |= {f"{mixer}.{layer}" for layer in layers}
        block, router, _ = name.partition(".router.")
        if router and any(each.startswith(f"{block}.experts.") for each in shapes):
            past.add(name.removesuffix(".weight"))
    return past


def _weighs(name: str, shape: tuple[int, ...], blocks: dict[str, int]) -> bool:
    """Whether a matrix is a router of the experts beside it, or the gate of a single one."""
    return any(
        shape[0] in (1, count)
        and name.startswith(f"{block}.")
        and ROUTER.fullmatch(name[len(block) + 1 :]) is not None
        for block, count in blocks.items()
    )


def _stacked(shapes: Shapes) -> Stacks:
    """Weights that hold several matrices."""
    return {
        name: (name.rpartition(".")[0], shape[0], (shape[0] * shape[1], shape[0] * shape[2]))
        for name, shape in shapes.items()
        if len(shape) == 3 and min(shape) > 1 and BLOCK.search(name)
    }


def _one_by_one(shapes: Shapes) -> Stacks:
    """The same of experts that are stored apart, of whose matrices two are one in the model.

    Those are what lets through and what goes through, of the same shape: gate and up, w1 and w3.
    """
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    numbers: dict[str, int] = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and (match := EXPERT.fullmatch(name)):
            found.setdefault(match[1], {})[match[3]] = shape
            each = f"{match[1]}.{match[3]}"
            numbers[each] = numbers.get(each, 0) + 1
    stacks: Stacks = {}
    for holder, matrices in found.items():
        for shape in set(matrices.values()):
            names = sorted(name for name, each in matrices.items() if each == shape)
            groups = [names[:2], *([name] for name in names[2:])]
            for group in groups:
                count = numbers[f"{holder}.{group[0]}"]
                out = count * shape[0] * len(group)
                stacks[f"{holder}.{'+'.join(group)}"] = (holder, count, (out, count * shape[1]))
    return stacks
