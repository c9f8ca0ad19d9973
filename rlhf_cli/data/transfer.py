"""Tensors on their way to a GPU, without waiting for it.

A copy from pageable memory waits until all that is queued is done. From pinned memory it takes its
turn in the queue, so that the host builds the next micro-batch while the GPU computes this one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on a device; what is on it already stays."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def together(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Tensors of whole numbers and truth values on a device, by one copy."""
    if torch.device(device).type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    flat = to_device(torch.cat([tensor.flatten().long() for tensor in tensors]), device)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [
        part.view(tensor.shape).to(tensor.dtype)
        for part, tensor in zip(parts, tensors, strict=True)
    ]


def tensor_on(device: torch.device, values: Sequence[Any]) -> Tensor:
    """`torch.tensor(values)` on a device."""
    return to_device(torch.tensor(values), device)


def numbers_like(other: Tensor, values: Sequence[float]) -> Tensor:
    """Numbers in the type and on the device of a tensor."""
    return to_device(torch.tensor(values, dtype=other.dtype), other.device)
