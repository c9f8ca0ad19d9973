"""Adapters as peft's folders hold them: their config, their weights, embeddings beside them."""

import math
import re
import warnings
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.time_limit import time_limit
from rlhf_cli.folders.json_forms import ADAPTER
from rlhf_cli.folders.manifest import ADAPTER_CONFIG, read_object, shapes_of
from rlhf_cli.models.masters import put
from rlhf_cli.models.nonfinite import is_finite
from rlhf_cli.models.shards import is_sharded, own_part

WEIGHTS = "adapter_model.safetensors"  # what peft calls those of an adapter
PREFIX = "base_model.model."  # before the name that a layer has in the base
OUTPUT = re.compile(r"\w+\.(lora_|base_layer\.|modules_to_save\.|token_adapter\.|weight$|bias$)")
PATTERNS = (  # the fields of an adapter's config that peft searches names of layers by
    *("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "feedforward_modules", "target_parameters"),
)


def adapter_config(path: str) -> Any:
    """What peft needs to know of an adapter folder, whose weights are safetensors.

    Raises:
        UserError: there are none; peft would read a pickle of another name instead.
    """
    import peft

    _weights_file(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unexpected keyword")  # told by unknown_settings
        return peft.PeftConfig.from_pretrained(path)


def unknown_settings(path: str, config: Any) -> list[str]:
    """What an adapter folder says that this version of peft does not know, as key=value."""
    said = read_object(Path(path) / ADAPTER_CONFIG, ADAPTER)
    return [f"{key}={value}" for key, value in said.items() if value and not hasattr(config, key)]


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
    own = saved_weights(adapted, adapter)
    weights = _without_copies(weights, own.keys())
    if head_left:
        own = {name: weight for name, weight in own.items() if not _is_of_output(name)}
    for weight in own.values():
        if weight.is_floating_point():
            own_part(weight).fill_(math.nan)  # what is not overwritten by a finite one shows
    if any(map(is_sharded, own.values())):
        for name in own.keys() & weights.keys():
            put(own[name], weights[name])
        unknown = weights.keys() - own.keys()
    else:
        unknown = _unknown_to_peft(adapted, weights, adapter)
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


def _unknown_to_peft(adapted: Any, weights: dict[str, Tensor], adapter: str) -> set[str]:
    """Give an adapter weights by peft's own way; returns the names that it has no place for."""
    import peft

    try:
        result: Any = peft.set_peft_model_state_dict(adapted, weights, adapter)
    except KeyError:  # of a head: peft looks for that by its name
        return set()
    return set(result.unexpected_keys)


def holds_embeddings(path: str, base: Any) -> bool:
    """Whether an adapter folder holds other embeddings than its base, beside its adapter.

    peft saves those that were resized, and those that LoRA matrices are on. The ones that are
    trained whole are the adapter's own.
    """
    said = read_object(Path(path) / ADAPTER_CONFIG, ADAPTER).get("modules_to_save")
    whole = tuple(f".{name}" for name in said or ())
    for name, held in _tables(path, base).items():
        ours = base.get_submodule(name).weight
        theirs = adapter_weights(path)[held].to(ours.device, ours.dtype)
        if not f".{name}".endswith(whole) and not torch.equal(ours, theirs):
            return True
    return False


def rows_held(path: str, base: Any) -> int:
    """The rows of the embeddings that an adapter folder holds; 0 where it holds none."""
    shapes = shapes_of(Path(path))
    return max((shapes[held][0] for held in _tables(path, base).values()), default=0)


def _tables(path: str, base: Any) -> dict[str, str]:
    """The names of whole embeddings in an adapter folder, by those of their layers in the base."""
    ends = {id(base.get_input_embeddings()), id(base.get_output_embeddings())}
    names = [name for name, module in base.named_modules() if id(module) in ends]
    held = shapes_of(Path(path))
    inside = ("", ".base_layer", ".token_adapter.base_layer")  # under adapters of their own
    found = [(name, f"{PREFIX}{name}{part}.weight") for name in names for part in inside]
    return {name: weight for name, weight in found if weight in held}


def _without_copies(weights: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """The weights of a folder without what peft writes twice of embeddings that were resized.

    Beside the weights of an adapter those are all that their modules hold: the weights once more,
    and those that they replaced.
    """
    ours = [weights[name] for name in weights if name in own]
    twice = {
        name
        for name, weight in weights.items()
        if name not in own
        and re.search(r"\.(modules_to_save|token_adapter)\.", name)
        and any(torch.equal(weight, each) for each in ours)
    }
    return {
        name: weight
        for name, weight in weights.items()
        if name not in twice and ".original_module." not in name
    }


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
