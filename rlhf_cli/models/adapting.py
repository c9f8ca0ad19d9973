"""Which adapter a loaded model gets: its folder's, merged, continued or stacked on, or a fresh one.

docs/adapters.md has the kinds, and what is refused.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.models import FrozenModel, Model
from rlhf_cli.folders.adapter_use import MERGE, STACK, use_of
from rlhf_cli.folders.manifest import adapter_base
from rlhf_cli.models.adapter_folders import (
    PREFIX,
    adapter_config,
    adapter_weights,
    check_patterns,
    put_weights,
    unknown_settings,
)
from rlhf_cli.models.adapters import BELOW, POLICY, is_adapted, unite, weights_of
from rlhf_cli.models.decoder import unwrap
from rlhf_cli.models.dropout import disable_dropout
from rlhf_cli.models.dtypes import product_type
from rlhf_cli.models.heads import HEAD_NAMES, head_name
from rlhf_cli.models.loading_faults import check_finite, told
from rlhf_cli.models.lora_targets import fresh_config
from rlhf_cli.models.merging import merge
from rlhf_cli.models.placing import place
from rlhf_cli.models.shared import freeze_lowest
from rlhf_cli.models.tokenizers import leave_absent_rows, trainable_rows
from rlhf_cli.models.towers import freeze, processor_files, towers
from rlhf_cli.reporting.console import say

# settings under which an adapter acts in other ways than by its matrices alone
OTHER_WAYS = ("alora_invocation_tokens", "arrow_config", "layer_replication", "monteclora_config")


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
    """Put the folder's adapter, or a fresh one, where model.adapter and model.lora_rank ask for it.

    No dropout, but that of sft's model.lora_dropout. What text does not pass through is frozen, and
    gets no fresh adapter. The model is then on the device, its weights in model.dtype.

    Raises:
        UserError: the folder's adapter is of a kind that cannot be merged, or trained on.
    """
    parameters = sum(weight.numel() for weight in model.parameters())
    disable_dropout(model)
    model.towers = towers(model)
    if model.towers:  # written back beside the weights
        model.processors = processor_files(model.config._name_or_path)
    # read by training/balancing.py
    model.router_aux_coef = config.router_aux_coef if isinstance(config, Model) else None
    if adapter_base(path) is not None:
        check_adapter(path)
    with told(f"{path}: cannot load the adapter"):
        adapted = _with_adapter(model, path, config, task)
    freeze(adapted, [*model.towers, *_namesakes(adapted, config)])
    if isinstance(config, Model) and config.frozen_layers:
        freeze_lowest(adapted, config.frozen_layers)
    place(adapted, config, product_type(config.dtype, parameters, device), device)
    return adapted.eval()  # peft makes its layers in training mode


def _with_adapter(model: Any, path: str, config: FrozenModel, task: str) -> nn.Module:
    use, rank = use_of(path, config), rank_of(config)
    if use is None:
        return _fresh(model, path, config, task) if rank else model
    own = _folders_config(path, model)
    if use == MERGE:
        merged = _merged(model, path, own, task)
        return _fresh(merged, path, config, task) if rank else merged
    if own.peft_type != "LORA":
        raise UserError(f"{path}: adapters of the kind {own.peft_type.value} are not trained on")
    if use == STACK:
        return _stacked(model, path, own, config, task)
    adapted = _continued(model, path, own, config, task)
    if isinstance(config, Model) and config.merge_lora:
        _check_biases(adapted, path)
    return adapted


def _fresh(model: Any, path: str, config: FrozenModel, task: str) -> nn.Module:
    import peft

    assert isinstance(config, Model)
    lora = fresh_config(model, config, task)
    lora.trainable_token_indices = trainable_rows(model, path)
    with _without_warnings():
        adapted: nn.Module = peft.get_peft_model(model, lora)
    return adapted


def _folders_config(path: str, model: nn.Module) -> Any:
    """The config of a foreign adapter, without dropout, once it is known to be one that acts alone.

    What this version of peft does not know of it is said.
    """
    own = adapter_config(path)
    check_patterns(model, own)
    for name in OTHER_WAYS:
        if getattr(own, name, None):
            raise UserError(
                f"{path}: an adapter with {name} does not act by its matrices alone, and is not "
                "known here; merge it with the tool that made it"
            )
    if unknown := unknown_settings(path, own):
        say(f"note: {path}: this version of peft knows no {', '.join(unknown)}; left out")
    if getattr(own, "lora_dropout", 0):
        own.lora_dropout = 0.0
    return own


def _merged(model: Any, path: str, own: Any, task: str) -> nn.Module:
    """The model with the folder's adapter in its weights."""
    if own.is_prompt_learning or own.is_adaption_prompt:
        raise UserError(
            f"{path}: {own.peft_type.value} adapters put tokens before the text, not weights into "
            "the model, and are not known here; train LoRA on the same rows, or give its base"
        )
    policys = task not in ("CAUSAL_LM", own.task_type)
    own.task_type = None  # a policy's adapter merges into the trunk of a scorer too
    leave_absent_rows(model, own)
    adapted = _loaded_adapter(model, path, config=own, head_left=policys)
    _check_biases(adapted, path)
    merged = merge(adapted, [POLICY])
    merged.holds_adapter = True  # type: ignore[assignment]
    return merged.requires_grad_(True)  # peft froze what may now be trained in full


