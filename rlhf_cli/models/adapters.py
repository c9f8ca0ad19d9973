"""Adapters of several roles on one copy of the base weights, and which of them acts.

The policy's adapter is called default. Others are lent the base: reference, critic, reward.
"""

import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.time_limit import time_limit
from rlhf_cli.folders.manifest import ADAPTER_CONFIG, shapes_of
from rlhf_cli.models.nonfinite import is_finite

WEIGHTS = "adapter_model.safetensors"  # what peft calls those of an adapter
PREFIX = "base_model.model."  # before the name that a layer has in the base
OUTPUT = re.compile(r"\w+\.(lora_|base_layer\.|modules_to_save\.|token_adapter\.|weight$|bias$)")
PATTERNS = (  # the fields of an adapter's config that peft searches names of layers by
    *("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "feedforward_modules", "target_parameters"),
)
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
        ".".join(part for part in name.split(".") if part != adapter): weight
        for name, weight in adapted.named_parameters()
        if adapter in name.split(".")  # those of an embedding end with it
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


def check_patterns(model: nn.Module, config: Any) -> None:
    """Stop at a pattern of layers' names that never ends, as peft would search for it.

    Raises:
        ValueError: naming the pattern.
    """
    names = [name for name, _ in model.named_modules()]
    names += [name.rpartition(".")[2] for name in names]
    said = [getattr(config, key, None) for key in PATTERNS]
    patterns = {
        each for value in said for each in ([value] if isinstance(value, str) else value or ())
    }
    forms = ("{}", r"(.*\.)?({})$", r"(^|.*\.){}($|\..*)", r"(?:^|.*?\.){}\.(\d+)\.")
    for pattern in (form.replace("{}", str(each)) for each in patterns for form in forms):
        try:
            with suppress(re.error), time_limit():  # peft says where it is none
                for name in names:
                    re.match(pattern, name), re.fullmatch(pattern, name)
        except TimeoutError as error:
            raise ValueError(f"the pattern {pattern!r} of layers' names: {error}") from None


def adapter_weights(path: str) -> dict[str, Tensor]:
    """The weights of an adapter folder on the CPU, by peft's names.

    Raises:
        UserError: there are none that are safetensors.
    """
    return load_file(_weights_file(path))


@torch.no_grad()
def put_weights(
    adapted: Any, adapter: str, weights: dict[str, Tensor], path: str, head_left: bool = False
) -> None:
    """Give an adapter the weights of a folder: each of its tensors gets one, and none is left over.

    Args:
        weights: by peft's names, all finite.
        head_left: the two may have other output layers: a policy's adapter under a scorer's head.

    Raises:
        UserError: naming a tensor that the folder lacks, or that is none of this adapter's.
    """
    import peft

    own = saved_weights(adapted, adapter)
    if head_left:
        own = {name: weight for name, weight in own.items() if not _is_of_output(name)}
    for weight in own.values():
        if weight.is_floating_point():
            weight.fill_(math.nan)  # what is not overwritten by a finite one shows
    try:
        result: Any = peft.set_peft_model_state_dict(adapted, weights, adapter)
        unknown = set(result.unexpected_keys)
    except KeyError:  # of a head: peft looks for that by its name
        unknown = set()
    missing = sorted(name for name, weight in own.items() if not is_finite(weight))
    if head_left:
        unknown = {name for name in unknown if not _is_of_output(name)}
    if not missing and not unknown:
        return
    found = [
        f"{len(names)} tensors {what}, such as {names[0].replace(f'.{adapter}.', '.')}"
        for names, what in ((missing, "missing"), (sorted(unknown), "of layers that are not there"))
        if names
    ]
    raise UserError(
        f"{path}: the adapter does not fit its base: {'; '.join(found)}; make or download the "
        f"folder again, or name its own base in {ADAPTER_CONFIG}"
    )


def holds_embeddings(path: str, base: Any) -> bool:
    """Whether an adapter folder holds whole embeddings of its base, as peft saves resized ones."""
    tables = {id(base.get_input_embeddings()), id(base.get_output_embeddings())}
    names = [name for name, module in base.named_modules() if id(module) in tables]
    held = shapes_of(Path(path))
    ends = (".weight", ".base_layer.weight")  # the second under LoRA of its own
    return any(f"{PREFIX}{name}{end}" in held for name in names for end in ends)


def saved_weights(adapted: Any, adapter: str) -> dict[str, Tensor]:
    """The tensors of one adapter as they are, heads included, by the names that peft saves."""
    import peft

    own: dict[str, Tensor] = peft.get_peft_model_state_dict(
        adapted, adapter_name=adapter, save_embedding_layers=False
    )
    return own


def _is_of_output(name: str) -> bool:
    """Whether a tensor belongs to a layer beside the decoder, as an unembedding is."""
    return OUTPUT.match(name.removeprefix(PREFIX)) is not None


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
