"""What a stage is made from: the folders and files that it reads, and whether they have changed."""

import os
from collections.abc import Iterator
from contextlib import suppress
from glob import glob, has_magic
from operator import attrgetter
from pathlib import Path
from typing import Any

from rlhf_cli.config import catalog
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.stages import Run
from rlhf_cli.config.stages import facts_of, stage_name
from rlhf_cli.data.files import find, is_there
from rlhf_cli.data.sources import sources_of
from rlhf_cli.data.stdin import STDIN, stdin_lines
from rlhf_cli.folders.manifest import (
    EXPORTED,
    MANIFEST,
    adapter_base,
    content_hash,
    file_hash,
    implicit_reward_of,
    kind_of,
    read_manifest,
    text_hash,
    tokenizer_hash,
    weight_files,
)
from rlhf_cli.rewards.specs import files_of, models_of

Provenance = dict[str, dict[str, dict[str, str]]]
FILES = (
    *("few_shot", "samples", "choices", "instructions", "principles"),
    *("judge_prompt", "critique_prompt", "revision_prompt"),
    *("known", "anchors"),
)
"""Keys that name a file beside `data`."""
GROWING = "labels"  # names a file of labels: people may go on writing it until they are sealed
ROWS = "rows"  # the role of a folder that left rows which a stage reads


def named_models(cfg: Run) -> Iterator[tuple[str, str, str]]:
    """What a config names models by: key, role (policy or reward) and value, none of them null.

    Each entry of a list has a key of its own: `baselines[0]`. A reference that is bootstrapped is
    made in `out`, so it is no model that is named, whatever folder has that name.
    """
    for key, role in catalog.model_keys(stage_name(cfg)).items():
        value = attrgetter(key)(cfg)
        if isinstance(value, list):
            value = [path for each in value for path in policies_like(each)]
            yield from ((f"{key}[{i}]", role, each) for i, each in enumerate(value))
        elif value is not None and "://" in value:
            continue  # an endpoint
        elif value is not None and not (cfg.trains and (key, value) == ("reference", "bootstrap")):
            yield key, role, value


def rewards_of(cfg: Run) -> list[tuple[str, str]]:
    """The keys of a stage that name rewards, and what they say."""
    return [(key, value) for key, role, value in named_models(cfg) if role == "reward"]


def models_read(cfg: Run) -> dict[str, str]:
    """Every model folder and hub id that a stage loads, by role: policy, reward, reward[1], ..."""
    models: dict[str, str] = {}
    for key, role, value in named_models(cfg):
        if role == "reward":
            models |= {f"{key}[{i}]" if i else key: path for i, path in enumerate(models_of(value))}
        elif not key.startswith("baselines["):
            models[key.removesuffix(".path")] = value
    return models | {f"baseline {path}": path for path in baselines_of(cfg)}


def parents_of(cfg: Run) -> dict[str, str]:
    """The local folders among them, but for gold: what it says goes into no weights."""
    return {
        role: path
        for role, path in models_read(cfg).items()
        if Path(path).is_dir() and role.partition("[")[0] != "gold"
    }


def size_of_parents(cfg: Run) -> int:
    """Bytes of weights that `provenance_of` hashes, without the bases of adapters."""
    files = (file for path in set(parents_of(cfg).values()) for file in weight_files(Path(path)))
    return sum(file.stat().st_size for file in files if file.is_file())


def baselines_of(cfg: Any) -> list[str]:
    """The baselines given, or else the finished policies beside the one that is judged that read
    the same tokens. None where a stage compares with none.
    """
    given: list[str] | None = getattr(cfg, "baselines", [])
    if given is None:
        return siblings_of(cfg.policy)
    return [path for each in given for path in policies_like(each)]


def policies_like(path: str) -> list[str]:
    """The finished policies that a pattern stands for, as runs/sweep/*/ppo; a plain path is one.

    A pattern that none fits stands for itself, and is found missing.
    """
    if not has_magic(path):
        return [path]
    found = [each for each in sorted(glob(path)) if kind_of(Path(each)) == "policy"]
    return found or [path]


def siblings_of(policy: str, alike: bool = True) -> list[str]:
    """The finished policies beside a local one: those with its tokenizer, or those with another.

    What was exported is another form of one of them.
    """
    if not Path(policy).is_dir():
        return []
    ours = tokenizer_hash(Path(policy))
    folders = sorted(file.parent for file in Path(policy).parent.glob(f"*/{MANIFEST}"))
    policies = [
        folder
        for folder in folders
        if kind_of(folder) == "policy" and EXPORTED not in (read_manifest(folder) or {})
    ]
    return [str(folder) for folder in policies if (tokenizer_hash(folder) == ours) == alike]


