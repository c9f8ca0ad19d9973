"""Where a host waits for a device: told on a CPU, by the operators that need a value."""

import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten._unique2.default,
}


class Waits(TorchDispatchMode):
    """Notes, within its block, what would wait if the tensors were on a GPU.

    What copies a whole tensor, as `tolist` does, is no operator on a CPU and goes unseen. What
    builds batches works on the host, and may ask for values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        by_mask = func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) and (
            any(each is not None and each.dtype == torch.bool for each in args[1])
        )
        if (func in WAITING or by_mask) and not _builds_batches():
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def _builds_batches() -> bool:
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.endswith("data/batches.py"):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None
