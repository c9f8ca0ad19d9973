"""What roles share with the policy: its base and its frozen layers."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf_cli.config.errors import UserError
from rlhf_cli.folders.manifest import content_hash
from rlhf_cli.models.adapter_folders import (
    PREFIX,
    WEIGHTS,
    adapter_config,
    adapter_weights,
    check_patterns,
    put_weights,
    saved_weights,
)
from rlhf_cli.models.adapters import (
    PLAIN_STARTS,
    POLICY,
    Acting,
    add_adapter,
    base_is_as_stored,
    below,
    copy_adapter,
    hold_adapter,
    weights_of,
)
from rlhf_cli.models.decoder import passing, trunk, unwrap
from rlhf_cli.models.dropout import blocks_of
from rlhf_cli.models.heads import HEAD_NAMES
from rlhf_cli.models.masters import held_as


class SharedScorer(nn.Module):
    """A reward model or critic that is an adapter on the policy's base, and a head of its own.

    Its parameters are those of its adapter and head only. Its adapter acts during its own pass,
    and whichever acted before does so again after it.
    """

    base_model_prefix = "trunk"  # models/forward.py runs it as it runs any decoder

    def __init__(
        self, adapted: nn.Module, adapter: str, head: nn.Linear, under: list[str] | None = None
    ) -> None:
        """`under`: adapters that act beneath its own."""
        super().__init__()
        self._lender = (adapted,)  # in a tuple it is no part of this module
        self.adapter = adapter
        self.acting = [*(under or []), adapter]
        own = weights_of(adapted, adapter)
        self.weights = nn.ParameterDict({name.replace(".", "/"): own[name] for name in own})
        self.score = head

    @property
    def lender(self) -> nn.Module:
        """The policy, whose base it is on."""
        return self._lender[0]

    def trunk(self, **inputs: Tensor) -> Any:
        """The decoder's output under this scorer's adapter."""
        with Acting(self.lender, *self.acting):
            return passing(self.lender)(**inputs)

    @property
    def config(self) -> Any:
        """That of the base."""
        return unwrap(self.lender).config

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of matrix products, which is the policy's."""
        dtype: torch.dtype = unwrap(self.lender).compute_dtype
        return dtype

    def get_input_embeddings(self) -> nn.Module:
        """Those of the base."""
        embeddings: nn.Module = unwrap(self.lender).get_input_embeddings()
        return embeddings


def scorer_on_base(
    adapted: nn.Module, path: str, base: str, adapter: str, trainable: bool
) -> SharedScorer | None:
    """The scorer of an adapter folder, on the base that the policy has loaded already.

    Args:
        base: the base that the folder names.
        adapter: what its adapter is to be called.

    Returns:
        None where the folder needs weights of its own: another base, or trained biases, embeddings
        or other modules beside its LoRA matrices and head; or where the policy's base is not as it
        was stored.
    """
    import peft

    config = adapter_config(path)
    check_patterns(adapted, config)
    if not same_model(base, str(unwrap(adapted).config._name_or_path)):
        return None
    if config.peft_type != peft.PeftType.LORA or config.bias != "none":
        return None
    if not base_is_as_stored(adapted) or config.init_lora_weights not in PLAIN_STARTS:
        return None
    policys: Any = adapted
    ours = policys.peft_config[POLICY]
    if ours.trainable_token_indices or {*(ours.target_parameters or [])} ^ {
        *(config.target_parameters or [])
    }:
        return None
    weights = adapter_weights(path)
    lora = {name: value for name, value in weights.items() if ".lora_" in name}
    heads = {name.removeprefix(PREFIX).rpartition(".")[0] for name in weights.keys() - lora.keys()}
    layers = {name.split(".lora_")[0] for name in lora}
    known = {name for name, _ in adapted.named_modules()}
    if len(heads) != 1 or not heads <= set(HEAD_NAMES) or not layers <= known:
        return None
    score = {name.split(".")[-1]: weights[name] for name in weights.keys() - lora.keys()}
    if "weight" not in score or len(score["weight"]) != 1:
        return None

    config.modules_to_save, config.task_type = None, "CAUSAL_LM"
    if config.exclude_modules == heads:  # a language model has none to exclude
        config.exclude_modules = None
    add_adapter(adapted, adapter, config, trainable)
    head = nn.Linear(score["weight"].shape[1], 1, bias="bias" in score)
    head.load_state_dict(score)
    put_weights(adapted, adapter, lora, path, head_left=True)
    hold_adapter(adapted, adapter)
    return SharedScorer(adapted, adapter, head.to(next(adapted.parameters()).device))


def critic_on_base(adapted: Any, adapter: str, head: nn.Linear) -> SharedScorer:
    """A critic that starts with the policy's adapter as it is now, but for an unembedding."""
    like = copy.copy(adapted.peft_config[POLICY])
    output = unwrap(adapted).get_output_embeddings()
    names = {name.rpartition(".")[2] for name, each in adapted.named_modules() if each is output}
    like.modules_to_save = [name for name in like.modules_to_save or [] if name not in names]
    add_adapter(adapted, adapter, like, trainable=True)
    copy_adapter(adapted, POLICY, adapter)
    hold_adapter(adapted, adapter)
    device = next(adapted.parameters()).device
    return SharedScorer(adapted, adapter, head.to(device), below(adapted))


def save_scorer(
    scorer: SharedScorer, origin: str, folder: Path, dtype: torch.dtype | None = None
) -> None:
    """The adapter folder that a scorer came from, with the weights that it has now.

    Args:
        dtype: of the weights on disk; None: each has that of the one in whose place it comes.
    """
    with held_as(torch.float32, scorer.weights.values()):
        own = saved_weights(scorer.lender, scorer.adapter)
    head = scorer.score.state_dict()
    now = {
        name: (own[name].detach() if name in own else head[name.split(".")[-1]]).to(
            dtype or before.dtype
        )
        for name, before in adapter_weights(origin).items()
    }
    adapter_config(origin).save_pretrained(str(folder))
    save_file({name: value.cpu().contiguous() for name, value in now.items()}, folder / WEIGHTS)


def same_model(one: str, other: str) -> bool:
    """Whether two folders hold the same weights, or two hub ids are equal."""
    if one == other or Path(one).resolve() == Path(other).resolve():
        return True
    local = Path(one).is_dir() and Path(other).is_dir()
    return local and content_hash(one) == content_hash(other)


# --------------------------------------------------------------------------- frozen layers


def freeze_lowest(model: nn.Module, layers: int) -> None:
    """Leave the embeddings and the lowest decoder blocks untrained.

    Raises:
        UserError: the model has fewer blocks.
    """
    decoder, blocks = trunk(model), blocks_of(model)
    if layers > len(blocks):
        raise UserError(f"model.frozen_layers={layers}, but the model has {len(blocks)} blocks")
    inside = {module for block in blocks for module in block.modules()}
    embeddings = [
        module
        for module in decoder.modules()
        if isinstance(module, nn.Embedding) and module not in inside
    ]
    for module in [*embeddings, *blocks[:layers]]:
        module.requires_grad_(False)


def share_frozen(model: nn.Module, policy: nn.Module) -> None:
    """Let a model hold the policy's own tensors wherever the policy's are frozen and equal."""
    ours = dict(model.named_parameters())
    for name, weight in policy.named_parameters():
        if not weight.requires_grad and name in ours and torch.equal(ours[name], weight):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, weight)
