"""Adapters merged into the weights of their base."""

import copy
from typing import Any

from torch import nn

from rlhf_cli.models.adapters import POLICY, below
from rlhf_cli.models.masters import unrounded


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
