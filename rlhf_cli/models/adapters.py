"""Adapters of several roles on one copy of the base weights, and which of them acts.

The policy's adapter is called default. Others are lent the base: reference, critic, reward. One
that the policy's is stacked on is called below, and acts wherever the policy's, its reference's or
its critic's does.
"""

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_cli.models.decoder import matmul_in_float32
from rlhf_cli.models.masters import HELD, hold, master_of, put
from rlhf_cli.models.sharding import held_whole, is_in_parts, shard_adapter
from rlhf_cli.models.shards import own_part
from rlhf_cli.ranks.world import world

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
