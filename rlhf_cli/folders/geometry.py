"""What a model's config says of its decoder, by whatever name: positions, blocks and their widths.

Told without torch. Every family has names of its own for the same sizes, some as a list with one
for each block; what is not said is unknown here, and no error.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from rlhf_cli.folders.manifest import Shapes

BLOCK = re.compile(r"\.(\d+)\.")  # the number of a block in the name of a weight
TABLE = re.compile(r"wpe|pos", re.IGNORECASE)  # in the name of a table of positions
DECODERS = ("text_config", "llm_config", "language_config", "thinker_config", "decoder")
POSITIONS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length"),
    *("max_seq_length", "model_max_length", "max_context_length", "context_length", "n_ctx"),
)
STRETCHED = ("linear", "dynamic", "yarn")  # kinds of RoPE whose factor is not in `positions` yet

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers")
HIDDEN = ("hidden_size", "n_embd", "d_model", "n_embed", "model_dim", "dim")
HEADS = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
    "num_query_heads",
)
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_n_heads", "n_head_kv")
HEAD = ("head_dim", "attention_head_dim", "kv_channels")
INNER = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size", "block_ff_dim")
EXPERT = ("moe_intermediate_size", *INNER)
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts")
KINDS = ("layer_types", "layers_block_type", "block_types")
STATES = ("state_size", "mamba_d_state", "ssm_state_size")


def decoder_of(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that is about the decoder: all of it, but in models that also see."""
    inner = next((config[name] for name in DECODERS if isinstance(config.get(name), dict)), None)
    return config if inner is None else decoder_of(inner)


def context_of(config: dict[str, Any], shapes: Shapes | None = None) -> int | None:
    """The longest sequence that a model takes, in tokens; None where nothing limits it.

    Attention that is biased by distance (ALiBi) and layers of state alone have no limit. RoPE that
    is stretched has that of its factor. Where the config has no name for it, a learned table of
    positions among the weights is as long as it is.

    Args:
        shapes: of the weights, by name.
    """
    decoder = decoder_of(config)
    if decoder.get("alibi") is True:
        return None
    said = (decoder.get(name) for name in POSITIONS)
    positions = next((int(size) for size in said if _is_size(size)), None)
    if positions is not None:
        return max(positions, _stretched(decoder))
    if decoder is not config:
        return None  # tables of other parts would be taken for the decoder's
    width = _size(decoder, HIDDEN)
    tables = (
        shape[0]
        for name, shape in (shapes or {}).items()
        if len(shape) == 2 and shape[1] == width and TABLE.search(name) and not BLOCK.search(name)
    )
    return min(tables, default=None)


def _stretched(decoder: dict[str, Any]) -> int:
    """Positions that RoPE is stretched to from those of its training; 0 where it is not."""
    scaling = decoder.get("rope_parameters") or decoder.get("rope_scaling")
    if not isinstance(scaling, dict):
        return 0
    before, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind in STRETCHED and _is_size(before) and _is_size(factor):
        return int(before * factor)
    return 0


@dataclass
class Geometry:
    """The widths of a decoder, in numbers per token; of blocks that differ, the mean.

    attending: its blocks that attend to other tokens, by `heads` heads.
    capped: whether scores of attention are capped, as Gemma 2 does.
    """

    layers: int
    hidden: int
    keys: int
    inner: int
    vocabulary: int
    heads: int
    attending: int
    capped: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Geometry":
        """From config.json.

        Raises:
            KeyError: a size is not said, or there are layers that hold a state of another size.
        """
        decoder = decoder_of(config)
        if _size(decoder, STATES) is not None:
            raise KeyError("sizes of what its state-space layers keep")
        nested = {**_inside(decoder, "attn_config"), **_inside(decoder, "ffn_config"), **decoder}
        layers, hidden = blocks_of(config), _size(nested, HIDDEN)
        vocabulary = _size(decoder, ("vocab_size",))
        if layers is None or hidden is None or vocabulary is None:
            raise KeyError("sizes that are known here")
        heads = _size(nested, HEADS) or 0
        per_head = _size(nested, HEAD) or (hidden // heads if heads else 0)
        key_heads = 1 if nested.get("multi_query") is True else _size(nested, KEY_HEADS) or heads
        inner = _size(nested, INNER) or hidden * (_size(nested, ("expansion_ratio",)) or 4)
        if chosen := _size(nested, CHOSEN):
            inner = chosen * (_size(nested, EXPERT) or inner)
        attending = layers if heads else 0
        if kinds := kinds_of(decoder):
            attending = min(layers, sum(map(_attends, kinds)))
        capped = _size(decoder, ("attn_logit_softcapping",)) is not None
        return cls(
            layers, hidden, per_head * key_heads, inner, vocabulary, heads, attending, capped
        )


def blocks_of(config: dict[str, Any]) -> int | None:
    """How many blocks a decoder has; None where its config does not say."""
    decoder = decoder_of(config)
    return _size(decoder, LAYERS) or len(kinds_of(decoder)) or None


def kinds_of(decoder: dict[str, Any]) -> Sequence[str]:
    """What each block is, where a config says it of each."""
    said: list[Any]
    said = next((decoder[name] for name in KINDS if isinstance(decoder.get(name), list)), [])
    return [kind for kind in said if isinstance(kind, str)]


def _attends(kind: str) -> bool:
    return ("attention" in kind and "linear" not in kind) or kind == "hybrid"


def _inside(decoder: dict[str, Any], name: str) -> dict[str, Any]:
    part = decoder.get(name)
    return part if isinstance(part, dict) else {}


def _size(config: dict[str, Any], names: Sequence[str]) -> int | None:
    """The first of these sizes that a config says; of a list for each block, the mean."""
    for name in names:
        said = config.get(name)
        if _is_size(said):
            return int(said)
        if isinstance(said, list) and (sizes := [each for each in said if _is_size(each)]):
            return round(sum(sizes) / len(said))
    return None


def _is_size(value: Any) -> TypeGuard[float]:
    """Whether a value is a number that can be a size or a factor of one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value > 0
