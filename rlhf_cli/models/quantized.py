"""A frozen base in 4 or 8 bits, under an adapter in float32 (QLoRA, 2305.14314)."""

from typing import Any

import torch
from torch import nn

from rlhf_cli.config.schema.models import FrozenModel


def quantization(config: FrozenModel) -> dict[str, Any]:
    """How transformers is to load a base by model.quantize; nothing where that is null.

    nf4 has its scales quantised too (2305.14314 sec. 3). Heads and embeddings stay as they are.
    """
    kind = getattr(config, "quantize", None)
    if kind is None:
        return {}
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,  # as all is loaded; see compute_in_bfloat16
        )
    }


def compute_in_bfloat16(model: nn.Module) -> None:
    """Let 4-bit layers unpack their weights to bfloat16; those of 8 bits do without."""
    for module in model.modules():
        if hasattr(module, "compute_type_is_set"):
            module.compute_dtype = torch.bfloat16  # type: ignore[assignment]
            if (state := getattr(module.weight, "quant_state", None)) is not None:
                state.dtype = torch.bfloat16


def keep_layout(model: nn.Module) -> None:
    """Let no 4-bit weight be packed anew for a CPU's bfloat16 products once it is evaluated.

    Its bytes would change while it is frozen, and products with and without gradient would differ.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
