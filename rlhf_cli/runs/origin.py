"""What a model card tells of a folder: what it was made from, by which commands, and what of it was
measured.

Paths are shown as they were written down: what the environment said stays a reference.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.secrets import filled_in
from rlhf_cli.data.chat import ChatTemplate
from rlhf_cli.data.files import is_local
from rlhf_cli.data.hub import NAME, hub_name
from rlhf_cli.data.templates import CHAT
from rlhf_cli.data.text_ids import TextIds
from rlhf_cli.folders.json_forms import STAGE
from rlhf_cli.folders.manifest import (
    MANIFEST,
    RESPONSE,
    adapter_base,
    content_hash,
    kind_of,
    read_manifest,
    read_object,
)
from rlhf_cli.models.hub import cached
from rlhf_cli.reporting.model_card import Card, Made
from rlhf_cli.runs.lineage import MAIN_ROLES, PARENTS, command_of, config_text, paths_start

CARD = "README.md"
LICENCE_KEYS = ("license", "license_name", "license_link")
CACHED = "models--"  # begins the folder of a hub id in the hub's cache


def card_of(
    folder: Path, given: str, name: str, dtype: str, tokenizer: PreTrainedTokenizerBase, own: bool
) -> Card:
    """What is known of a model folder.

    Args:
        given: the folder or hub id as it was named.
        name: of the model.
        dtype: of the weights as they will be written.
        tokenizer: its own.
        own: whether its class is in its folder.
    """
    said = _written(folder)
    chain = list(_chain(folder, given))
    base, root = began_with(folder, given)
    metrics = said.get("metrics")
    return Card(
        name=name,
        kind=kind_of(folder),
        level=str(said.get("level", RESPONSE)),
        dtype=dtype,
        chat=tokenizer.chat_template is not None,
        template=said.get("template"),
        ending=_ending(said, tokenizer),
        own_class=own,
        base=base,
        origin=_origin(base, root),
        licence=licence_of(base, root),
        datasets=sorted(set(_datasets(folder))),
        chain=chain,
        config=config_text(folder),
        metrics=metrics if isinstance(metrics, dict) else {},
        checks=said.get("checks") or {},
        scale=said.get("reward") or {},
        evaluations=evaluations_of(folder),
    )


def _ending(said: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What ended the responses that a stage of ours trained on."""
    if "template" not in said:
        return None
    if said["template"] != CHAT:
        return str(tokenizer.eos_token)
    arguments = said.get("chat_args") or {}
    return ChatTemplate(tokenizer, arguments, TextIds(tokenizer), "the export").ending


def _written(folder: Path) -> dict[str, Any]:
    """stage.json as it stands there; empty where there is none."""
    file = folder / MANIFEST
    return read_object(file, STAGE) if file.is_file() else {}


# --------------------------------------------------------------------------- lineage


def _chain(folder: Path, given: str, seen: frozenset[Path] = frozenset()) -> Iterator[Made]:
    """A folder after all that it was made from, each once."""
    said = _written(folder)
    done: set[str] = set()
    recorded = said.get(PARENTS) or {}
    parents = list(parents_of_folder(folder))
    for role, place, fault in parents:
        if fault is None and place.resolve() not in seen:
            for made in _chain(place, recorded[role]["path"], seen | {folder.resolve()}):
                if made.hash not in done:
                    done.add(made.hash)
                    yield made
    faults = [f"its {role} {fault}" for role, _, fault in parents if fault]
    seed = said.get("seed")
    yield Made(
        path=given,
        stage=said.get("stage"),
        hash=content_hash(str(folder)),
        seed=seed if isinstance(seed, int) else None,
        command=command_of(folder),
        versions=said.get("versions") or {},
        parents=recorded,
        inputs=said.get("inputs") or {},
        fault=", ".join(faults) or None,
    )


def parents_of_folder(folder: Path) -> Iterator[tuple[str, Path, str | None]]:
    """Role, place and what is wrong with it now of each folder that a stage read."""
    for role, entry in (_written(folder).get(PARENTS) or {}).items():
        place = paths_start(folder) / os.path.expanduser(filled_in(entry["path"]))
        fault = None
        if not place.is_dir():
            fault = "is gone"
        else:
            with suppress(UserError, OSError):
                fault = None if content_hash(str(place)) == entry["hash"] else "has changed since"
        yield role, place, fault


