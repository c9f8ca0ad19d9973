"""Adapters of several roles on one copy of the base weights, and which of them acts.

The policy's adapter is called default. Others are lent the base: reference, critic, reward. One
that the policy's is stacked on is called below, and acts wherever the policy's, its reference's or
its critic's does.
"""

import copy
import math
import re
import warnings
from collections.abc import Collection
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.time_limit import time_limit
from rlhf_cli.folders.json_forms import ADAPTER
from rlhf_cli.folders.manifest import ADAPTER_CONFIG, read_object, shapes_of
from rlhf_cli.models.decoder import matmul_in_float32
from rlhf_cli.models.masters import HELD, hold, master_of, put, unrounded
from rlhf_cli.models.nonfinite import is_finite
from rlhf_cli.models.sharding import held_whole, is_in_parts, shard_adapter
from rlhf_cli.models.shards import is_sharded, own_part
from rlhf_cli.ranks.world import world

WEIGHTS = "adapter_model.safetensors"  # what peft calls those of an adapter
PREFIX = "base_model.model."  # before the name that a layer has in the base
OUTPUT = re.compile(r"\w+\.(lora_|base_layer\.|modules_to_save\.|token_adapter\.|weight$|bias$)")
PATTERNS = (  # the fields of an adapter's config that peft searches names of layers by
    *("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "feedforward_modules", "target_parameters"),
)
POLICY, REFERENCE, CRITIC, REWARD = "default", "reference", "critic", "reward"
BELOW = "below"
# How peft draws matrices that leave the base as it is; by the others it takes something out of it.
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")


def is_adapted(model: nn.Module) -> bool:
    """Whether it is a base with adapters on it."""
    return hasattr(model, "peft_config")


def below(adapted: nn.Module) -> list[str]:
    """The name of the frozen adapter that the policy's is stacked on, if there is one."""
    return [BELOW] if BELOW in getattr(adapted, "peft_config", {}) else []


def is_fresh(adapted: Any) -> bool:
    """Whether the policy's adapter changes nothing yet: without it the model is the same.

    Its B matrices are 0 (of an embedding, A), and what it trains whole is as in the base. The rows
    that DoRA scales by their own lengths are the same but for rounding, and so count as changed.
    """
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if adapted.peft_config[POLICY].bias != "none":
        return False
    own = weights_of(adapted, POLICY)
    if any("lora_magnitude_vector" in name for name in own):
        return False
    adds = [own[name] for name in own if ".lora_B." in name or ".lora_embedding_A" in name]
    if world().any(any(own_part(each).any() for each in adds)):
        return False
    pairs: list[tuple[Tensor, Tensor]] = []
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper) and POLICY in module.modules_to_save:
            copies = module.modules_to_save[POLICY].parameters()
            pairs += zip(copies, module.original_module.parameters(), strict=True)
        if isinstance(module, TrainableTokensWrapper):
            layer = module.token_adapter
            if POLICY in layer.trainable_tokens_delta:
                ours = layer.trainable_tokens_delta[POLICY]
                pairs.append((ours, layer.trainable_tokens_original[POLICY].to(ours.dtype)))
    return world().all(
        all(torch.equal(own_part(ours).to(base.dtype), own_part(base)) for ours, base in pairs)
    )


def can_lend(adapted: Any) -> bool:
    """Whether other roles can act by adapters of their own on the policy's base.

    One that trains biases of the base itself leaves none to lend.
    """
    return bool(adapted.peft_config[POLICY].bias == "none")


def base_is_as_stored(adapted: Any) -> bool:
    """Whether the base under the policy's adapter is the model that its folder or hub id holds.

    It is not where another adapter was merged into it, where the policy's brought embeddings along,
    or where peft drew the matrices by taking something out of the weights, as PiSSA does.
    """
    config, base = adapted.peft_config[POLICY], adapted.get_base_model()
    changed = ("holds_adapter", "embeddings_in_adapter")
    if any(getattr(base, each, False) for each in changed):
        return False
    return can_lend(adapted) and config.init_lora_weights in PLAIN_STARTS


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a network that its training changes, by name.

    Of a policy that lends its base, none of the other roles' adapters.
    """
    others = set(getattr(network, "peft_config", {})) - {POLICY}
    return {
        name: weight
        for name, weight in network.named_parameters()
        if weight.requires_grad and others.isdisjoint(name.split("."))
    }


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights that training changes, in float32."""
    return {name: master_of(weight).detach().clone() for name, weight in trained(network).items()}


