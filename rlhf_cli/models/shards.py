"""Tensors of which each rank holds a part, cut along their first dimension: DTensors.

They are parameters of sharded models, their gradients and their moments. A plain tensor is whole
here, and nothing of torch.distributed is imported for it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.models.keeping_up import STEPS


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a rank's part of a tensor, of the shape of the whole."""
    return hasattr(tensor, "device_mesh")


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds, in the same memory; a plain tensor itself."""
    part: Tensor = tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def like(weight: Tensor, part: Tensor) -> Tensor:
    """A tensor cut as a weight is, of this rank's part of it; of a plain weight the part."""
    if not is_sharded(weight):
        return part
    from torch.distributed.tensor import DTensor

    cut: Any = weight
    shape = {"shape": cut.shape, "stride": cut.stride()}
    return DTensor.from_local(part, cut.device_mesh, cut.placements, run_check=False, **shape)


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """The first row of a sharded tensor that this rank holds, and how many."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    cut: Any = tensor
    where = cut.shape, cut.device_mesh, cut.placements
    shape, offset = compute_local_shape_and_global_offset(*where)
    return offset[0], shape[0]


def part_of(value: Tensor, weight: Tensor) -> Tensor:
    """This rank's part of a whole value, as `own_part` has it of a weight that is cut alike."""
    if not is_sharded(weight):
        return value
    first, rows = rows_of(weight)
    return value[first : first + rows]


def whole(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """All of a tensor, gathered by all ranks, in a type; a plain one itself.

    With gradient, which is summed over the ranks in its own type.
    """
    if not is_sharded(tensor):
        return tensor
    gathered: Tensor = _Whole.apply(tensor, dtype or tensor.dtype)
    return gathered


def hand_down(weights: Iterable[Tensor], parts: Iterable[Tensor]) -> None:
    """Give the parts of sharded weights, as `own_part` has them, those of the gradients."""
    for weight, part in zip(weights, parts, strict=True):
        if is_sharded(weight):
            part.grad = None if weight.grad is None else own_part(weight.grad)


class _Whole(torch.autograd.Function):
    """Parts are gathered; backward sums the gradients of all ranks and leaves each its part."""

    @staticmethod
    def forward(ctx: Any, tensor: Any, dtype: torch.dtype) -> Tensor:
        ctx.mesh, ctx.placements = tensor.device_mesh, tensor.placements
        if STEPS.is_past():
            return tensor._local_tensor.new_empty(tensor.shape, dtype=dtype)
        whole: Tensor = like(tensor, tensor._local_tensor.to(dtype)).full_tensor()  # type: ignore[attr-defined]
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        from torch.distributed.tensor import DTensor, Partial
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        if STEPS.is_past():
            shape = compute_local_shape_and_global_offset(grad.shape, ctx.mesh, ctx.placements)[0]
            part = grad.new_empty(shape)
            layout: Any = {"shape": grad.shape, "stride": grad.contiguous().stride()}
            return DTensor.from_local(
                part, ctx.mesh, ctx.placements, run_check=False, **layout
            ), None
        addends = DTensor.from_local(grad, ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return addends.redistribute(placements=ctx.placements), None
