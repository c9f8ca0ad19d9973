"""The scalar head of reward models and critics, on the trunk of a policy."""

import math

import torch
from torch import nn


def init_head(head: nn.Linear, seed: int) -> None:
    """Weights from N(0, 1 / (d + 1)), no bias (Stiennon 2009.01325 App. B)."""
    width = head.in_features
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(head.weight.shape, generator=generator) / math.sqrt(width + 1)
    with torch.no_grad():
        head.weight.copy_(weights)
        if head.bias is not None:
            head.bias.zero_()
