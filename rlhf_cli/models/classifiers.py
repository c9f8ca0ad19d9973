"""Which class a reward model is loaded as, and which of its folder's weights are its head."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.utils.hub import cached_file

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.models import FrozenModel
from rlhf_cli.data.batches import collate
from rlhf_cli.data.items import Tokens
from rlhf_cli.folders.manifest import (
    RESPONSE,
    SCALAR_HEADS,
    adapter_base,
    scalar_heads,
    shapes_of,
    weight_files,
)
from rlhf_cli.models.adapter_folders import PREFIX
from rlhf_cli.models.adapting import own_names
from rlhf_cli.models.decoder import hidden_states, plain_ids
from rlhf_cli.models.heads import head_name, scalar_head
from rlhf_cli.models.load import load_base
from rlhf_cli.models.loading_faults import check_finite, told
from rlhf_cli.models.scalar_head import (
    ScalarHeadForSequenceClassification,
    ScalarHeadForTokenClassification,
)
from rlhf_cli.reporting.console import say

NEEDED = "a reward model is one linear layer to one label on the last states of a decoder"
SHOWN = 4  # names in a line
ROUNDING = 1e-3  # of scores that another kernel computes, relative to the whole


def load_classifier(
    path: str, config: FrozenModel, level: str, fresh: bool = False
) -> tuple[Any, str]:
    """The decoder of a folder under a scalar head, and peft's name of its task.

    Of whole responses it is a sequence classifier, of steps and tokens a token classifier: the
    library's own class where that is a decoder under one linear layer, else ours.

    Args:
        fresh: the folder is a language model's, and the head is the caller's to initialise.

    Raises:
        UserError: weights are missing or unreadable, or the folder has another head.
    """
    library, ours, task = (
        (AutoModelForSequenceClassification, ScalarHeadForSequenceClassification, "SEQ_CLS")
        if level == RESPONSE
        else (AutoModelForTokenClassification, ScalarHeadForTokenClassification, "TOKEN_CLS")
    )
    base = adapter_base(path)
    with told(f"{path}: cannot load the model"):
        read = AutoConfig.from_pretrained(base or path, trust_remote_code=config.trust_remote_code)
    brought = (getattr(read, "auto_map", None) or {}).get(library.__name__)
    known = brought is not None or type(read) in library._model_mapping
    if known and brought not in SCALAR_HEADS:
        model = load_base(path, config, library, allowed_missing=None)
        if is_plain(model, MODEL_MAPPING.get(type(read), None)):
            if not fresh:
                find_head(model, path)
            if reads_last_state(model):
                return model, task
        if not fresh and base is None and type(model).__name__ in (read.architectures or []):
            raise UserError(
                f"{path}: {type(model).__name__} is another kind of model (beside its decoder: "
                f"{_named(_beside(model))}); {NEEDED}"
            )
    model = load_base(path, config, ours, allowed_missing=None)
    if not fresh:
        find_head(model, path)
    if not reads_last_state(model):
        raise UserError(f"{path}: {type(model).__name__} reads text alone otherwise; {NEEDED}")
    return model, task


def _beside(model: Any) -> list[str]:
    """The names of the weights of a classifier outside of its decoder."""
    return [
        name
        for name, _ in model.named_parameters()
        if not name.startswith(f"{model.base_model_prefix}.")
    ]


def is_plain(model: Any, decoder: Any) -> bool:
    """Whether a classifier is a decoder, a linear layer called as heads are, and no other weights.

    Args:
        decoder: the class of its family's decoder; None where the library has none.
    """
    name, body = head_name(model), getattr(model, model.base_model_prefix, None)
    head = getattr(model, name or "", None)
    if body is None or not isinstance(head, nn.Linear):
        return False
    known = {id(each) for part in (body, head) for each in part.parameters()}
    others = [each for each in model.parameters() if id(each) not in known]
    return not others and (decoder is None or type(body) is decoder)


@torch.no_grad()
def reads_last_state(model: Any) -> bool:
    """Whether a classifier's own forward gives what its head says of its decoder's last states."""
    ids = plain_ids(model)
    batch = collate([Tokens(ids[:1], ids[1:])], next(model.parameters()).device)
    ours = scalar_head(model)(hidden_states(model, batch).float())[0]  # (T, 1)
    try:
        theirs: Tensor = model(input_ids=batch.ids, attention_mask=batch.attention.long()).logits
    except Exception:  # what a model cannot do with text alone, it says in many ways
        return False
    if theirs.ndim == 2:  # of the last token
        ours = ours[-1:]
    apart = (ours - theirs.view_as(ours)).norm() if ours.numel() == theirs.numel() else torch.inf
    return bool(apart <= ROUNDING * ours.norm())


# --------------------------------------------------------------------------- the head of a folder


def find_head(model: Any, path: str) -> None:
    """Give a classifier the head of its reward folder, whatever it is called there.

    One that the class would leave out, or its bias, is found among the weights that it did not
    read. Of an adapter it is left to peft.

    Raises:
        UserError: there is none, or it is not one linear layer to one label.
    """
    name = str(head_name(model))
    own: Any = getattr(model, name)
    if adapter_base(path) is not None:
        held = {each.removeprefix(PREFIX) for each in own_names(path)}
        if f"{name}.weight" in model.absent - held:
            raise UserError(
                f"{path}: 1 weights missing, the head: neither the adapter nor its base has "
                f"{name}.weight"
            )
        if f"{name}.bias" in held and own.bias is None:
            setattr(model, name, _layer(own.weight, torch.zeros(1)))
        return
    folder = Path(path)
    if not folder.is_dir():  # a hub id, whose files are on disk by now
        folder = Path(str(cached_file(path, "config.json"))).parent
    unembedding = tuple(model.get_input_embeddings().weight.shape)
    left = {
        each: shape
        for each, shape in shapes_of(folder).items()
        if each in model.unread and shape != unembedding
    }
    found = name
    if f"{name}.weight" in model.absent:
        heads = scalar_heads(left)
        layers = [shape for shape in left.values() if len(shape) > 1]
        if len(heads) != 1 or layers != [tuple(own.weight.shape)]:
            raise UserError(f"{path}: no such head (beside the decoder: {_named(left)}); {NEEDED}")
        found = heads[0]
    read = {part: f"{found}.{part}" for part in ("weight", "bias") if f"{found}.{part}" in left}
    values = _read(folder, read)
    if read or f"{name}.bias" in model.absent:
        none = None if own.bias is None else torch.zeros(1)
        setattr(model, name, _layer(values.get("weight", own.weight), values.get("bias", none)))
    if rest := left.keys() - set(read.values()):
        say(f"note: {path}: weights beside the decoder and its head are left out: {_named(rest)}")


def _layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of these, in float32."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    values = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    layer.load_state_dict(values)
    return layer


def _read(folder: Path, names: dict[str, str]) -> dict[str, Tensor]:
    """The weights of these names in a folder, by the same keys."""
    values: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            held = set(opened.keys())
            values |= {key: opened.get_tensor(each) for key, each in names.items() if each in held}
    check_finite(str(folder), values)
    return values


def _named(names: Collection[str]) -> str:
    """The first few names, in order."""
    few = sorted(names)[:SHOWN]
    return ", ".join(few) + (", ..." if len(names) > SHOWN else "") if few else "nothing"