def restore(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put a snapshot back."""
    parameters = dict(network.named_parameters())
    for name, weight in weights.items():
        put(parameters[name], weight)


def weights_of(adapted: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The weights of one adapter, by their names without its own."""
    return {
        ".".join(part for part in name.split(".") if part != adapter): weight
        for name, weight in adapted.named_parameters()
        if adapter in name.split(".")  # those of an embedding end with it
    }


def add_adapter(adapted: Any, adapter: str, like: Any, trainable: bool = False) -> None:
    """Put another adapter on the base; what acts and what trains otherwise stays as it is.

    It has no dropout, and starts from matrices that leave the base as it is, in float32 and whole
    until `hold_adapter`.

    Args:
        like: the peft config of the new adapter.
    """
    config = copy.copy(like)
    config.lora_dropout, config.init_lora_weights, config.inference_mode = 0.0, True, False
    flags = [(weight, weight.requires_grad) for weight in adapted.parameters()]
    reads = config.use_dora or config.modules_to_save or config.trainable_token_indices
    with held_whole(adapted) if reads else nullcontext():  # norms, modules or rows of the base
        adapted.add_adapter(adapter, config)
    for weight, flag in flags:
        weight.requires_grad_(flag)
    for weight in weights_of(adapted, adapter).values():
        weight.requires_grad_(trainable)
        if weight.dtype == HELD:  # a copy of a whole module of the base
            weight.data = weight.data.float()
    unite(adapted)


def copy_adapter(adapted: nn.Module, source: str, target: str) -> None:
    """Give one adapter the weights of another of the same shape."""
    theirs = weights_of(adapted, source)
    for name, weight in weights_of(adapted, target).items():
        put(weight, master_of(theirs[name]).detach())


def hold_adapter(adapted: Any, adapter: str) -> None:
    """Hold an adapter that was added as the model is held, once it has its weights.

    What is trained of a sharded one is cut in float32, as all that is trained.
    """
    own = weights_of(adapted, adapter)
    cut = is_in_parts(adapted)
    if not matmul_in_float32(adapted):
        held = {name: each for name, each in own.items() if not (cut and each.requires_grad)}
        hold(held, trained=True)
    shard_adapter(adapted, own.values())


# --------------------------------------------------------------------------- folders


def adapter_config(path: str) -> Any:
    """What peft needs to know of an adapter folder, whose weights are safetensors.

    Raises:
        UserError: there are none; peft would read a pickle of another name instead.
    """
    import peft

    _weights_file(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unexpected keyword")  # told by unknown_settings
        return peft.PeftConfig.from_pretrained(path)


def unknown_settings(path: str, config: Any) -> list[str]:
    """What an adapter folder says that this version of peft does not know, as key=value."""
    said = read_object(Path(path) / ADAPTER_CONFIG, ADAPTER)
    return [f"{key}={value}" for key, value in said.items() if value and not hasattr(config, key)]


def check_patterns(model: nn.Module, config: Any) -> None:
    """Stop at a pattern of layers' names that never ends, as peft would search for it.

    Raises:
        ValueError: naming the pattern.
    """
    names = [name for name, _ in model.named_modules()]
    names += [name.rpartition(".")[2] for name in names]
    said = [getattr(config, key, None) for key in PATTERNS]
    patterns = {
        each for value in said for each in ([value] if isinstance(value, str) else value or ())
    }
    forms = ("{}", r"(.*\.)?({})$", r"(^|.*\.){}($|\..*)", r"(?:^|.*?\.){}\.(\d+)\.")
    for pattern in (form.replace("{}", str(each)) for each in patterns for form in forms):
        try:
            with suppress(re.error), time_limit():  # peft says where it is none
                for name in names:
                    re.match(pattern, name), re.fullmatch(pattern, name)
        except TimeoutError as error:
            raise ValueError(f"the pattern {pattern!r} of layers' names: {error}") from None


def adapter_weights(path: str) -> dict[str, Tensor]:
    """The weights of an adapter folder on the CPU, by peft's names.

    Raises:
        UserError: there are none that are safetensors.
    """
    return load_file(_weights_file(path))


@torch.no_grad()
def put_weights(
    adapted: Any, adapter: str, weights: dict[str, Tensor], path: str, head_left: bool = False
) -> None:
    """Give an adapter the weights of a folder: each of its tensors gets one, and none is left over.

    Args:
        weights: by peft's names, all finite.
        head_left: the two may have other output layers: a policy's adapter under a scorer's head.

    Raises:
        UserError: naming a tensor that the folder lacks, or that is none of this adapter's.
    """
    own = saved_weights(adapted, adapter)
    weights = _without_copies(weights, own.keys())
    if head_left:
        own = {name: weight for name, weight in own.items() if not _is_of_output(name)}
    for weight in own.values():
        if weight.is_floating_point():
            own_part(weight).fill_(math.nan)  # what is not overwritten by a finite one shows
    if any(map(is_sharded, own.values())):
        for name in own.keys() & weights.keys():
            put(own[name], weights[name])
        unknown = weights.keys() - own.keys()
    else:
        unknown = _unknown_to_peft(adapted, weights, adapter)
    missing = sorted(name for name, weight in own.items() if not is_finite(weight))
    if head_left:
        unknown = {name for name in unknown if not _is_of_output(name)}
    if not missing and not unknown:
        return
    found = [
        f"{len(names)} tensors {what}, such as {names[0].replace(f'.{adapter}.', '.')}"
        for names, what in ((missing, "missing"), (sorted(unknown), "of layers that are not there"))
        if names
    ]
    raise UserError(
        f"{path}: the adapter does not fit its base: {'; '.join(found)}; make or download the "
        f"folder again, or name its own base in {ADAPTER_CONFIG}"
    )


def _unknown_to_peft(adapted: Any, weights: dict[str, Tensor], adapter: str) -> set[str]:
    """Give an adapter weights by peft's own way; returns the names that it has no place for."""
    import peft

    try:
        result: Any = peft.set_peft_model_state_dict(adapted, weights, adapter)
    except KeyError:  # of a head: peft looks for that by its name
        return set()
    return set(result.unexpected_keys)


def holds_embeddings(path: str, base: Any) -> bool:
    """Whether an adapter folder holds other embeddings than its base, beside its adapter.

    peft saves those that were resized, and those that LoRA matrices are on. The ones that are
    trained whole are the adapter's own.
    """
    said = read_object(Path(path) / ADAPTER_CONFIG, ADAPTER).get("modules_to_save")
    whole = tuple(f".{name}" for name in said or ())
    for name, held in _tables(path, base).items():
        ours = base.get_submodule(name).weight
        theirs = adapter_weights(path)[held].to(ours.device, ours.dtype)
        if not f".{name}".endswith(whole) and not torch.equal(ours, theirs):
            return True
    return False


def rows_held(path: str, base: Any) -> int:
    """The rows of the embeddings that an adapter folder holds; 0 where it holds none."""
    shapes = shapes_of(Path(path))
    return max((shapes[held][0] for held in _tables(path, base).values()), default=0)


def _tables(path: str, base: Any) -> dict[str, str]:
    """The names of whole embeddings in an adapter folder, by those of their layers in the base."""
    ends = {id(base.get_input_embeddings()), id(base.get_output_embeddings())}
    names = [name for name, module in base.named_modules() if id(module) in ends]
    held = shapes_of(Path(path))
    inside = ("", ".base_layer", ".token_adapter.base_layer")  # under adapters of their own
    found = [(name, f"{PREFIX}{name}{part}.weight") for name in names for part in inside]
    return {name: weight for name, weight in found if weight in held}


def _without_copies(weights: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """The weights of a folder without what peft writes twice of embeddings that were resized.

    Beside the weights of an adapter those are all that their modules hold: the weights once more,
    and those that they replaced.
    """
    ours = [weights[name] for name in weights if name in own]
    twice = {
        name
        for name, weight in weights.items()
        if name not in own
        and re.search(r"\.(modules_to_save|token_adapter)\.", name)
        and any(torch.equal(weight, each) for each in ours)
    }
    return {
        name: weight
        for name, weight in weights.items()
        if name not in twice and ".original_module." not in name
    }


def saved_weights(adapted: Any, adapter: str) -> dict[str, Tensor]:
    """The tensors of one adapter as they are, heads included, by the names that peft saves."""
    import peft

    own: dict[str, Tensor] = peft.get_peft_model_state_dict(
        adapted, adapter_name=adapter, save_embedding_layers=False
    )
    return own


def _is_of_output(name: str) -> bool:
    """Whether a tensor belongs to a layer beside the decoder, as an unembedding is."""
    return OUTPUT.match(name.removeprefix(PREFIX)) is not None


def _weights_file(path: str) -> Path:
    file = Path(path) / WEIGHTS
    if not file.is_file():
        raise UserError(f"{path}: no {WEIGHTS} in this folder; no other weights are read")
    return file


# --------------------------------------------------------------------------- which one acts


def unite(adapted: Any) -> None:
    """Let all layers read the names of the acting adapters from one list, `adapted.acting`.

    peft's own switch walks through the whole model and changes which weights train, so that
    backward would drop the gradient of an adapter that acted in forward. This one is an assignment.
    Modules that are trained whole know no adapter below, and have a list of their own without it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if not hasattr(adapted, "acting"):
        adapted.acting, adapted.acting_whole = [*below(adapted), POLICY], [POLICY]
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            module._active_adapter = adapted.acting
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module._active_adapter = adapted.acting_whole


class Acting:
    """A block in which other adapters act: some, or none, which leaves the base alone."""

    def __init__(self, adapted: Any, *adapters: str) -> None:
        self._names: list[str] = adapted.acting
        self._whole: list[str] = adapted.acting_whole
        self._inside = list(adapters)
        self._outside: list[str] = []

    def __enter__(self) -> None:
        self._outside = list(self._names)
        self._put(self._inside)

    def __exit__(self, *error: object) -> None:
        self._put(self._outside)

    def _put(self, names: list[str]) -> None:
        self._names[:] = names
        self._whole[:] = [name for name in names if name != BELOW]


# --------------------------------------------------------------------------- merged


def merged_copy(adapted: nn.Module) -> nn.Module:
    """A copy of the model with what acts of the policy merged into its weights."""
    return merge(copy.deepcopy(adapted, unrounded(adapted)), [*below(adapted), POLICY])


def merge(adapted: Any, adapters: list[str]) -> nn.Module:
    """The base with adapters merged into its weights; those of other roles are dropped.

    An unembedding that is tied to the embeddings is cut loose where the adapter changes one of them
    alone: merged into a weight that both hold, it would change the other, too.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    base = adapted.get_base_model()
    ends: list[Any] = [base.get_input_embeddings(), base.get_output_embeddings()]
    layers = [each.base_layer if hasattr(each, "base_layer") else each for each in ends]
    changed = any(
        isinstance(each, BaseTunerLayer) and not isinstance(each, TrainableTokensLayer)
        for each in ends
    )
    if changed and layers[1] is not None and layers[1].weight is layers[0].weight:
        layers[1].weight = nn.Parameter(layers[1].weight.detach().clone())
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module._active_adapter = [name for name in adapters if name in module.modules_to_save]
            if module._active_adapter:  # unloading looks it up as a text
                (module._active_adapter,) = module._active_adapter
    whole: Any = adapted.merge_and_unload(adapter_names=adapters)
    first, last = whole.get_input_embeddings(), whole.get_output_embeddings()
    if last is not None and last.weight is not first.weight:
        whole.config.get_text_config().tie_word_embeddings = False
        whole.config.tie_word_embeddings = False
    return whole
