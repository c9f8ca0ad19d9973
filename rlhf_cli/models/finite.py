"""Are all values finite?"""

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first name, in their order, of a tensor with a NaN or an infinity; None without one."""
    return next((name for name, value in tensors.items() if not value.isfinite().all()), None)
