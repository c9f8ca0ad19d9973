"""The scalar head of reward models and critics, on the trunk of a policy."""

import math
from typing import Any

import torch
from torch import nn

from rlhf_cli.data.batches import collate
from rlhf_cli.data.items import Tokens
from rlhf_cli.models.decoder import hidden_states, unwrap
from rlhf_cli.models.scalar_head import ScalarHead

HEAD_NAMES = ("score", "classifier")


def head_name(model: Any) -> str | None:
    """How an architecture calls the head of its classifiers; None where it has none."""
    return next((name for name in HEAD_NAMES if getattr(model, name, None)), None)


def scalar_head(model: Any) -> nn.Linear:
    """The head of a classifier with one label."""
    head: nn.Linear = getattr(model, head_name(model) or "score")
    return head


def init_head(head: nn.Linear, seed: int) -> None:
    """Weights from N(0, 1 / (d + 1)), no bias (Stiennon 2009.01325 App. B)."""
    width = head.in_features
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(head.weight.shape, generator=generator) / math.sqrt(width + 1)
    with torch.no_grad():
        head.weight.copy_(weights)
        if head.bias is not None:
            head.bias.zero_()


def value_head(model: Any) -> nn.Linear:
    """A value head for the trunk of a policy, d -> 1; all values start at 0."""
    head = nn.Linear(width_of(model), 1, bias=False, device=next(model.parameters()).device)
    nn.init.zeros_(head.weight)
    return head


@torch.no_grad()
def width_of(model: Any) -> int:
    """The size of the states that a head on a model's decoder reads."""
    states = hidden_states(model, collate([Tokens([0], [0])], next(model.parameters()).device))
    return int(states.shape[-1])


def told_of_head(model: nn.Module) -> list[str]:
    """A line where a scorer is of no class of transformers, whose other tools then need ours."""
    if not isinstance(base := unwrap(model), ScalarHead):
        return []
    return [
        f"transformers has no classifier of this kind for {base.config.model_type}: the head is "
        f"ours, and scalar_head.py in the folder loads it elsewhere"
    ]
