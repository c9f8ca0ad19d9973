"""How a loaded model computes attention, and whether it can as `model.attention` asks."""

from typing import Any

import torch
from torch import nn

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.keys import AUTO
from rlhf_cli.config.schema.models import EAGER, SDPA, FrozenModel
from rlhf_cli.data.batches import collate
from rlhf_cli.data.items import Tokens
from rlhf_cli.models.decoder import hidden_states, unwrap
from rlhf_cli.models.loading_faults import told


def attention_of(model: nn.Module) -> str:
    """The implementation by which a model computes attention, as transformers calls it."""
    return str(unwrap(model).config.get_text_config()._attn_implementation)


def asked_for(config: FrozenModel) -> dict[str, Any]:
    """What transformers is told of it; nothing leaves the choice to it."""
    return {} if config.attention == AUTO else {"attn_implementation": config.attention}


def check_device(config: FrozenModel, device: torch.device) -> None:
    """Stop before a model is loaded for kernels that have no gradient on a CPU.

    Raises:
        UserError: naming the key.
    """
    if config.attention not in (AUTO, SDPA, EAGER) and device.type == "cpu":
        raise UserError(f"model.attention={config.attention} needs a GPU; auto does without one")


def check_attention(model: nn.Module, path: str, config: FrozenModel) -> None:
    """Stop where a model computes attention otherwise than it was told to.

    Raises:
        UserError: naming what it does instead.
    """
    actual = attention_of(model)
    if config.attention not in (AUTO, actual):
        raise UserError(
            f"model.attention={config.attention}: {path} computes it by {actual} whatever it is "
            "told; set model.attention=auto"
        )


def try_attention(model: nn.Module, path: str, config: FrozenModel) -> None:
    """Stop where the kernels that were asked for cannot do this model: a short pass tells.

    They differ in what they need: a type, a head size.

    Raises:
        UserError: in one line.
    """
    if config.attention in (AUTO, SDPA, EAGER):
        return
    batch = collate([Tokens([0, 1], [2, 3]), Tokens([0], [1])], next(model.parameters()).device)
    with told(f"{path}: model.attention={config.attention} does not work here, auto does"):
        states = hidden_states(model, batch)
        if states.requires_grad:
            states.sum().backward()
            model.zero_grad()
