"""An adapter on top of another: both are written as the one plain adapter that is their sum.

    s2 B2 A2 + s1 B1 A1 = [s1 B1, s2 B2] [A1; A2]

with A (r, in), B (out, r) and s the scale of each: the matrices side by side are an adapter of rank
r1 + r2 and scale 1.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlhf_cli.models.adapter_folders import PREFIX, WEIGHTS, saved_weights
from rlhf_cli.models.adapters import BELOW, POLICY, weights_of
from rlhf_cli.models.masters import held_as

SIDES = {  # the parts of an adapter by the dimension along which ranks lie
    "lora_A.weight": 0,
    "lora_B.weight": 1,
    "lora_embedding_A": 0,
    "lora_embedding_B": 1,
}


def save_stacked(adapted: Any, folder: Path, dtype: torch.dtype) -> None:
    """The folder of one adapter that does what the policy's and the one below it do together."""
    config, weights = summed(adapted)
    config.save_pretrained(str(folder))
    tensors = {name: weight.to("cpu", dtype).contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


@torch.no_grad()
def summed(adapted: Any) -> tuple[Any, dict[str, Tensor]]:
    """The config and the weights, by peft's names, of that adapter."""
    names = (BELOW, POLICY)
    with held_as(torch.float32, (w for each in names for w in weights_of(adapted, each).values())):
        parts = [saved_weights(adapted, each) for each in names]
    scales = [_scales(adapted, each) for each in names]
    weights: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name in {**parts[0], **parts[1]}:
        side = next((each for each in SIDES if name.endswith(each)), None)
        if side is None:  # a head, which the policy's adapter trains whole
            weights[name] = parts[1].get(name, parts[0].get(name))  # type: ignore[assignment]
            continue
        layer = name.removeprefix(PREFIX).removesuffix(f".{side}")
        dim = SIDES[side]
        pieces = [
            part[name] * (scale[layer] if dim == 1 else 1.0)
            for part, scale in zip(parts, scales, strict=True)
            if name in part
        ]
        weights[name] = torch.cat(pieces, dim)
        ranks[layer] = weights[name].shape[dim]
    config = copy.copy(adapted.peft_config[POLICY])
    config.r = config.lora_alpha = max(ranks.values())  # a scale of 1
    config.rank_pattern = {f"^{name}$": rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    config.target_modules, config.use_rslora = sorted(ranks), False
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.inference_mode = True
    return config, weights


def _scales(adapted: Any, adapter: str) -> dict[str, float]:
    """By layer, what the product of its matrices is multiplied by."""
    from peft.tuners.lora import LoraLayer

    return {
        name: module.scaling[adapter]
        for name, module in adapted.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and adapter in module.scaling
    }