def began_with(folder: Path, given: str) -> tuple[str | None, Path | None]:
    """The hub id and the folder of the model that a chain began with; neither where it built one.

    A folder that has changed since says nothing of what it was before.
    """
    parents = {role: (place, fault) for role, place, fault in parents_of_folder(folder)}
    for role in (*MAIN_ROLES, "reward"):
        if role in parents:
            place, fault = parents[role]
            return began_with(place, str(place)) if fault is None else (None, None)
    if (folder / MANIFEST).is_file():
        start = _start(folder)
        return (start, None) if start and NAME.fullmatch(start) else (None, None)
    base = adapter_base(folder)  # what others made begins with itself
    if base is not None:
        return began_with(Path(base), base) if Path(base).is_dir() else (base, None)
    return _hub_id(folder, given), folder


def _hub_id(folder: Path, given: str) -> str | None:
    """The hub id that a folder of others is known by; None where it is known by none."""
    if not Path(given).is_dir():
        return given
    home = next((part for part in folder.resolve().parts if part.startswith(CACHED)), None)
    return home.removeprefix(CACHED).replace("--", "/") if home else None


def _start(folder: Path) -> str | None:
    """The model that a run's config starts from."""
    config = _config(folder)
    model = config.get("model")
    start = config.get("policy") or (model.get("path") if isinstance(model, dict) else None)
    return start if isinstance(start, str) else None


def _config(folder: Path) -> dict[str, Any]:
    with suppress(yaml.YAMLError, ValueError):
        config = yaml.safe_load(config_text(folder))
        if isinstance(config, dict):
            return config
    return {}


def _datasets(folder: Path) -> Iterator[str]:
    """The datasets of the hub that a chain has read."""
    data = _config(folder).get("data")
    if isinstance(data, dict):
        sources = data.get("sources") or []
        given = [data.get(key) for key in ("path", "eval_path", "text_path")]
        given += [each.get("path") for each in sources if isinstance(each, dict)]
        for value in given:
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, str) and not is_local(path) and (hub := hub_name(path)):
                    yield hub.repo
    for _, place, fault in parents_of_folder(folder):
        if fault is None:
            yield from _datasets(place)


# --------------------------------------------------------------------------- the base


def licence_of(base: str | None, root: Path | None) -> dict[str, str]:
    """The entries on the licence in the card of the model that a chain began with."""
    file = root / CARD if root is not None else cached(base, CARD) if base else None
    if file is None or not file.is_file():
        return {}
    matter = front_matter_of(file)
    return {key: str(matter[key]) for key in LICENCE_KEYS if matter.get(key)}


def front_matter_of(file: Path) -> dict[str, Any]:
    """The YAML that a card begins with; empty where it cannot be read."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        start, _, rest = file.read_text(encoding="utf-8").partition("---\n")
        matter, end, _ = rest.partition("\n---")
        if not start.strip() and end:
            found = yaml.safe_load(matter)
            return found if isinstance(found, dict) else {}
    return {}


def _origin(base: str | None, root: Path | None) -> str:
    if base is not None:
        return f"The chain began with `{base}`."
    if root is not None:
        return f"The chain began with the folder `{root}`, which no stage made."
    return "The chain built its model itself, or what it began with is not known."


# --------------------------------------------------------------------------- measured


def evaluations_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The figures of a model in the reports of `evaluate` inside its folder and beside it.

    One counts where it says by hash that it is this model that was judged.
    """
    found = {}
    own = content_hash(str(folder))
    files = [*folder.glob(f"*/{MANIFEST}"), *folder.resolve().parent.glob(f"*/{MANIFEST}")]
    for file in sorted(set(files)):
        with suppress(UserError, OSError, AttributeError):
            report = read_manifest(file.parent) or {}
            judged = (report.get("metrics") or {}).get("policies") or {}
            paths = {
                entry["path"]
                for entry in report[PARENTS].values()
                if entry["hash"] == own and report["kind"] == "report"
            }
            for path in paths & judged.keys():
                found[os.path.relpath(file.parent)] = dict(judged[path])
    return found
