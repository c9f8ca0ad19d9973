"""Models out: folders that transformers and peft load as they are."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rlhf_cli.models.adapters import POLICY, is_adapted, trained
from rlhf_cli.models.decoder import unwrap
from rlhf_cli.models.dtypes import held_as

ONE_FILE = "50GB"  # where transformers itself begins another


def save_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    merge: bool,
    dtype: torch.dtype = torch.float32,
    shard_size: str = ONE_FILE,
) -> None:
    """A folder that transformers (peft for an unmerged adapter) loads as it is.

    Args:
        dtype: of the weights on disk, to which those of the model are rounded.
        shard_size: of the largest file of whole weights, as `5GB`; one tensor may be larger.
    """
    adapted: Any = model if is_adapted(model) else None
    if adapted is not None and not merge:
        base = Path(unwrap(model).config._name_or_path)
        if base.exists():
            adapted.peft_config[POLICY].base_model_name_or_path = str(base.resolve())
        with held_as(dtype, trained(adapted).values()):
            adapted.save_pretrained(folder, selected_adapters=[POLICY])
        if unwrap(model).can_generate():  # the base's own may name other EOS ids
            unwrap(model).generation_config.save_pretrained(folder)
    else:
        whole: Any = model
        if adapted is not None:
            whole = copy.deepcopy(adapted).merge_and_unload(adapter_names=[POLICY])
        with held_as(dtype, whole.parameters()):
            whole.save_pretrained(folder, max_shard_size=shard_size)
        for name, content in getattr(unwrap(model), "processors", {}).items():
            (folder / name).write_bytes(content)
    tokenizer.save_pretrained(folder)


def set_stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]) -> None:
    """Generation stops where training ended responses, in every tool that reads the folder."""
    base = unwrap(model)
    eos = stop_ids[0] if len(stop_ids) == 1 else stop_ids
    base.config.pad_token_id = tokenizer.pad_token_id
    base.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id
    )
