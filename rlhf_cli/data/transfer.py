"""Tensors on their way to a GPU, without waiting for it.

A copy from pageable memory waits until all that is queued is done. From pinned memory it takes its
turn in the queue, so that the host builds the next micro-batch while the GPU computes this one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PINS = True


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on a device; what is on it already stays."""
    if PINS and torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def tensor_on(device: torch.device | str, values: Sequence[Any], **how: Any) -> Tensor:
    """`torch.tensor(values, **how)` on a device."""
    return to_device(torch.tensor(values, **how), device)