def places_read(cfg: Run) -> Iterator[tuple[str, Path]]:
    """Every local folder and file that a stage reads, by role; bases and references included."""
    for role, path in parents_of(cfg).items():
        yield role, Path(path)
        if (base := adapter_base(path)) is not None:
            yield f"base of the {role}", Path(base)
        if (implicit := implicit_reward_of(path)) is not None:
            yield f"reference of the {role}", Path(path, implicit["reference"])
    for key, place in inputs_read(cfg).items():
        here = Path(os.path.expanduser(place))
        for file in [here] if here.exists() else data_files(place):
            yield key.split()[0], file


def folders_of_rows(cfg: Run) -> list[str]:
    """The finished folders of stages that hold files which this one reads, each once."""
    files = [
        file
        for place in inputs_read(cfg).values()
        for here in [Path(os.path.expanduser(place))]
        for file in ([here] if here.is_file() else data_files(place))
    ]
    folders = dict.fromkeys(file.parent for file in files)
    return [str(folder) for folder in folders if _is_finished(folder)]


def _is_finished(folder: Path) -> bool:
    """Whether a stage has sealed a folder; a stage.json of others says nothing of it."""
    with suppress(UserError):
        return bool((read_manifest(folder) or {}).get("complete"))
    return False


def inputs_read(cfg: Run) -> dict[str, str]:
    """The local files, folders and patterns of files that a stage reads beside models, by key.

    Each entry of a list has a key of its own: `data.path[0]`.
    """
    inputs: dict[str, str | None] = {}
    named = {name: getattr(cfg.data, name) for name in ("path", "eval_path", "text_path", "prefix")}
    if cfg.data.sources:
        named |= {f"sources[{i}].path": each.path for i, each in enumerate(sources_of(cfg.data))}
    for name, value in named.items():
        key = f"data.{name}"
        if isinstance(value, list):
            inputs |= {f"{key}[{i}]": each for i, each in enumerate(value)}
        else:
            inputs[key] = value
    for key in FILES:
        inputs[key] = getattr(cfg, key, None)
    inputs |= {f"asked[{i}]": each for i, each in enumerate(getattr(cfg, "asked", []))}
    for key, role, value in named_models(cfg):
        if role == "reward":
            inputs |= {f"{key} {file}": str(file) for file in files_of(value)}
    if (own := own_loss(cfg)) is not None:
        inputs |= {f"algo.loss {own[0]}": str(own[0])}
    return {
        key: place for key, place in inputs.items() if place and place != STDIN and is_there(place)
    }


def own_loss(cfg: Run) -> tuple[Path, str] | None:
    """File and name of the function that is the loss, where it is one of the user's."""
    loss = getattr(cfg.algo, "loss", None)
    return None if loss is None else catalog.own_function(stage_name(cfg), "algo.loss", loss)


def input_hash(place: str) -> str | None:
    """Identity of a file, or of the data files that a folder or a pattern stands for; None where
    there are none.
    """
    files = data_files(place)
    return file_hash(*files) if files else None


def data_files(place: str) -> list[Path]:
    """The files of a folder, pattern or name, held-out ones last; none where none can be read."""
    try:
        found = find(place)
    except UserError:
        return []
    return [*found.train, *found.held_out]


def provenance_of(cfg: Run) -> Provenance:
    """What a stage is made from, as stage.json has it: parents by role, and other inputs."""
    inputs = inputs_read(cfg)
    if (labels := getattr(cfg, GROWING, None)) is not None:
        inputs[GROWING] = labels
    hashes = {key: (place, input_hash(place)) for key, place in inputs.items()}
    if cfg.data.path == STDIN and not facts_of(cfg).holds_out:
        hashes["data.path"] = (STDIN, text_hash("".join(stdin_lines())))
    parents = parents_of(cfg) | {f"{ROWS} {path}": path for path in folders_of_rows(cfg)}
    return {
        "parents": {
            role: {"path": path, "hash": content_hash(path)} for role, path in parents.items()
        },
        "inputs": {
            key: {"path": place, "hash": digits}
            for key, (place, digits) in hashes.items()
            if digits is not None
        },
    }


def held_to(provenance: Provenance) -> Provenance:
    """What a run that is unfinished is held to: all that it is made from, but what may grow."""
    return {
        group: {key: each for key, each in entries.items() if key != GROWING}
        for group, entries in provenance.items()
    }


def parent_paths(provenance: dict[str, Any]) -> set[str]:
    """The folders that a stage was made from."""
    return {parent["path"] for parent in (provenance.get("parents") or {}).values()}


def stdin_differs(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether other lines came through standard input than when a run began."""
    current, begun = ((each.get("inputs") or {}).get("data.path") for each in (now, before))
    return bool(current != begun)


def changed_since(now: dict[str, Any], before: dict[str, Any]) -> str | None:
    """The first parent or input whose bytes are not those of before, with its path."""
    for group in ("parents", "inputs"):
        for name, made in (before.get(group) or {}).items():
            current = now[group].get(name)
            if current is not None and current["hash"] != made["hash"]:
                return f"{name.split()[0]} ({current['path']} has changed since)"
    return None