def _check_biases(adapted: nn.Module, path: str) -> None:
    """Stop where matrices have biases, which merging adds to those of layers that have none."""
    from peft.tuners.lora import LoraLayer

    for name, layer in adapted.named_modules():
        biased = isinstance(layer, LoraLayer) and layer.lora_bias.get(POLICY)
        if biased and getattr(layer.get_base_layer(), "bias", None) is None:
            raise UserError(
                f"{path}: its matrices have biases (lora_bias), and {name.removeprefix(PREFIX)} "
                "has none to merge them into; keep it apart: model.adapter=continue, "
                "model.merge_lora=false"
            )


def _continued(model: Any, path: str, own: Any, config: FrozenModel, task: str) -> nn.Module:
    """The model under the folder's adapter, which is trained."""
    import peft

    if getattr(config, "lora_dropout", 0.0):  # of sft alone
        own.lora_dropout = config.lora_dropout  # type: ignore[attr-defined]
    head = None if task == "CAUSAL_LM" else head_name(model)
    if own.task_type in (task, None):
        own.task_type = task
        return _loaded_adapter(model, path, is_trainable=True, config=own)
    own.task_type, own.inference_mode = task, False  # a policy's adapter, under a new head
    leave_absent_rows(model, own)
    parts = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    own.modules_to_save = [name for name in own.modules_to_save or [] if name in parts]
    own.modules_to_save += [head] if head else []
    with _without_warnings():
        adapted = peft.get_peft_model(model, own)
    weights = _in_place(adapter_weights(path), model)
    for name, each in _whole(adapted):  # the head is fresh, and the rest as it is in the base
        for part, value in each.original_module.named_parameters():
            weights.setdefault(f"{PREFIX}{name}.{part}", value.detach())
    put_weights(adapted, POLICY, weights, path, head_left=True)
    return adapted


def _whole(adapted: nn.Module) -> list[tuple[str, Any]]:
    """The modules that an adapter has whole copies of, by name."""
    from peft.utils.other import ModulesToSaveWrapper

    named = unwrap(adapted).named_modules()
    return [(name, each) for name, each in named if isinstance(each, ModulesToSaveWrapper)]


def _namesakes(adapted: nn.Module, config: FrozenModel) -> list[str]:
    """Parts of a decoder that are called as heads are, which peft would train whole with a head."""
    if not is_adapted(adapted):  # nor is peft imported, which takes a while
        return []
    asked = config.modules_to_save if isinstance(config, Model) else ()
    inside = [name for name, _ in _whole(adapted) if "." in name]
    return [
        name
        for name in inside
        if (last := name.rpartition(".")[2]) in HEAD_NAMES and last not in asked
    ]


def _stacked(model: Any, path: str, own: Any, config: FrozenModel, task: str) -> nn.Module:
    """The model under the folder's adapter, frozen, with a fresh one over it that is trained."""
    whole = [own.bias != "none", own.lora_bias, own.use_dora, own.modules_to_save]
    whole += [own.trainable_token_indices, trainable_rows(model, path)]
    if any(whole) or own.target_parameters or own.init_lora_weights not in (True, False):
        raise UserError(
            f"{path}: model.adapter=stack adds up plain LoRA matrices, and this adapter has others "
            "(biases, DoRA, whole modules, tokens or parameters); continue or merge it"
        )
    assert isinstance(config, Model)
    fresh = fresh_config(model, config, task)
    policys = task not in ("CAUSAL_LM", own.task_type)
    own.task_type = None  # under a scorer, it has no head of its own
    adapted: Any = _loaded_adapter(
        model, path, head_left=policys, adapter_name=BELOW, is_trainable=False, config=own
    )
    fresh.base_model_name_or_path = own.base_model_name_or_path
    adapted.add_adapter(POLICY, fresh)
    for weight in adapted.parameters():
        weight.requires_grad_(False)
    for weight in weights_of(adapted, POLICY).values():
        weight.requires_grad_(True)
    unite(adapted)
    return adapted


def _loaded_adapter(
    model: Any, path: str, head_left: bool = False, adapter_name: str = POLICY, **settings: Any
) -> Any:
    """The model with a folder's adapter as peft puts it there, every tensor accounted for."""
    import peft

    with _without_warnings():
        adapted = peft.PeftModel.from_pretrained(model, path, adapter_name, **settings)
    renamed = getattr(model, "_checkpoint_conversion_mapping", {})
    weights = peft.load_peft_weights(path, device="cpu", key_mapping=renamed)
    put_weights(adapted, adapter_name, _in_place(weights, model), path, head_left)
    return adapted


def _in_place(weights: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """A policy's adapter by the names of a scorer that holds the whole language model as its trunk.

    That is so where the library has nothing smaller, as of Llama 4's wrapper.
    """
    within = model.base_model_prefix
    here = {name for name, _ in model.named_children()}
    inside = {name for name, _ in getattr(model, within, nn.Module()).named_children()}

    def moved(name: str) -> str:
        rest = name.removeprefix(PREFIX)
        first = rest.partition(".")[0]
        return f"{PREFIX}{within}.{rest}" if first in inside - here else name

    return {moved(name): value for name, value in weights.items()}


@contextmanager
def _without_warnings() -> Iterator[None]:
    """peft's warnings of what is told or seen to here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # put_weights tells
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")  # merge() unties
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set")  # it sets it itself
        yield
