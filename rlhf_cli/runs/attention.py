"""How the model of a run will compute attention, told before it is loaded.

`eager` holds a matrix of tokens by tokens for each head; transformers falls back to it in silence
where a family has nothing better.
"""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf_cli.config.schema.keys import AUTO
from rlhf_cli.config.schema.models import EAGER, SDPA
from rlhf_cli.config.schema.stages import Run
from rlhf_cli.folders.cached import folder_of
from rlhf_cli.folders.geometry import decoder_of
from rlhf_cli.folders.manifest import adapter_base, read_config

HAS_SDPA = re.compile(r"^\s+_supports_sdpa\b.*=\s*True", re.MULTILINE)


def predicted_attention(cfg: Run) -> str:
    """As transformers calls it; sdpa where this machine does not know the family."""
    model: Any = cfg.model
    if model.attention != AUTO:
        return str(model.attention)
    if cfg.start is None:
        return SDPA
    kind = decoder_of(read_config(folder_of(adapter_base(cfg.start) or cfg.start))).get(
        "model_type"
    )
    return EAGER if isinstance(kind, str) and not has_sdpa(kind) else SDPA


def attention_lines(attention: str, asked: str) -> list[str]:
    """What is said of an attention that is not the usual one."""
    if attention == SDPA:
        return []
    why = "the family has no sdpa" if asked == AUTO else "as asked"
    holds = "; it holds tokens x tokens of every head" if attention == EAGER else ""
    return [f"model.attention: {attention} ({why}{holds})"]


@cache
def has_sdpa(kind: str) -> bool:
    """Whether transformers' code of a `model_type` says so; true of what it has no code for.

    Its source is read, since to import it is to import torch.
    """
    package = find_spec("transformers")
    assert package is not None and package.origin is not None
    name = kind.replace("-", "_")
    for family in (name, name.removesuffix("_text")):
        source = Path(package.origin).parent / "models" / family / f"modeling_{family}.py"
        if source.is_file():
            return HAS_SDPA.search(source.read_text(encoding="utf-8")) is not None
    return True
