"""Language models in: from a hub id, a folder, or an adapter folder on its base."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema import FrozenModel, Model
from rlhf_cli.folders.integrity import check_weights_hash
from rlhf_cli.folders.manifest import adapter_base
from rlhf_cli.models.adapters import POLICY, adapter_weights, is_adapted, put_weights
from rlhf_cli.models.adapting import adapt
from rlhf_cli.models.decoder import check_unembedding
from rlhf_cli.models.dtypes import source_type
from rlhf_cli.models.loading_faults import check_finite, fits, told
from rlhf_cli.models.quantized import keep_layout, quantization
from rlhf_cli.models.tokenizers import fit_embeddings


@fits
def load_policy(
    path: str, config: FrozenModel, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> nn.Module:
    """A language model ready for its stage: adapter merged or continued, dropout off.

    An adapter folder is loaded as base plus adapter. What becomes of that says model.adapter; by
    default it goes on being trained with model.lora_rank > 0, and is merged otherwise.

    Raises:
        UserError: weights are missing or unreadable, or an adapter is of a kind that is not known.
    """
    model = load_base(path, config, AutoModelForCausalLM, allowed_missing=set())
    fit_embeddings(model, tokenizer)
    check_unembedding(model)
    return adapt(model, path, config, "CAUSAL_LM", device).to(device)


def load_base(path: str, config: FrozenModel, auto: Any, allowed_missing: set[str]) -> Any:
    """The full model of a folder; of an adapter folder, its base."""
    base = adapter_base(path)
    if find_adapter_config_file(base or path) is not None:  # its weights might be a pickle
        raise UserError(
            f"{path}: {base or path} is an adapter, and no base is known that it belongs to; "
            "download it, or merge it into its base"
        )
    labels = {} if auto is AutoModelForCausalLM else {"num_labels": 1}
    for folder in (base, path):
        check_weights_hash(folder or path)
    with told(f"{path}: cannot load the model"):
        model, info = auto.from_pretrained(
            base or path,
            dtype=torch.float32,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,  # else weights that are a pickle would do as well
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
            **labels,
            **quantization(config),
        )
    keep_layout(model)
    missing = {str(name) for name in info["missing_keys"]} - allowed_missing
    if missing or info["mismatched_keys"]:
        names = sorted(missing) or sorted(str(key[0]) for key in info["mismatched_keys"])
        raise UserError(f"{path}: {len(names)} weights missing or misshapen, such as {names[0]}")
    check_finite(base or path, model.state_dict())
    with told(f"{path}: unreadable config"):
        model.source_dtype = source_type(base or path)  # read where it is written
    model.adapter_dtype = model.source_dtype if base is None else source_type(path)
    return model


def load_weights(model: nn.Module, folder: str, config: Model) -> None:
    """Put the weights of a folder that `save_model` wrote unmerged back into the same model."""
    if is_adapted(model):
        put_weights(model, POLICY, adapter_weights(folder), folder)
    else:
        model.load_state_dict(
            load_base(folder, config, AutoModelForCausalLM, allowed_missing=set()).state_dict()
        )
