"""Which differences are rounding only."""

import torch
from torch import Tensor

ROUNDINGS = 80


def equal_up_to(dtype: torch.dtype) -> float:
    """Values of a type are EQUAL that differ by less, relative to the larger of 1 and their size.

    A model's float32 score of a response moves by a few 1e-6 with the padding of its micro-batch,
    which `hardware` decides; what is learnt must not.
    """
    return ROUNDINGS * torch.finfo(dtype).eps


EQUAL = equal_up_to(torch.float32)  # 9.5e-6


def differ(rewards: Tensor) -> Tensor:
    """Whether the rewards of each group are not all EQUAL: (P, G) -> (P,) bool; NaN is left out."""
    if not rewards.shape[-1]:
        return torch.zeros(rewards.shape[:-1], dtype=torch.bool, device=rewards.device)
    counted = ~rewards.isnan()
    highest = torch.where(counted, rewards, -torch.inf).amax(-1)
    lowest = torch.where(counted, rewards, torch.inf).amin(-1)
    size = torch.maximum(highest.abs(), lowest.abs()).clamp(min=1)
    return highest - lowest > equal_up_to(rewards.dtype) * size
