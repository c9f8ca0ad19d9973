"""Models that see or hear, trained on text: their towers stay as they are, and are written back.

A tower is what text does not pass through: encoders of images, video and sound, and what projects
their states into the decoder.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import (
    AUDIO_TOKENIZER_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
)
from transformers.utils.hub import cached_file

from rlhf_cli.data.batches import collate
from rlhf_cli.data.items import Tokens
from rlhf_cli.models.decoder import hidden_states, outputs_of, parts_of, trunk, unwrap
from rlhf_cli.models.heads import head_name

PROCESSORS = (
    *(PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, AUDIO_TOKENIZER_NAME),
    "chat_template.json",  # where older folders keep that of a processor
)


def towers(model: nn.Module) -> list[str]:
    """The paths of the towers of a language model, or of a classifier with the same trunk."""
    base = unwrap(model)
    body = trunk(model)
    if not isinstance(body, nn.Module) or body not in set(base.modules()):
        return []  # it is on another model's trunk
    path = parts_of(base).trunk
    head = parts_of(base).head or _names_under(base, head_name(base))
    return [*_outside(base, path, head), *_inside(base, path)] if head else []


def _outside(base: nn.Module, trunk_path: str, head: Collection[str]) -> Iterator[str]:
    """The largest parts beside the decoder that have weights, none of them of the head."""
    weights = [name for name, _ in base.named_parameters()]
    free = [name for name in weights if name not in head and not under(name, [trunk_path])]
    kept = set(weights) - set(free)
    found: list[str] = []
    for name in free:
        steps = name.split(".")
        paths = (".".join(steps[:depth]) for depth in range(1, len(steps) + 1))
        path = next(path for path in paths if not any(under(each, [path]) for each in kept))
        if path not in found:
            found.append(path)
    yield from found


def _names_under(base: nn.Module, path: str | None) -> set[str]:
    return {name for name, _ in base.named_parameters() if path and under(name, [path])}


def _inside(base: Any, trunk_path: str) -> Iterator[str]:
    """The parts of the decoder that hold models of their own, and that text does not reach."""
    body = base.get_submodule(trunk_path)
    models = [
        f"{trunk_path}.{name}"
        for name, child in body.named_children()
        if any(isinstance(each, PreTrainedModel) for each in child.modules())
    ]
    if not models:
        return
    batch = collate([Tokens([0], [0])], next(base.parameters()).device)
    with torch.no_grad(), outputs_of(base, models) as seen:
        hidden_states(base, batch)
    yield from (path for path in models if path not in seen)


def under(name: str, paths: list[str]) -> bool:
    """Whether a weight or module is one of these, or in one of them."""
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def freeze(model: nn.Module, paths: list[str]) -> None:
    """Leave parts of a model untrained, adapters in them included."""
    for name, weight in unwrap(model).named_parameters():
        if under(name, paths):
            weight.requires_grad_(False)


def told_of_towers(model: nn.Module) -> list[str]:
    """A line on the towers of a model that is trained, if it has any."""
    base = unwrap(model)
    if not (paths := getattr(base, "towers", [])):
        return []
    count = sum(weight.numel() for name, weight in base.named_parameters() if under(name, paths))
    return [
        f"{type(base).__name__}: text alone is learnt; frozen: {', '.join(paths)} "
        f"({count:,} weights)"
    ]


# --------------------------------------------------------------------------- processors


def processor_files(path: str) -> dict[str, bytes]:
    """The files of a folder or hub id that say how images and sounds become tensors, by name."""
    found = {}
    for name in PROCESSORS:
        file = cached_file(
            path,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        if file is not None:
            found[name] = Path(file).read_bytes()
    return found
