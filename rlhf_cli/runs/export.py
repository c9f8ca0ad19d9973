"""A finished model in the form that other tools take: merged, cast, sharded, with a model card.

DEST is written aside and renamed, so it is whole or not there. Its stage.json is that of DIR, and
says that it was exported and from what, so that later stages take it as they would take DIR.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.config.schema.models import FrozenModel
from rlhf_cli.config.secrets import refuse_secrets
from rlhf_cli.folders.companions import copy_companions
from rlhf_cli.folders.files import disk_fault, seal, whole_folder
from rlhf_cli.folders.json_forms import STAGE
from rlhf_cli.folders.manifest import (
    EXPORTED,
    MANIFEST,
    Manifest,
    adapter_base,
    content_hash,
    kind_of,
    read_manifest,
    read_object,
    tokenizer_hash,
    trained_here,
)
from rlhf_cli.models import gguf, hub
from rlhf_cli.models.decoder import unwrap
from rlhf_cli.models.dtypes import AUTO, name_of, type_to_write
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.nonfinite import is_finite
from rlhf_cli.models.save import save_model, set_score_pad
from rlhf_cli.models.scalar_head import ScalarHead
from rlhf_cli.models.scorers import SCORING, load_scorer
from rlhf_cli.models.tokenizers import load_tokenizer
from rlhf_cli.reporting.console import say
from rlhf_cli.reporting.model_card import card_text
from rlhf_cli.runs.model_checks import check_folder, is_hub_id
from rlhf_cli.runs.origin import CARD, card_of

CPU = torch.device("cpu")
EDITED = (CARD, ".gguf")  # what people may change or take out: no later stage reads it
# of DIR's stage.json: these are said anew, or belong to its own run
NOT_KEPT = (
    *("stage", "parents", "inputs", "files", "complete", "seconds", "stopped", "step"),
    EXPORTED,
)


@dataclass(frozen=True)
class Export:
    """What is to be written.

    source: a folder or hub id.
    save_dtype: source, float32, bfloat16 or float16.
    shard_size: of the largest file of weights, as `5GB`.
    gguf: the type of a GGUF file's weights; None for no such file.
    push: a repository of the hub; None for none.
    """

    source: str
    dest: Path
    save_dtype: str
    shard_size: str
    gguf: str | None
    push: str | None
    private: bool
    overwrite: bool
    trust_remote_code: bool


def export(order: Export) -> Path:
    """Write DEST, unless this very order has written it before, and push it where asked.

    Raises:
        UserError: DIR is no finished model, DEST is taken, or what was asked for cannot be done.
        RunError: the disk, the converter or the hub fails.
    """
    refuse_secrets(asdict(order))
    if order.push is not None:
        hub.check_push(order.push)
    folder = _source(order.source)
    _check_dest(order, folder)
    parent = _parent(order, folder)
    if _is_done(order, parent):
        say(f"{order.dest}: already exported; nothing to write")
    else:
        try:
            _write(order, folder, parent)
        except OSError as error:
            if (fault := disk_fault(error)) is None:
                raise
            raise RunError(f"{order.dest} was not written: {fault}") from None
    if order.push is not None:
        say(f"export: pushed to {hub.push(order.dest, order.push, order.private)}")
    return order.dest


# --------------------------------------------------------------------------- before any work


def _source(given: str) -> Path:
    """The folder of DIR, whole and of a kind that can be exported."""
    folder = Path(given)
    if not folder.exists() and is_hub_id(given):
        folder = hub.downloaded(given)
    kind = kind_of(folder) if folder.is_dir() else "policy"
    if kind not in ("policy", "reward"):
        raise UserError(f"DIR={given} is a {kind}; export takes policies and reward models")
    check_folder("DIR", str(folder), kind, "a policy or a reward model")
    return folder


def _check_dest(order: Export, folder: Path) -> None:
    """Stop where DEST is, holds or lies in DIR, or holds anything but an export of before."""
    dest, source = (Path(os.path.realpath(each)) for each in (order.dest, folder))
    if dest == source or dest in source.parents or source in dest.parents:
        raise UserError(f"DEST={order.dest} and DIR={order.source} lie in each other; name another")
    if not os.path.lexists(order.dest) or (dest.is_dir() and not any(dest.iterdir())):
        return
    exported = _exported(order.dest)
    if exported is None:
        raise UserError(f"DEST={order.dest} exists and no export wrote it; name another")
    if not order.overwrite and not _is_done(order, _parent(order, folder)):
        raise UserError(f"DEST={order.dest} is another export; name another, or set overwrite=true")
    others = {entry.name for entry in dest.iterdir()} - {*exported["written"], MANIFEST}
    if order.overwrite and others:
        raise UserError(
            f"DEST={order.dest} holds {min(others)}, which no export wrote; move it, or name "
            "another"
        )


def _exported(dest: Path) -> dict[str, Any] | None:
    """What a folder says of its export; None where none wrote it."""
    said = read_manifest(dest) if dest.is_dir() else None
    return None if said is None else said.get(EXPORTED)


def _parent(order: Export, folder: Path) -> dict[str, dict[str, str]]:
    """DIR as stage.json names what a folder was made from."""
    return {kind_of(folder): {"path": order.source, "hash": content_hash(str(folder))}}


def _options(order: Export) -> dict[str, Any]:
    """What of an order makes the folder what it is."""
    return {"save_dtype": order.save_dtype, "shard_size": order.shard_size, "gguf": order.gguf}


def _is_done(order: Export, parent: dict[str, dict[str, str]]) -> bool:
    """Whether DEST is whole, and this order of this DIR made it."""
    exported = _exported(order.dest)
    if order.overwrite or exported is None:
        return False
    made_from = (read_manifest(order.dest) or {})["parents"]
    hashes = [{role: each["hash"] for role, each in made.items()} for made in (made_from, parent)]
    return exported["options"] == _options(order) and hashes[0] == hashes[1]


# --------------------------------------------------------------------------- the work


def _write(order: Export, folder: Path, parent: dict[str, dict[str, str]]) -> None:
    command = gguf.converter() if order.gguf is not None else []
    kind = kind_of(folder)
    if command and kind != "policy":
        raise UserError(f"gguf={order.gguf}: {order.source} is a reward model; llama.cpp runs none")
    base = adapter_base(folder)
    places = [folder, *([_base_folder(base)] if base is not None else [])]
    model, tokenizer = _loaded(order, folder)
    dtype = type_to_write(model, order.save_dtype, merge=True)
    _check_range(model, dtype, order.source)
    with whole_folder(order.dest.resolve()) as part:  # a link stays, and leads to what is written
        save_model(model, tokenizer, part, True, dtype, order.shard_size)
        own = isinstance(unwrap(model), ScalarHead)
        del model
        copy_companions(places, part, code=order.trust_remote_code)
        name = order.dest.resolve().name
        card = card_of(folder, order.source, name, name_of(dtype), tokenizer, own)
        (part / CARD).write_text(card_text(card), encoding="utf-8")
        if order.gguf is not None:
            file = part / f"{name}-{order.gguf}.gguf"
            say(f"export: {gguf.SCRIPT} writes {file.name}")
            gguf.convert(command, part, file, order.gguf)
        written = sorted(entry.name for entry in part.iterdir())
        seal(
            part,
            _manifest(order, folder, parent, part, written),
            [name for name in written if not name.endswith(EDITED)],
        )
    files = sum(name.endswith(".safetensors") for name in written)
    merged = f", the adapter merged into {base}" if base is not None else ""
    say(f"export: {name_of(dtype)} in {files} file{'s' * (files > 1)}{merged}")


def _base_folder(base: str) -> Path:
    """Where the base of an adapter lies."""
    return Path(base) if Path(base).is_dir() else hub.downloaded(base)


def _loaded(order: Export, folder: Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model in float32 with its adapter merged, and its tokenizer."""
    config = FrozenModel("float32", order.trust_remote_code, attention=AUTO)
    path, said = str(folder), read_manifest(folder)
    tokenizer = load_tokenizer(path, config)
    if kind_of(folder) == "policy":
        return load_policy(path, config, tokenizer, CPU), tokenizer
    scorer: Any = load_scorer(path, config, tokenizer, CPU)
    if trained_here(said):  # of an adapter no config says it
        scorer.config.problem_type = SCORING
        set_score_pad(scorer, tokenizer, (said or {}).get("eos_ids", []), whole=True)
    elif adapter_base(folder) is not None and tokenizer.pad_token_id is not None:
        scorer.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return scorer, tokenizer


