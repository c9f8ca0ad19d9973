"""The shapes of the models of a run, from the headers of their folders and without torch."""

import math
import re
from pathlib import Path
from typing import Any

from rlhf_cli.config.schema.models import SftModel
from rlhf_cli.folders.cached import folder_of
from rlhf_cli.folders.geometry import BLOCK, TABLE, Geometry
from rlhf_cli.folders.manifest import Shapes, adapter_base, read_config, shapes_of

BYTES = 4  # of a number in float32
HEADS = ("score.", "classifier.")
EMBEDDINGS = re.compile(r"(embed_tokens|embeddings|wte)\.weight$")
UNEMBEDDING = re.compile(r"(^|\.)(lm_head|embed_out)\.")


class Unknown(Exception):
    """Why sizes are not known: a model is not on this machine, or its config is silent."""


def start_of(cfg: Any) -> tuple[Shapes, Geometry]:
    """The shapes and widths of the model that a stage starts from.

    Raises:
        Unknown: it is not on this machine, or its config is silent.
    """
    if cfg.start is None:
        return from_scratch(cfg.model)
    return base_shapes(cfg.start), geometry_of(cfg.start)


def geometry_of(path: str) -> Geometry:
    """The widths of a folder's decoder.

    Raises:
        Unknown: its config says none.
    """
    try:
        return Geometry.of(read_config(folder_of(adapter_base(path) or path)))
    except KeyError as missing:
        raise Unknown(f"for {path}: its config.json says no {missing.args[0]}") from None


def base_shapes(path: str) -> Shapes:
    """The shapes of a full model, or of the base of an adapter folder.

    Raises:
        Unknown: it is not on this machine.
    """
    shapes = shapes_of(folder_of(adapter_base(path) or path))
    if not shapes:
        raise Unknown(f"until {path} is on this machine")
    return shapes


def adapter_shapes(path: str) -> Shapes:
    """The shapes of an adapter folder's own weights."""
    return shapes_of(Path(path))


def from_scratch(model: SftModel) -> tuple[Shapes, Geometry]:
    """What models/scratch.py builds."""
    assert model.hidden_size and model.layers and model.vocab_size and model.heads
    d, inner = model.hidden_size, model.hidden_size * 8 // 3
    shapes: Shapes = {"model.embed_tokens.weight": (model.vocab_size, d)}
    for i in range(model.layers):
        block = f"model.layers.{i}."
        shapes |= {f"{block}self_attn.{name}_proj.weight": (d, d) for name in "qkvo"}
        shapes |= {f"{block}mlp.{name}_proj.weight": (inner, d) for name in ("gate", "up", "down")}
        shapes |= {f"{block}norms.weight": (2 * d,)}
    return shapes, Geometry(
        model.layers, d, d, inner, model.vocab_size, model.heads, model.layers, False
    )


def count(shapes: Shapes) -> int:
    """How many numbers there are."""
    return sum(math.prod(shape) for shape in shapes.values())


def trunk_of(shapes: Shapes) -> Shapes:
    """A model without its unembedding."""
    return {name: shape for name, shape in shapes.items() if not UNEMBEDDING.search(name)}


def of_text(shapes: Shapes) -> Shapes:
    """A model without its towers, which get no adapter."""
    towers = towers_of(shapes)
    return {name: shape for name, shape in shapes.items() if name not in towers}


def towers_of(shapes: Shapes) -> Shapes:
    """What text does not pass through in a model that sees or hears, which is never trained.

    The decoder holds the token embeddings, the longest matrix outside all blocks among those that
    are called so, and blocks of its own; blocks beside it are an encoder of something else, and the
    rest is that one's projector.
    """
    free = [name for name in trunk_of(shapes) if not (BLOCK.search(name) or TABLE.search(name))]
    matrices = [name for name in free if len(shapes[name]) == 2 and not name.startswith(HEADS)]
    if not matrices:
        return {}
    tables = [name for name in matrices if EMBEDDINGS.search(name)] or matrices
    embeddings = max(tables, key=lambda name: shapes[name][0])
    blocks = [name for name in shapes if BLOCK.search(name)]
    decoder = embeddings.removesuffix("weight")
    while decoder and not any(name.startswith(decoder) for name in blocks):
        decoder = decoder[: decoder.rstrip(".").rfind(".") + 1]
    beside = {
        name: shape
        for name, shape in trunk_of(shapes).items()
        if not name.startswith((decoder, *HEADS))
    }
    return beside if any(map(BLOCK.search, beside)) else {}


def frozen_of(shapes: Shapes, layers: int) -> Shapes:
    """Towers, and the embeddings and the lowest blocks, if any are frozen."""
    towers = towers_of(shapes)
    if not layers:
        return towers
    return towers | {
        name: shape
        for name, shape in trunk_of(shapes).items()
        if (int(match[1]) < layers if (match := BLOCK.search(name)) else len(shape) == 2)
        and not name.startswith(HEADS)
    }
