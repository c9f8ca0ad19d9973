"""The `out` folder of a stage: free, finished, resumable or somebody else's."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema import STAGES, Evaluate, Generate, Grpo, Ppo, Run
from rlhf_cli.data.files import SUFFIXES
from rlhf_cli.models.forms import ORIGINS
from rlhf_cli.models.manifest import (
    MANIFEST,
    Manifest,
    content_hash,
    file_hash,
    kind_of,
    read_manifest,
    read_object,
)
from rlhf_cli.rewards.specs import files_of, models_of
from rlhf_cli.training.files import PART, flush, flush_all, seal, write_json, write_text
from rlhf_cli.training.lock import LOCK, lock, running, unlock

FREE, FINISHED, RESUMABLE = "free", "finished", "resumable"
CONFIG = "config.yaml"
HEADER = "# rlhf"  # how the first line of our own config.yaml begins
STAGING = ".staging"
CHECKPOINTS = "checkpoints"
INPUTS = f"{CHECKPOINTS}/inputs.json"

# hardware and a cache change no result, and overwrite is an order rather than a setting
IGNORED_KEYS = ("hardware", "overwrite", "reference_cache")
SHOWN_ONLY = ("algo.show_every",)
EVALUATIONS = ("algo.eval_every", "algo.eval_prompts")


def stage_name(cfg: Run) -> str:
    """The subcommand that a typed config belongs to."""
    return next(name for name, schema in STAGES.items() if type(cfg) is schema)


def parents_of(cfg: Run) -> dict[str, str]:
    """The model folders that a stage reads, by role: policy, reward, reward[1], reference, ..."""
    roles = {role: getattr(cfg, role, None) for role in ("policy", "reference")}
    for key in ("reward", "judge"):
        models = models_of(spec) if (spec := getattr(cfg, key, None)) else []
        roles |= {f"{key}[{i}]" if i else key: path for i, path in enumerate(models)}
    if (model_path := getattr(cfg.model, "path", None)) is not None:  # type: ignore[attr-defined]
        roles["model"] = model_path
    if isinstance(cfg, Evaluate):
        roles |= {f"baseline {path}": path for path in baselines_of(cfg)}
    if roles["reference"] == "bootstrap":  # made in `out`, whatever folder has that name
        del roles["reference"]
    return {role: path for role, path in roles.items() if path and Path(path).is_dir()}


def baselines_of(cfg: Evaluate) -> list[str]:
    """The baselines given, or else the finished policies beside the one that is judged."""
    if cfg.baselines is not None:
        return cfg.baselines
    if not Path(cfg.policy).is_dir():
        return []
    folders = sorted(file.parent for file in Path(cfg.policy).parent.glob(f"*/{MANIFEST}"))
    return [str(folder) for folder in folders if kind_of(folder) == "policy"]


def inputs_of(cfg: Run) -> dict[str, dict[str, str]]:
    """The local files that a stage reads beside models: key -> path and hash."""
    places = {f"data.{key}": getattr(cfg.data, key) for key in ("path", "eval_path", "text_path")}
    for key in ("reward", "gold", "judge"):
        for file in files_of(getattr(cfg, key, None) or ""):
            places[f"{key} {file}"] = str(file)
    hashes = {key: input_hash(place) for key, place in places.items() if place}
    return {
        key: {"path": str(places[key]), "hash": digits} for key, digits in hashes.items() if digits
    }


def input_hash(place: str) -> str | None:
    """Identity of a file, or of the data files in a folder; None where there is neither."""
    path = Path(place)
    files = [path] if path.is_file() else []
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    return file_hash(*files) if files else None


def origins_of(cfg: Run) -> dict[str, dict[str, dict[str, str]]]:
    """What a stage is made from, as stage.json has it: parents by role, and other inputs."""
    parents = parents_of(cfg).items()
    return {
        "parents": {role: {"path": path, "hash": content_hash(path)} for role, path in parents},
        "inputs": inputs_of(cfg),
    }


def state_of(cfg: Run) -> str:
    """Whether `out` is free, finished by this very config, or left unfinished by it.

    Raises:
        UserError: another config made it, what it is made from has changed since, another process
            writes it, or it cannot be written.
    """
    out = Path(cfg.out)
    check_writable(out)
    for role, path in parents_of(cfg).items():
        if out.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
            raise UserError(f"out={out} holds the {role} that this stage reads; name another out")
    if (other := running(out)) is not None:
        raise UserError(f"out={out} is being written by {other}")
    if not is_claimed(out):
        ours = (LOCK, f".{CONFIG}{PART}")  # of a run that was killed as it claimed the folder
        if out.is_dir() and any(entry.name not in ours for entry in out.iterdir()):
            # never emptied, whatever overwrite says
            raise UserError(f"out={out} is not empty and not a stage's folder; name another out")
        return FREE
    if cfg.data.path == "-":  # standard input is new each time
        return FREE
    complete = (out / MANIFEST).is_file()  # written last, and whole
    if not complete and isinstance(cfg, Generate | Evaluate):
        return FREE  # they write at their end, and leave nothing to go on from
    if cfg.overwrite:
        return RESUMABLE if not complete and begun_by_the_same_order(cfg) else FREE
    if differing := differing_keys(config_of(out), asdict(cfg), free_keys(cfg, complete)):
        raise UserError(
            f"out={out} was made by another config ({', '.join(differing)}); "
            "name another out, or set overwrite=true"
        )
    origins, before = origins_of(cfg), begun_with(out)
    if complete:
        before = read_manifest(out) or {}
        if isinstance(cfg, Evaluate) and parent_paths(origins) != parent_paths(before):
            return FREE  # there are other policies to compare with now
    if changed := changed_since(origins, before):
        raise UserError(
            f"out={out} was made from another {changed}; set overwrite=true to make it again"
        )
    return FINISHED if complete else RESUMABLE


def begun_by_the_same_order(cfg: Run) -> bool:
    """Whether overwrite=true began what lies unfinished in `out`, with this config and input.

    Such a run goes on: the order was carried out when it began.
    """
    out = Path(cfg.out)
    try:
        made_by = config_of(out)
    except UserError:
        return False
    return (
        bool(made_by.get("overwrite"))
        and not differing_keys(made_by, asdict(cfg), free_keys(cfg, complete=False))
        and not changed_since(origins_of(cfg), begun_with(out))
    )


def config_of(out: Path) -> dict[str, Any]:
    """The config that made a folder.

    Raises:
        UserError: its config.yaml cannot be read.
    """
    file = out / CONFIG
    try:
        return dict(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (yaml.YAMLError, TypeError, ValueError):
        raise UserError(f"{file}: damaged; set overwrite=true to start afresh") from None


def parent_paths(origins: dict[str, Any]) -> set[str]:
    """The folders that a stage was made from."""
    return {parent["path"] for parent in (origins.get("parents") or {}).values()}


def begun_with(out: Path) -> dict[str, Any]:
    """What an unfinished run said of its parents and inputs as it began."""
    file = out / INPUTS
    return read_object(file, ORIGINS) if file.is_file() else {}


def changed_since(now: dict[str, Any], before: dict[str, Any]) -> str | None:
    """The first parent or input whose bytes are not those of before, with its path."""
    for group in ("parents", "inputs"):
        for name, made in (before.get(group) or {}).items():
            current = now[group].get(name)
            if current is not None and current["hash"] != made["hash"]:
                return f"{name.split()[0]} ({current['path']} has changed since)"
    return None


def is_claimed(out: Path) -> bool:
    """Whether a stage has written, or begun to write, this folder."""
    saved = out / CONFIG
    return saved.is_file() and saved.read_bytes().startswith(HEADER.encode())


def check_writable(out: Path) -> None:
    """Stop before any work where `out` cannot be written."""
    place = out
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UserError(f"out={out}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"out={out}: no permission to write in {place}")


def free_keys(cfg: Run, complete: bool) -> dict[str, bool]:
    """Keys that may differ from those of the run before; True where by growing only.

    Logging always may; evaluations where they choose neither weights nor the end; and an unfinished
    run may be given more steps.
    """
    algo: Any = getattr(cfg, "algo", None)
    free = dict.fromkeys(SHOWN_ONLY, False)
    chooses = getattr(algo, "keep", "last") != "last"
    if not chooses and "overoptimised" not in getattr(algo, "stop_on", []):
        free |= dict.fromkeys(EVALUATIONS, False)
    if not complete:
        length = (
            ("algo.steps",) if isinstance(cfg, Ppo | Grpo) else ("algo.epochs", "algo.max_steps")
        )
        free |= dict.fromkeys(length, True)
    return free


def differing_keys(
    saved: dict[str, Any], given: dict[str, Any], free: dict[str, bool] | None = None
) -> list[str]:
    """`key: before -> now` of each value that differs, but for hardware, overwrite and free keys.

    Args:
        free: from `free_keys`.
    """
    flat_saved, flat_given = flatten(saved), flatten(given)
    found = []
    for name in sorted(flat_saved.keys() | flat_given.keys()):
        before, now = flat_saved.get(name), flat_given.get(name)
        if name.split(".")[0] in IGNORED_KEYS or before == now:
            continue
        grows = (free or {}).get(name)
        if grows is False or (grows and is_more(now, before)):
            continue
        found.append(f"{name}: {shown(before)} -> {shown(now)}")
    return found


def is_more(now: int | None, before: int | None) -> bool:
    """Whether a number of steps is greater; none is no limit."""
    return now is None or (before is not None and now > before)


def shown(value: Any) -> str:
    """A value as it is given on the command line."""
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; empty groups vanish."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def claim(cfg: Run) -> None:
    """Make the folder this run's own: locked, emptied if free, config.yaml written.

    Raises:
        UserError: another process writes it, or has finished it meanwhile.
    """
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    lock(out)
    state = state_of(cfg)
    if state == FINISHED:
        unlock(out)
        raise UserError(f"out={out} was finished by another run meanwhile; nothing to do")
    if state == FREE:
        # stage.json first, so that no part of a model looks whole; config.yaml is replaced last
        remove([out / MANIFEST])
        remove(entry for entry in out.iterdir() if entry.name not in (LOCK, CONFIG))
    header = f"# {command_line() or f'rlhf_cli.stages.{stage_name(cfg)}.run'}\n"
    write_text(out / CONFIG, header + yaml.safe_dump(asdict(cfg), sort_keys=False))
    (out / CHECKPOINTS).mkdir(exist_ok=True)
    if not (out / INPUTS).is_file():
        write_json(out / INPUTS, origins_of(cfg))
    flush(out.parent)


def remove(entries: Iterable[Path]) -> None:
    """Files, links and folders with all below; what is not there is gone already."""
    for entry in list(entries):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def command_line() -> str | None:
    """The command as it was typed (Hydra rewrites sys.argv); None where Python called a stage."""
    script, *words = sys.orig_argv[1:] or [""]
    return shlex.join(["rlhf-cli", *words]) if Path(script).name == "rlhf-cli" else None


def resume_point(out: Path, step: int) -> Path:
    """The folder of what is resumed from after a step."""
    return out / CHECKPOINTS / f"step-{step:08d}"


def resume_points(out: Path) -> list[Path]:
    """The resume points of an out folder, oldest first."""
    return sorted((out / CHECKPOINTS).glob("step-*"))


def newest_step(out: Path) -> int | None:
    """The step of the newest resume point; None where there is none."""
    found = resume_points(out)
    return int(found[-1].name.removeprefix("step-")) if found else None


def staging(out: Path) -> Path:
    """An empty folder inside `out` for files that are not to be seen yet."""
    folder = out / STAGING
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def publish(out: Path, manifest: Manifest) -> None:
    """Move staged files into `out`, then write stage.json: only that makes the folder complete."""
    folder = out / STAGING
    if folder.is_dir():
        flush_all(folder)
        for file in sorted(folder.iterdir()):
            file.replace(out / file.name)
        folder.rmdir()
    seal(out, manifest)
    tidy(out)


def tidy(out: Path) -> None:
    """Remove what a finished folder needs no more: resume points and the lock."""
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    if (out / LOCK).exists():  # ours, or that of a run that was killed here
        lock(out)
        unlock(out)
