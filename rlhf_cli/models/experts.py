"""Mixtures of experts by structure: where the routers, the experts and other matrices are.

A block of experts is a module with tensors for several experts in a child, as transformers 5 keeps
them, and with a router beside it: what scores the experts for each token.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder


@dataclass(frozen=True)
class Router:
    """A module that scores the experts for each token.

    index: which of its outputs the scores are, where it has several.
    """

    name: str
    module: nn.Module
    index: int


def decoder_of(whole: Any) -> tuple[str, nn.Module]:
    """The smallest model that holds the embeddings of text, with its name in the whole one.

    No head is in it, and no tower that sees or hears.
    """
    embeddings = whole.get_input_embeddings()
    holders = [
        (name, module)
        for name, module in whole.named_modules()
        if isinstance(module, PreTrainedModel) and any(embeddings is m for m in module.modules())
    ]
    return holders[-1] if holders else ("", whole)


def stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own matrices for several experts, (E, in, out) or (E, out, in), by name."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return {}
    return {
        name: weight
        for name, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3 and min(weight.shape) > 1
    }


def routers_of(decoder: nn.Module) -> list[Router]:
    """The routers: those whose scores transformers can record, else those that look like one."""
    recorded = [
        Router(name, module, recorder.index)
        for name, module in decoder.named_modules()
        for recorder in _recorders(decoder)
        if _records(recorder, name, module)
    ]
    return recorded or [Router(name, module, 0) for name, module in _like_routers(decoder)]


def gates_of(decoder: nn.Module) -> dict[str, nn.Module]:
    """All that weighs experts, by name: routers, and the gates of experts that see every token."""
    routers = {router.name: router.module for router in routers_of(decoder)}
    alone = {
        name: module
        for name, module in routers.items()
        if not any(stacked(each) for each in module.modules())  # a whole block may be recorded
    }
    blocks = {name.rpartition(".")[0] for name in _stacks(decoder)} if routers else set()
    single = {
        _joined(block, name): module
        for block in blocks
        for name, module in decoder.get_submodule(block).named_children()
        if isinstance(module, nn.Linear) and module.out_features == 1
    }
    return alone | dict(_like_routers(decoder)) | single


def experts_of(decoder: nn.Module) -> dict[str, nn.Parameter]:
    """The tensors for several experts, by name: those with a router beside them."""
    gates = gates_of(decoder)
    return {
        f"{name}.{each}": weight
        for name, module in _stacks(decoder).items()
        for each, weight in stacked(module).items()
        if any(gate.startswith(_joined(name.rpartition(".")[0], "")) for gate in gates)
    }


def _stacks(decoder: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in decoder.named_modules() if stacked(module)}


def _like_routers(decoder: nn.Module) -> list[tuple[str, nn.Module]]:
    """Layers beside experts that have an output for each of them; not all are plain linear ones."""
    return [
        (_joined(block, child), module)
        for name, stack in _stacks(decoder).items()
        for block in [name.rpartition(".")[0]]
        for child, module in decoder.get_submodule(block).named_children()
        if any(_outputs(module) == len(weight) for weight in stacked(stack).values())
    ]


def _outputs(module: nn.Module) -> int | None:
    """The outputs of a module with one matrix; None of others."""
    if isinstance(module, nn.Linear):  # of few bits its matrix has another shape
        return module.out_features
    weight = getattr(module, "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.ndim == 2 else None


def _joined(block: str, name: str) -> str:
    return f"{block}.{name}" if block else name


def _recorders(decoder: Any) -> list[OutputRecorder]:
    """How transformers records the scores of routers, as `output_router_logits=True` asks for."""
    told = (getattr(decoder, "_can_record_outputs", None) or {}).get("router_logits", [])
    each = told if isinstance(told, list) else [told]
    return [one if isinstance(one, OutputRecorder) else OutputRecorder(one, 1) for one in each]


def _records(recorder: OutputRecorder, name: str, module: nn.Module) -> bool:
    """Whether a recorder listens to a module, as transformers decides it."""
    layer = recorder.layer_name
    of_class = recorder.target_class is not None and isinstance(module, recorder.target_class)
    named = recorder.class_name is not None and name.endswith(recorder.class_name)
    return (of_class or named) and (layer is None or f".{layer.strip('.')}." in f".{name}.")
