"""What the passes of an update take: activations, logits, what of sharded weights is gathered."""

import math
from typing import Any

from rlhf_cli.config.stages import facts_of
from rlhf_cli.folders.cached import folder_of
from rlhf_cli.folders.geometry import BLOCK, Geometry, decoder_of
from rlhf_cli.folders.linear_shapes import expert_numbers
from rlhf_cli.folders.manifest import Shapes, adapter_base, read_config
from rlhf_cli.runs.model_sizes import BYTES, count, of_text, trunk_of

Parts = dict[str, float]
"""Bytes by what takes them."""

# Tensors of the size of a chunk's logits at the peak of backward. Of a plain head, in its own
# backward pass (models/logprob_head.py): the logits, and those of a reference. Of another one, as
# measured: of log-probs, and how many more an entropy in the loss and the KL over the whole
# vocabulary take.
PLAIN, PLAIN_KL = 1, 1
LOG_PROBS, ENTROPY, FULL_KL = 3, 2, 3
# What configs call that which is done to logits beside the product.
DONE_TO_LOGITS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)


def activations(
    cfg: Any, geometry: Geometry, tokens: int, width: int = BYTES, share: float | None = None
) -> float:
    """Bytes that backward needs of one pass through a decoder.

    A token leaves in each block 8 hidden vectors (inputs and outputs of norms and projections), 2
    of the width of keys, and 4 of the feed-forward; attention by sdpa leaves no matrix of tokens by
    tokens. Frozen blocks leave nothing. Recomputed ones leave their input, and one is whole at a
    time. One more block stands for the gradients of activations.

    Args:
        share: of the blocks that are recomputed; None is what the config says, where auto is none.
    """
    block = 8 * geometry.hidden + 2 * geometry.keys + 4 * geometry.inner
    blocks = geometry.layers - cfg.model.frozen_layers
    again = math.ceil(blocks * (share_of(cfg) if share is None else share))
    whole = blocks - again + 1 + (again > 0)
    return width * tokens * (again * geometry.hidden + whole * block)


def share_of(cfg: Any) -> float:
    """The share of blocks that a config has recomputed from the start."""
    return float(cfg.hardware.gradient_checkpointing is True)


def attention_matrices(
    cfg: Any, geometry: Geometry, tokens: int, longest: int, width: int = BYTES
) -> float:
    """Bytes of what eager attention keeps for backward: a number for each head and pair of tokens.

    Each attending block that is trained keeps one such matrix, and one more where scores are
    capped. Two more stand for the gradients in one block.
    """
    kept = 2 if geometry.capped else 1
    blocks = max(0, geometry.attending - cfg.model.frozen_layers)
    if share_of(cfg):
        blocks = min(blocks, 1)
    return width * geometry.heads * tokens * longest * (kept * blocks + 2)


def adapted_experts(cfg: Any, shapes: Shapes, layers: int) -> float:
    """Bytes of the sums of experts and their adapters, which backward needs.

    peft adapts what holds several experts by such a sum: one for each layer, and another for its
    gradient; where blocks are recomputed there is one layer's at a time.
    """
    kept = 1 if share_of(cfg) else layers
    return BYTES * expert_numbers(trunk_of(shapes)) * (kept + 1) / layers


def of_the_head(cfg: Any, geometry: Geometry, chunk: int, several: bool, width: int) -> Parts:
    """Bytes of a chunk's logits and, where the unembedding is trained, of the gradient that one of
    several micro-batches adds.
    """
    if facts_of(cfg).writes == "reward":  # which has scores in place of logits
        return {}
    copies = _logit_copies(cfg) + (width < BYTES) / 2  # their gradient in the type of the product
    parts = {f"logits of {chunk} positions": copies * BYTES * chunk * geometry.vocabulary}
    if several and not cfg.model.lora_rank and not cfg.model.frozen_layers:
        part = BYTES * geometry.hidden * geometry.vocabulary
        parts["gradient of the unembedding from a micro-batch"] = part
    return parts


def _logit_copies(cfg: Any) -> int:
    """Tensors of the size of a chunk's logits that exist at once."""
    online = cfg.samples_online
    full = online and cfg.algo.kl_in == "loss" and cfg.algo.kl_estimator == "full"
    if has_plain_head(cfg):
        return PLAIN + PLAIN_KL * full
    return LOG_PROBS + ENTROPY * (online and cfg.algo.entropy_coef > 0) + FULL_KL * full


def has_plain_head(cfg: Any) -> bool:
    """Whether logits are a plain product with the hidden states, by the words of the config."""
    if cfg.start is None:
        return True
    config = decoder_of(read_config(folder_of(adapter_base(cfg.start) or cfg.start)))
    return not any(config.get(name) for name in DONE_TO_LOGITS)


def gathered(cfg: Any, shapes: Shapes, width: int, graphs: int) -> Parts:
    """Bytes of what a rank gathers in an update where weights are sharded, and of its gradient.

    What is beside the blocks stays for a whole pass; of the blocks there are two, as the next one
    is fetched early. A gradient is summed over the ranks in float32.

    Args:
        graphs: networks that are in a pass together.
    """
    text = of_text(shapes)
    blocks: dict[int, int] = {}
    for name, shape in text.items():
        if match := BLOCK.search(name):
            blocks[int(match[1])] = blocks.get(int(match[1]), 0) + math.prod(shape)
    rest, block = count(text) - sum(blocks.values()), max(blocks.values(), default=0)
    parts = {"weights that are gathered for a pass": width * (graphs * rest + 2.0 * block)}
    if not cfg.model.lora_rank:
        parts["gradients before they are shared out"] = (width + BYTES) * float(max(rest, block))
    return parts
