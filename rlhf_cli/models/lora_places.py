"""Where LoRA goes: every linear layer of the decoder but head and router, by structure.

Experts are linear layers too, which transformers 5 keeps as one tensor for all of them; peft adapts
those as parameters.
"""

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhf_cli.models.decoder import unwrap
from rlhf_cli.models.experts import decoder_of, experts_of, gates_of

LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class LoraPlaces:
    """The matrices of a decoder by their full names in the model, as LoRA sees them.

    linear: modules that multiply by a matrix.
    experts: parameters that hold the matrices of several experts.
    left_out: modules and parameters with matrices that stay as they are: routers and gates, what is
        no linear layer, and what peft cannot adapt.
    past: those linear layers of them whose weights a block computes with past the layer, where an
        adapter around it would do nothing.
    """

    linear: tuple[str, ...]
    experts: tuple[str, ...]
    left_out: tuple[str, ...]
    past: tuple[str, ...] = ()


def lora_places(model: nn.Module) -> LoraPlaces:
    """Where "every linear layer" is, in a model without adapters.

    Heads and embeddings are in none of the lists, nor are towers that see or hear.
    """
    whole = unwrap(model)
    start, decoder = decoder_of(whole)
    head = whole.get_output_embeddings()
    gates = {id(each) for gate in gates_of(decoder).values() for each in gate.modules()}
    experts = experts_of(decoder)
    holders = {name.rpartition(".")[0] for name in experts}
    prefix = f"{start}." if start else ""
    linear: list[str] = []
    left_out: list[str] = []
    past: list[str] = []
    for name, module in decoder.named_modules():
        if module is head or isinstance(module, nn.Embedding):
            continue
        if isinstance(module, LINEAR):
            weighs, reached = id(module) in gates, _adaptable(whole, f"{prefix}{name}")
            (linear if reached and not weighs else left_out).append(name)
            past += [] if reached or weighs else [name]
        elif name not in holders:
            left_out += _matrices(name, module)
    return LoraPlaces(
        *(tuple(f"{prefix}{name}" for name in names) for names in (linear, experts, left_out, past))
    )


def _matrices(name: str, module: nn.Module) -> list[str]:
    """The module, or those of its own parameters that are matrices."""
    own = module.named_parameters(recurse=False)
    wide = [
        each
        for each, weight in own
        if sum(size > 1 for size in weight.shape) > 1 and not each.endswith("bias")
    ]
    return [name] if wide == ["weight"] else [f"{name}.{each}" for each in wide]


def _adaptable(model: Any, name: str) -> bool:
    """Whether an adapter around a layer has an effect, and peft puts one there."""
    import peft

    block, _, leaf = name.rpartition(".")
    if _reads_weight(type(model.get_submodule(block)), leaf):
        return False
    check = peft.LoraModel._check_target_module_compatiblity
    try:
        check(None, peft.LoraConfig(), model, leaf)  # type: ignore[arg-type]
    except ValueError:
        return False
    return True


def _reads_weight(block: Any, leaf: str) -> bool:
    """Whether a block computes with the weight of a layer past the layer, as Mamba's kernels do.

    A slice of a weight is none: it is what a branch for tensor parallelism takes.
    """
    past = rf"\bself\.{re.escape(leaf)}\.weight\b(?!\[|\.(data|dtype|device|shape))"
    return re.search(past, _source(block)) is not None


@cache
def _source(block: Any) -> str:
    """The text of the methods of a class; nothing where there is none to be had."""
    methods = [method for method in vars(block).values() if inspect.isfunction(method)]
    try:
        return "".join(map(inspect.getsource, methods))
    except OSError:
        return ""


# --------------------------------------------------------------------------- for peft


def peft_targets(model: nn.Module, places: LoraPlaces) -> dict[str, list[str]]:
    """The fields of a LoraConfig that make peft adapt those places and no others.

    Of models whose experts were single layers before transformers 5, peft reads some names as those
    of experts, wherever they are. Layers of such names are given as the parameters that they hold,
    which is the same adapter, and is read so by any peft.
    """
    whole = unwrap(model)
    names = [name for name, _ in whole.named_modules()]
    modules = shortest(places.linear, names)
    renamed = [name for name in modules if _read_as_expert(whole, name)]
    weights = [f"{name}.weight" for name in places.linear if _ends_with(name, renamed)]
    parameters = [name for name, _ in whole.named_parameters()]
    return {
        "target_modules": [name for name in modules if name not in renamed],
        "target_parameters": shortest([*places.experts, *weights], parameters, least=2),
    }


def without_parameters(model: nn.Module, places: LoraPlaces) -> LoraPlaces:
    """The places that peft adapts as modules: dropout and DoRA have no parameters."""
    renamed = [
        end
        for end in {name.rpartition(".")[2] for name in places.linear}
        if _read_as_expert(unwrap(model), end)
    ]
    as_weights = tuple(name for name in places.linear if _ends_with(name, renamed))
    return LoraPlaces(
        tuple(name for name in places.linear if name not in as_weights),
        (),
        (*places.left_out, *as_weights, *places.experts),
    )


def _ends_with(name: str, ends: Iterable[str]) -> bool:
    return any(f".{name}".endswith(f".{end}") for end in ends)


def _read_as_expert(model: Any, name: str) -> bool:
    """Whether peft takes a layer's name for one that experts had."""
    import peft
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    lora = peft.LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(lora, model, None)
    except ValueError:  # one of two that are one tensor now
        return True
    return name not in (lora.target_modules or ())


def shortest(wanted: Iterable[str], names: Iterable[str], least: int = 1) -> list[str]:
    """The shortest ends of dotted names that fit those which are wanted and no others, sorted.

    Args:
        least: parts that an end has where the name has as many.
    """
    wanted = set(wanted)
    fits: dict[str, set[str]] = {}
    for name in {*names} | wanted:
        for end in _ends(name, least):
            fits.setdefault(end, set()).add(name)
    return sorted(
        {next(end for end in _ends(name, least) if fits[end] <= wanted) for name in wanted}
    )


def _ends(name: str, least: int) -> list[str]:
    """What a dotted name ends with, from the shortest on; no end begins with a number."""
    parts = name.split(".")
    starts = [i for i in range(len(parts) - least, 0, -1) if not parts[i].isdigit()]
    return [".".join(parts[i:]) for i in [*starts, 0]]


def in_short(names: Iterable[str]) -> list[str]:
    """Names of layers for a reader: those that differ in a number are one, *."""
    return sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names})
