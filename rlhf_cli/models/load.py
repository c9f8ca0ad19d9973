"""Language models in: from a hub id, a folder, or an adapter folder on its base."""

import re
from collections.abc import Iterable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.keys import AUTO
from rlhf_cli.config.schema.models import FrozenModel, Model
from rlhf_cli.folders.integrity import check_weights_hash
from rlhf_cli.folders.manifest import adapter_base, shapes_of
from rlhf_cli.models.adapter_folders import (
    adapter_weights,
    holds_embeddings,
    put_weights,
    rows_held,
)
from rlhf_cli.models.adapters import POLICY, is_adapted, trained
from rlhf_cli.models.adapting import adapt
from rlhf_cli.models.attention import asked_for, check_attention, check_device, try_attention
from rlhf_cli.models.decoder import find_parts
from rlhf_cli.models.dtypes import source_type
from rlhf_cli.models.loading_faults import check_finite, fits, told
from rlhf_cli.models.mapped import mapped
from rlhf_cli.models.masters import held_as, put
from rlhf_cli.models.norms import fuse_norms
from rlhf_cli.models.quantized import keep_layout, quantization
from rlhf_cli.models.tokenizers import fit_embeddings, generation_of
from rlhf_cli.reporting.console import say

LANGUAGE_MODELS = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)


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
    check_device(config, device)
    model = load_base(path, config, None, allowed_missing=set())
    added = fit_embeddings(model, tokenizer, path)
    # told once, of what is trained; an adapter that was trained before brings such rows along
    if added is not None and isinstance(config, Model) and adapter_base(path) is None:
        say(added)
    model.generation_settings = generation_of(path)  # written by models/save.py
    find_parts(model)
    model = adapt(model, path, config, "CAUSAL_LM", device)
    try_attention(model, path, config)
    return model


def load_base(path: str, config: FrozenModel, auto: Any, allowed_missing: set[str] | None) -> Any:
    """The full model of a folder; of an adapter folder, its base.

    `model.absent` names the weights that the folder lacks, `model.unread` those that it has more.

    Args:
        auto: the auto class of a classifier; None for the language model that the folder is.
        allowed_missing: weights that need not be there; None: all those beside the decoder.
    """
    base = adapter_base(path)
    if find_adapter_config_file(base or path) is not None:  # its weights might be a pickle
        raise UserError(
            f"{path}: {base or path} is an adapter, and no base is known that it belongs to; "
            "download it, or merge it into its base"
        )
    labels = {} if auto is None else {"num_labels": 1}
    for folder in (base, path):
        check_weights_hash(folder or path)
    by = "" if config.attention == AUTO else f" with model.attention={config.attention}"
    quantized, source = quantization(config), base or path
    with (
        told(f"{path}: cannot load the model{by}"),
        nullcontext(source) if quantized else mapped(source) as folder,
    ):
        model, info = (auto or language_class(source, config)).from_pretrained(
            folder,
            dtype=torch.float32,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,  # else weights that are a pickle would do as well
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
            **labels,
            **quantized,
            **asked_for(config),
        )
    if folder != source:  # it is gone
        model.name_or_path = model.config._name_or_path = source
    keep_layout(model)
    absent = {str(name) for name in info["missing_keys"]}
    _check_complete(path, model, info, auto, allowed_missing)
    if auto is None:
        _tell_left_out(base or path, model, info["unexpected_keys"])
    check_attention(model, path, config)
    model.absent, model.unread = absent, {str(name) for name in info["unexpected_keys"]}
    check_finite(base or path, model.state_dict())
    keep_scale(model)
    fuse_norms(model)
    with told(f"{path}: unreadable config"):
        model.source_dtype = source_type(base or path)  # read where it is written
    model.adapter_dtype = model.source_dtype if base is None else source_type(path)
    model.embeddings_in_adapter = base is not None and holds_embeddings(path, model)
    model.rows_in_adapter = 0 if base is None else rows_held(path, model)
    return model


def _check_complete(
    path: str, model: Any, info: Any, auto: Any, allowed_missing: set[str] | None
) -> None:
    """Stop where weights are missing or of another shape; the arguments are those of `load_base`.

    Args:
        info: what transformers says of the weights that it read.
    """
    absent = {str(name) for name in info["missing_keys"]}
    decoder = f"{model.base_model_prefix}."
    allowed = {each for each in absent if allowed_missing is None and not each.startswith(decoder)}
    missing = absent - (allowed_missing or allowed)
    misshapen = {str(name): shape for name, shape, _ in info["mismatched_keys"]}
    for name, shape in misshapen.items():
        if auto is not None and not name.startswith(decoder) and name not in missing:
            raise UserError(
                f"{path}: its head {name.rpartition('.')[0]} gives {shape[0]} labels; a reward "
                "model gives one"
            )
    if missing or misshapen:
        names = sorted(missing) or sorted(misshapen)
        raise UserError(f"{path}: {len(names)} weights missing or misshapen, such as {names[0]}")


def language_class(path: str, config: FrozenModel) -> Any:
    """The auto class that makes a folder's language model the class that its config names.

    One that sees has a class for text alone, too, which would leave its other weights out. A config
    that names no class of a language model is of a text model, unless it has one inside it.
    """
    read = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    made = {auto: auto._model_mapping.get(type(read), None) for auto in LANGUAGE_MODELS}
    brought = getattr(read, "auto_map", None) or {}
    for auto, known in made.items():
        names = {each.__name__ for each in (known if isinstance(known, tuple) else [known]) if each}
        if auto.__name__ in brought or names & set(read.architectures or []):
            return auto
    text_alone = read.get_text_config() is read and made[AutoModelForCausalLM] is not None
    rest = [auto for auto, known in made.items() if known is not None]
    return AutoModelForCausalLM if text_alone or not rest else rest[-1]


def _tell_left_out(path: str, model: Any, unexpected: Iterable[str]) -> None:
    """Say which weights of a folder its class has no place for, as they will not be written.

    Some classes pass over parts in silence, such as those that predict several tokens at once. What
    they pass over that is no matrix is no weight: masks and frequencies that older folders hold.
    """
    ignored = [re.compile(each) for each in model._keys_to_ignore_on_load_unexpected or ()]
    passed = {
        name
        for name, shape in shapes_of(Path(path)).items()
        if len(shape) == 2 and any(pattern.search(name) for pattern in ignored)
    }
    if left := sorted(passed.union(unexpected)):
        _say_once(
            f"note: {path}: {type(model).__name__} has no place for {len(left)} of its weights, "
            f"such as {left[0]}: they are left out, and not written"
        )


_say_once = cache(say)


def keep_scale(model: nn.Module) -> None:
    """Weights stay as they are in evaluation too, where RWKV halves some lest float16 overflow.

    It doubles them again in training mode; what is written or copied in between would be another
    model. The last norm divides by the scale of the states, so that the logits are the same.
    """
    for module in model.modules():
        if hasattr(module, "_rescale_layers"):
            module._rescale_layers = _nothing  # type: ignore[assignment]


def _nothing() -> None:
    pass


def load_weights(model: nn.Module, folder: str, config: Model) -> None:
    """Put the weights of a folder that `save_model` wrote unmerged back into the same model."""
    with held_as(torch.float32, trained(model).values()):
        if is_adapted(model):
            put_weights(model, POLICY, adapter_weights(folder), folder)
        else:
            read = load_base(folder, config, None, allowed_missing=set())
            ours: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
            ours |= dict(model.named_buffers())
            for name, value in read.state_dict().items():
                put(ours[name], value)
