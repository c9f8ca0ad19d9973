"""Adapters of several roles on one copy of the base weights, and which of them acts.

The policy's adapter is called default. Others are lent the base: reference, critic, reward.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_cli.config.errors import UserError

WEIGHTS = "adapter_model.safetensors"  # what peft calls those of an adapter
POLICY, REFERENCE, CRITIC, REWARD = "default", "reference", "critic", "reward"


def is_adapted(model: nn.Module) -> bool:
    """Whether it is a base with adapters on it."""
    return hasattr(model, "peft_config")


def is_fresh(adapted: nn.Module) -> bool:
    """Whether the policy's adapter adds nothing yet: its B matrices are 0."""
    return not any(
        weight.any()
        for name, weight in adapted.named_parameters()
        if ".lora_B." in name and f".{POLICY}." in name
    )


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a network that its training changes, by name.

    Of a policy that lends its base, none of the other roles' adapters.
    """
    others = set(getattr(network, "peft_config", {})) - {POLICY}
    return {
        name: weight
        for name, weight in network.named_parameters()
        if weight.requires_grad and others.isdisjoint(name.split("."))
    }


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights that training changes."""
    return {name: weight.detach().clone() for name, weight in trained(network).items()}


def restore(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put a snapshot back."""
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)


def weights_of(adapted: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The weights of one adapter, by their names without its own."""
    return {
        name.replace(f".{adapter}.", "."): weight
        for name, weight in adapted.named_parameters()
        if f".{adapter}." in name
    }


def add_adapter(adapted: Any, adapter: str, like: Any, trainable: bool = False) -> None:
    """Put another adapter on the base; what acts and what trains otherwise stays as it is.

    Args:
        like: the peft config of the new adapter.
    """
    flags = [(weight, weight.requires_grad) for weight in adapted.parameters()]
    adapted.add_adapter(adapter, like)
    for weight, flag in flags:
        weight.requires_grad_(flag)
    for weight in weights_of(adapted, adapter).values():
        weight.requires_grad_(trainable)
    unite(adapted)


@torch.no_grad()
def copy_adapter(adapted: nn.Module, source: str, target: str) -> None:
    """Give one adapter the weights of another of the same shape."""
    theirs = weights_of(adapted, source)
    for name, weight in weights_of(adapted, target).items():
        weight.copy_(theirs[name])


# --------------------------------------------------------------------------- folders


def adapter_config(path: str) -> Any:
    """What peft needs to know of an adapter folder, whose weights are safetensors.

    Raises:
        UserError: there are none; peft would read a pickle of another name instead.
    """
    import peft

    _weights_file(path)
    return peft.PeftConfig.from_pretrained(path)


def adapter_weights(path: str) -> dict[str, Tensor]:
    """The weights of an adapter folder on the CPU, by peft's names.

    Raises:
        UserError: there are none that are safetensors.
    """
    return load_file(_weights_file(path))


def _weights_file(path: str) -> Path:
    file = Path(path) / WEIGHTS
    if not file.is_file():
        raise UserError(f"{path}: no {WEIGHTS} in this folder; no other weights are read")
    return file


# --------------------------------------------------------------------------- which one acts


def unite(adapted: Any) -> None:
    """Let all layers read the names of the acting adapters from one list, `adapted.acting`.

    peft's own switch walks through the whole model and changes which weights train, so that
    backward would drop the gradient of an adapter that acted in forward. This one is an assignment.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not hasattr(adapted, "acting"):
        adapted.acting = [POLICY]
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            module._active_adapter = adapted.acting


class Acting:
    """A block in which other adapters act: one, or none, which leaves the base alone."""

    def __init__(self, adapted: Any, *adapters: str) -> None:
        self._names: list[str] = adapted.acting
        self._inside = list(adapters)
        self._outside: list[str] = []

    def __enter__(self) -> None:
        self._outside = list(self._names)
        self._names[:] = self._inside

    def __exit__(self, *error: object) -> None:
        self._names[:] = self._outside
