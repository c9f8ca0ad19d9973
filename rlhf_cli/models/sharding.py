"""Weights that are sharded over ranks by FSDP2."""

from typing import Any

from torch import Tensor


def is_sharded(weight: Tensor) -> bool:
    """Whether a tensor is this rank's part of one: a DTensor."""
    return hasattr(weight, "device_mesh")


def own_part(weight: Tensor) -> Tensor:
    """The part that this rank holds, which shares its memory; a plain tensor itself."""
    return weight._local_tensor if is_sharded(weight) else weight  # type: ignore[attr-defined, no-any-return]


def like(weight: Tensor, part: Tensor) -> Tensor:
    """A tensor of this rank's part, cut as a weight is; the part itself, if that is plain."""
    if not is_sharded(weight):
        return part
    from torch.distributed.tensor import DTensor

    own: Any = weight
    return DTensor.from_local(
        part,
        own.device_mesh,
        own.placements,
        run_check=False,
        shape=own.shape,
        stride=own.stride(),
    )


def whole(weight: Tensor) -> Tensor:
    """All of a tensor, gathered by all ranks; a plain one itself."""
    return weight.full_tensor() if is_sharded(weight) else weight  # type: ignore[attr-defined, no-any-return]


def part_of(value: Tensor, weight: Tensor) -> Tensor:
    """This rank's part of a whole value, on its own device, as `own_part` has it of the weight."""
    if not is_sharded(weight):
        return value
    first, rows = rows_of(weight)
    return value[first : first + rows]


def rows_of(weight: Tensor) -> tuple[int, int]:
    """The first row that this rank holds of a sharded weight, and how many."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    own: Any = weight
    shape, offset = compute_local_shape_and_global_offset(
        own.shape, own.device_mesh, own.placements
    )
    return offset[0], shape[0]
