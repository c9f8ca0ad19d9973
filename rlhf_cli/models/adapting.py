"""Which adapter a loaded model gets: its folder's, merged or trained on, or a fresh one."""

import re
import warnings
from typing import Any

import torch
from torch import nn

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema import FrozenModel, Model
from rlhf_cli.folders.manifest import adapter_base
from rlhf_cli.models.adapters import (
    POLICY,
    PREFIX,
    adapter_config,
    adapter_weights,
    check_patterns,
    put_weights,
)
from rlhf_cli.models.decoder import unwrap
from rlhf_cli.models.dropout import disable_dropout
from rlhf_cli.models.dtypes import product_type
from rlhf_cli.models.heads import head_name
from rlhf_cli.models.loading_faults import check_finite, told
from rlhf_cli.models.shared import freeze_lowest
from rlhf_cli.models.tokenizers import leave_absent_rows, trainable_rows
from rlhf_cli.models.towers import freeze, processor_files, towers


def rank_of(config: FrozenModel) -> int:
    """The rank of the adapter that is trained; 0 for none."""
    return config.lora_rank if isinstance(config, Model) else 0


def own_names(path: str) -> set[str]:
    """The names of an adapter folder's own weights."""
    with told(f"{path}: cannot load the adapter"):
        return set(adapter_weights(path))


def check_adapter(path: str) -> None:
    """`check_finite` of an adapter folder's own weights."""
    with told(f"{path}: cannot load the adapter"):
        check_finite(path, adapter_weights(path))


def adapt(model: Any, path: str, config: FrozenModel, task: str, device: torch.device) -> nn.Module:
    """Put the folder's adapter, or a fresh one, where model.lora_rank asks for it; no dropout.

    What text does not pass through is frozen, and has no adapter.
    """
    parameters = sum(weight.numel() for weight in model.parameters())
    # read by models/forward.py
    model.compute_dtype = product_type(config.dtype, parameters, device)
    model.towers = towers(model)
    if model.towers:  # written back beside the weights
        model.processors = processor_files(model.config._name_or_path)
    # read by training/balancing.py
    model.router_aux_coef = config.router_aux_coef if isinstance(config, Model) else None
    if adapter_base(path) is not None:
        check_adapter(path)
    with told(f"{path}: cannot load the adapter"):
        adapted = _with_adapter(model, path, config, task)
    disable_dropout(adapted)
    freeze(adapted, model.towers)
    if isinstance(config, Model) and config.frozen_layers:
        freeze_lowest(adapted, config.frozen_layers)
    return adapted


def _with_adapter(model: Any, path: str, config: FrozenModel, task: str) -> nn.Module:
    rank = rank_of(config)
    is_adapter = adapter_base(path) is not None
    if rank == 0 and not is_adapter:
        return model
    import peft

    if rank == 0:
        own = adapter_config(path)
        check_patterns(model, own)
        policys = task not in ("CAUSAL_LM", own.task_type)
        own.task_type = None  # a policy's adapter merges into the trunk of a scorer too
        leave_absent_rows(model, own)
        merged = _loaded_adapter(model, path, config=own, head_left=policys).merge_and_unload()
        return merged.requires_grad_(True)  # peft froze what is now trained in full
    assert isinstance(config, Model)
    head = None if task == "CAUSAL_LM" else head_name(model)
    lora = peft.LoraConfig(
        r=rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        target_modules="all-linear",
        exclude_modules=_left_out(head, model.towers),
        task_type=task,
        trainable_token_indices=trainable_rows(model, path),
    )
    if is_adapter:
        lora = adapter_config(path)
        check_patterns(model, lora)
        if (rank, config.lora_alpha) != (lora.r, lora.lora_alpha):
            raise UserError(
                f"{path}: its adapter has rank {lora.r} and alpha {lora.lora_alpha}; set "
                f"model.lora_rank={lora.r} model.lora_alpha={lora.lora_alpha}"
            )
        if lora.task_type == task:
            return _loaded_adapter(model, path, is_trainable=True)
        lora.task_type, lora.inference_mode = task, False  # a policy's adapter, under a new head
        leave_absent_rows(model, lora)
    if head:
        lora.modules_to_save = [head]
    adapted = peft.get_peft_model(model, lora)
    if is_adapter:
        weights = adapter_weights(path)
        fresh: Any = getattr(unwrap(adapted), head or "score")
        for name, value in fresh.original_module.named_parameters():
            weights[f"{PREFIX}{head}.{name}"] = value.detach()
        put_weights(adapted, POLICY, weights, path, head_left=True)
    return adapted


def _left_out(head: str | None, towers: list[str]) -> list[str] | str | None:
    """What a fresh adapter leaves out, as peft asks for it: names, or an expression for paths."""
    heads = [head] if head else []
    if not towers:
        return heads or None
    return "|".join(
        [*(rf"(.*\.)?{each}" for each in heads), *(rf"{re.escape(each)}(\..*)?" for each in towers)]
    )


def _loaded_adapter(model: Any, path: str, head_left: bool = False, **settings: Any) -> Any:
    """The model with a folder's adapter as peft puts it there, every tensor accounted for."""
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # told below
        adapted = peft.PeftModel.from_pretrained(model, path, **settings)
    renamed = getattr(model, "_checkpoint_conversion_mapping", {})
    weights = peft.load_peft_weights(path, device="cpu", key_mapping=renamed)
    put_weights(adapted, POLICY, weights, path, head_left)
    return adapted
