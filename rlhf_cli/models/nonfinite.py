"""Are all values finite?"""

from collections.abc import Mapping

import torch
from torch import Tensor

from rlhf_cli.models.shards import is_sharded, own_part
from rlhf_cli.ranks.world import world


@torch.no_grad()
def first_nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first name, in their order, of a tensor with a NaN or an infinity; None without one."""
    return next((name for name, value in tensors.items() if not is_finite(value)), None)


@torch.no_grad()
def is_finite(tensor: Tensor) -> bool:
    """Whether no value is a NaN or an infinity.

    The extremes tell, for a NaN is both; isfinite() takes a mask as large, and 30 times as long.
    All ranks tell of a sharded one.
    """
    if is_sharded(tensor):
        return world().all(is_finite(own_part(tensor)))
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    least, most = tensor.aminmax()
    return bool(least.isfinite() and most.isfinite())
