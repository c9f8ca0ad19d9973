"""generation_config.json: how others are to generate with a model, and what ends its responses.

It is read and written as it stands: a release of transformers knows keys that another does not, and
refuses to write some that model folders are published with.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.folders.json_forms import CONFIG
from rlhf_cli.folders.manifest import adapter_base, read_object

GENERATION = "generation_config.json"
EOS = "eos_token_id"
FROM_CONFIG = "_from_model_config"  # transformers then asks config.json for all of it

Settings = dict[str, Any]


def read_generation(path: str, locate: Callable[[str], Path] = Path) -> Settings | None:
    """The settings of a model folder; of an adapter that has none, those of its base.

    Where there are none, config.json may name EOS ids, as transformers reads it too. None where
    nothing is said.

    Args:
        locate: where a folder or hub id lies.
    """
    for place in (path, adapter_base(path)):
        folder = Path() if place is None else locate(place)
        if place is not None and (folder / GENERATION).is_file():
            return read_object(folder / GENERATION, {})
        if place is not None and (folder / "config.json").is_file():
            config = read_object(folder / "config.json", CONFIG)
            inner = config.get("text_config") or {}
            eos = config.get(EOS) if config.get(EOS) is not None else inner.get(EOS)
            return None if eos is None else {EOS: eos, FROM_CONFIG: True}
    return None


def eos_ids(settings: Settings | None, path: str) -> list[int]:
    """The EOS ids that settings name, in their order.

    Raises:
        UserError: one is no token id.
    """
    said = (settings or {}).get(EOS)
    ids: list[Any] = said if isinstance(said, list) else [said]
    ids = [id for id in ids if id is not None]
    if not all(type(id) is int and id >= 0 for id in ids):
        raise UserError(f"{path}: {EOS}={said} is not a whole number of 0 or more")
    return ids


def ended_by(settings: Settings, ids: Iterable[int]) -> Settings:
    """The settings with these EOS ids; all else is as it was."""
    eos = sorted(set(ids))
    kept = {key: value for key, value in settings.items() if key != FROM_CONFIG}
    return {**kept, EOS: eos[0] if len(eos) == 1 else eos}


def write_generation(settings: Settings, folder: Path) -> None:
    """Write them into a model folder."""
    (folder / GENERATION).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def name_eos(tokenizer: Any, settings: Settings | None, path: str) -> None:
    """Give a tokenizer that names no EOS the first id that ends responses by the settings."""
    if tokenizer.eos_token_id is None:
        known = [id for id in eos_ids(settings, path) if id < len(tokenizer)]
        if known:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(known[0])
            tokenizer.lacked_eos = True  # told where a run starts from it
