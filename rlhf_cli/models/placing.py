"""A loaded model on its device, in the type that it computes in; of a sharded run, its parts."""

import re
from typing import Any

import torch
from torch import nn

from rlhf_cli.config.schema.models import FrozenModel, Model
from rlhf_cli.models.adapters import BELOW, can_lend, is_adapted
from rlhf_cli.models.decoder import trunk, unwrap
from rlhf_cli.models.heads import head_name
from rlhf_cli.models.masters import HELD, hold, sum_uses_in_float32
from rlhf_cli.models.quantized import compute_in_bfloat16
from rlhf_cli.models.sharding import shard
from rlhf_cli.ranks.world import world

FLOAT32 = "_keep_in_fp32_modules_strict"  # how classes of transformers name weights that stay so


def place(model: nn.Module, config: FrozenModel, dtype: torch.dtype, device: torch.device) -> None:
    """Move a model to its device, in the type that it computes in; of a sharded run, its parts.

    In bfloat16 scalar heads stay float32, as scores would be rounded into ties, and so do the few
    weights that transformers keeps so. What is not trained has float32 values beside it only where
    it is written.
    """

    def prepare() -> None:
        unwrap(model).compute_dtype = dtype
        if dtype == torch.bfloat16:
            _compute_in_bfloat16(model)

    def narrow(group: nn.Module) -> None:
        if dtype == torch.bfloat16:
            _narrow(model, group, config, device)

    if world().mesh is None:
        narrow(model)
        prepare()
        model.to(device)
        return
    copied = isinstance(config, Model) and not (is_adapted(model) and can_lend(model))
    shard(model, device, dtype, _heads_and_norms(model), prepare, narrow, copied)


def _narrow(model: nn.Module, group: nn.Module, config: FrozenModel, device: torch.device) -> None:
    """Hold in bfloat16 what is computed with in it of a group of a model's modules.

    Not what is to be sharded and trained, or written: its parts stay float32, and are cast as they
    are gathered.
    """
    base = unwrap(model)
    whole = isinstance(config, Model) and (
        not is_adapted(model) or config.merge_lora or base.embeddings_in_adapter
    )

    def written(name: str) -> bool:
        return whole or BELOW in name.split(".")

    spared = {id(weight) for weight in _heads_and_norms(model)}
    if world().mesh is not None:
        spared |= {
            id(weight)
            for name, weight in group.named_parameters()
            if (isinstance(config, Model) and weight.requires_grad) or written(name)
        }
    hold(
        {name: weight for name, weight in group.named_parameters() if id(weight) not in spared},
        trained=isinstance(config, Model),
        written=written,
        device=device,
    )


def _compute_in_bfloat16(model: nn.Module) -> None:
    """Let what is beside the weights follow their type."""
    base = unwrap(model)
    for part in trunk(model).children():  # a table of positions is added to embeddings (XGLM)
        for buffer in part.buffers(recurse=False):
            if buffer.ndim == 2 and buffer.dtype == torch.float32:
                buffer.data = buffer.to(HELD)
    compute_in_bfloat16(model)
    if head_of(base) is None and (unembedding := base.get_output_embeddings()) is not None:
        sum_uses_in_float32(unembedding.parameters())


def head_of(base: Any) -> nn.Module | None:
    """The scalar head of a classifier."""
    head: nn.Module | None = getattr(base, head_name(base) or "", None)
    return head


def _heads_and_norms(model: nn.Module) -> list[nn.Parameter]:
    """The weights that stay float32 in bfloat16: scalar heads, and what transformers keeps so."""
    base = unwrap(model)
    head = head_of(base)
    always = [re.escape(each) for each in getattr(base, FLOAT32, None) or ()]
    kept = re.compile("|".join(rf"(^|\.){each}(\.|$)" for each in always) or "(?!)")
    named = [weight for name, weight in base.named_parameters() if kept.search(name)]
    return [*(() if head is None else head.parameters()), *named]