def _check_range(model: nn.Module, dtype: torch.dtype, source: str) -> None:
    """Stop where a weight becomes an infinity."""
    for name, weight in model.named_parameters():
        if not is_finite(weight.detach().to(dtype)):
            raise RunError(
                f"{name} of {source} is too large for {name_of(dtype)}; "
                "save_dtype=float32 or bfloat16 hold it"
            )


def _manifest(
    order: Export, folder: Path, parent: dict[str, Any], part: Path, written: list[str]
) -> Manifest:
    """stage.json of DEST: that of DIR, in which its paths are seen from DEST."""
    file = folder / MANIFEST
    said: Manifest = read_object(file, STAGE) if file.is_file() else {"kind": kind_of(folder)}
    kept = {key: value for key, value in said.items() if key not in NOT_KEPT}
    if "implicit_reward" in kept:
        inside = folder / kept["implicit_reward"]["reference"]
        if inside.is_dir():
            seen = os.path.relpath(inside, order.dest)
            kept["implicit_reward"] = {**kept["implicit_reward"], "reference": seen}
    return {
        "stage": "export",
        "parents": parent if Path(order.source).is_dir() else {},
        **kept,
        "tokenizer": tokenizer_hash(part),
        EXPORTED: {
            "from": order.source,
            "stage": said.get("stage"),
            **({"step": said["step"]} if "step" in said else {}),  # of a snapshot
            "options": _options(order),
            "written": written,
        },
    }
