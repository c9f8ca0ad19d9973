"""The types of a model's numbers: those that it computes with, and the weights that are written."""

from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from rlhf_cli.config.stages import DEMO_SIZE
from rlhf_cli.folders.manifest import numbers_by_type
from rlhf_cli.models.adapters import is_adapted, trained
from rlhf_cli.models.decoder import unwrap
from rlhf_cli.models.masters import master_of, put

AUTO, SOURCE = "auto", "source"
WRITTEN = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def product_type(dtype: str, parameters: float, device: torch.device) -> torch.dtype:
    """The type of matrix products: as given; `auto` by the device and the size of the model.

    bfloat16 where a GPU multiplies it itself. The demo is too small to gain by it.
    """
    if dtype != AUTO:
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if able and parameters > DEMO_SIZE else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """A type as configs call it."""
    return str(dtype).removeprefix("torch.")


def product_type_of(model: nn.Module) -> torch.dtype:
    """The type of a model's matrix products."""
    dtype: torch.dtype = getattr(unwrap(model), "compute_dtype", torch.float32)
    return dtype


def products_of(model: nn.Module) -> str:
    """That type, and where they are computed, in words."""
    return f"{name_of(product_type_of(model))} on {next(model.parameters()).device.type}"


# --------------------------------------------------------------------------- weights


def source_type(path: str) -> torch.dtype:
    """The type that most weights of a folder have, or that the config of a hub id says.

    What is neither of WRITTEN was made for other programs than ours, and is written as float32.
    """
    numbers = {name: n for name, n in numbers_by_type(Path(path)).items() if name in WRITTEN}
    if numbers:
        return WRITTEN[max(numbers, key=numbers.__getitem__)]
    if Path(path).is_dir():
        return torch.float32
    config, _ = PretrainedConfig.get_config_dict(path)
    said = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return {name_of(dtype): dtype for dtype in WRITTEN.values()}.get(said, torch.float32)


def type_to_write(model: nn.Module, choice: str, merge: bool) -> torch.dtype:
    """The type in which a model is written.

    Args:
        choice: model.save_dtype.
        merge: whether an adapter is merged into its base, whose type then counts.
    """
    if choice != SOURCE:
        chosen: torch.dtype = getattr(torch, choice)
        return chosen
    base = unwrap(model)
    own = "adapter_dtype" if is_adapted(model) and not merge else "source_dtype"
    dtype: torch.dtype = getattr(base, own, torch.float32)  # ours from scratch came in none
    return dtype


@torch.no_grad()
def round_trained(model: nn.Module, dtype: torch.dtype) -> None:
    """Give weights that were trained the values that they have once they are written."""
    for weight in trained(model).values():
        put(weight, master_of(weight).to(dtype))
