"""The model folder that a run writes: its weights as they are stored, and what stage.json says."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_cli.config.errors import RunError
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.folders.manifest import tokenizer_hash
from rlhf_cli.models.adapters import is_adapted, trained
from rlhf_cli.models.assembled import assembled
from rlhf_cli.models.dtypes import name_of, round_trained, type_to_write
from rlhf_cli.models.nonfinite import first_nonfinite
from rlhf_cli.models.save import save_model, set_score_pad, set_stop_ids
from rlhf_cli.runs.adapter_start import adapter_entry
from rlhf_cli.runs.inherited import longest_learnt


def settle(cfg: Any, model: nn.Module) -> None:
    """Round what was trained to the type in which it is written: what is measured is written.

    Of an adapter that is merged it is the sum with its base that is rounded, as it is written.

    Args:
        cfg: of a stage that trains.

    Raises:
        RunError: a weight is not finite, or not in that type.
    """
    require_finite(trained(model), "at the end")
    if cfg.model.merge_lora and is_adapted(model):
        return
    dtype = written_type(cfg, model)
    round_trained(model, dtype)
    if (name := first_nonfinite(trained(model))) is not None:
        raise RunError(
            f"{name} is too large for {name_of(dtype)}; the same command goes on with "
            "model.save_dtype=float32 or bfloat16"
        )


def gathered(cfg: Any, model: nn.Module) -> AbstractContextManager[None]:
    """Within this block rank 0 has whole weights of all that is written of a model.

    Args:
        cfg: of a stage that trains.
    """
    return assembled(model, adapter_alone=not cfg.model.merge_lora)


def written_type(cfg: Any, model: nn.Module) -> torch.dtype:
    """The type in which the weights of a model are written."""
    return type_to_write(model, cfg.model.save_dtype, cfg.model.merge_lora)


def require_finite(tensors: Mapping[str, Tensor], when: str) -> None:
    """Stop before anything is written that is not finite.

    Raises:
        RunError: naming it.
    """
    if (name := first_nonfinite(tensors)) is not None:
        raise RunError(
            f"{name} is not finite {when}, and is not saved; what was saved before is whole. "
            "Lower algo.lr, or set algo.max_grad_norm"
        )


def write(
    cfg: Any, model: nn.Module, kind: str, encoder: Encoder, folder: Path, rounds: bool = True
) -> dict[str, Any]:
    """Write the files of a model folder; returns what stage.json says of them.

    Args:
        cfg: of a stage that trains.
        rounds: whether the model is what is written from then on.
    """
    merges = cfg.model.merge_lora
    if kind == "policy":
        set_stop_ids(model, encoder.tokenizer, encoder.stop_ids)
    else:
        whole = merges or not is_adapted(model)
        set_score_pad(model, encoder.tokenizer, encoder.stop_ids, whole)
    save_model(model, encoder.tokenizer, folder, merges, written_type(cfg, model), rounds=rounds)
    return {
        **adapter_entry(cfg),
        "tokenizer": tokenizer_hash(folder),
        "eos_ids": encoder.stop_ids,
        "pad_id": encoder.tokenizer.pad_token_id,
        "template": encoder.template,
        "chat_args": cfg.data.chat_args,
        "limits": {
            "max_prompt_tokens": cfg.data.max_prompt_tokens,
            "max_response_tokens": cfg.data.max_response_tokens,
            # what has read no response hands on what its start has learnt from
            "longest_response": encoder.lengths.response or longest_learnt(cfg) or 0,
        },
    }
