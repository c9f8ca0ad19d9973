"""Are all values finite?"""

from collections.abc import Mapping

import torch
from torch import Tensor

from rlhf_cli.models.sharding import own_part


@torch.no_grad()
def first_nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first name, in their order, of a tensor with a NaN or an infinity; None without one."""
    return next((name for name, value in tensors.items() if not is_finite(value)), None)


@torch.no_grad()
def is_finite(tensor: Tensor) -> bool:
    """Whether no value is a NaN or an infinity; of what is sharded, none on this rank.

    The extremes tell, for a NaN is both; isfinite() takes a mask as large, and 30 times as long.
    """
    tensor = own_part(tensor)
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    least, most = tensor.aminmax()
    return bool(least.isfinite() and most.isfinite())
