"""The `out` folder of a stage: free, finished, resumable or somebody else's; written atomically."""

import json
import os
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema import STAGES, Evaluate, Run
from rlhf_cli.models.manifest import MANIFEST, Manifest, content_hash, kind_of, read_manifest
from rlhf_cli.rewards.specs import models_of

FREE, FINISHED, RESUMABLE = "free", "finished", "resumable"
CONFIG = "config.yaml"
HEADER = "# rlhf"  # how the first line of our own config.yaml begins
STAGING = ".staging"

# hardware and a cache change no result, and overwrite is an order rather than a setting
IGNORED_KEYS = ("hardware", "overwrite", "reference_cache")


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


def state_of(cfg: Run) -> str:
    """Whether `out` is free, finished by this very config, or left unfinished by it.

    Raises:
        UserError: another config made it, a parent has changed since, or it cannot be written.
    """
    out = Path(cfg.out)
    check_writable(out)
    for role, path in parents_of(cfg).items():
        if out.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
            raise UserError(f"out={out} holds the {role} that this stage reads; name another out")
    saved = out / CONFIG
    if not is_claimed(out):
        if out.is_dir() and any(out.iterdir()):  # never emptied, whatever overwrite says
            raise UserError(f"out={out} is not empty and not a stage's folder; name another out")
        return FREE
    if cfg.overwrite or cfg.data.path == "-":  # standard input is new each time
        return FREE
    try:
        made_by = dict(yaml.safe_load(saved.read_text(encoding="utf-8")))
    except (yaml.YAMLError, TypeError, ValueError):
        raise UserError(f"{saved}: damaged; set overwrite=true to start afresh") from None
    if differing := differing_keys(made_by, asdict(cfg)):
        raise UserError(
            f"out={out} was made by another config (other {', '.join(differing[:4])}); "
            "name another out, or set overwrite=true"
        )
    manifest = read_manifest(out)
    if manifest is None or not manifest.get("complete"):
        return RESUMABLE
    parents = parents_of(cfg)
    made_from = {parent["path"] for parent in manifest["parents"].values()}
    if isinstance(cfg, Evaluate) and made_from != set(parents.values()):
        return FREE  # there are other policies to compare with now
    for role, path in parents.items():
        before = manifest["parents"].get(role, {}).get("hash")
        if before is not None and before != content_hash(path):
            raise UserError(
                f"out={out} was made from another {role} ({path} has changed since); "
                "set overwrite=true to make it again"
            )
    return FINISHED


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


def differing_keys(saved: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Dotted keys whose values differ, hardware and overwrite aside."""
    flat_saved, flat_given = flatten(saved), flatten(given)
    return [
        name
        for name in sorted(flat_saved.keys() | flat_given.keys())
        if name.split(".")[0] not in IGNORED_KEYS and flat_saved.get(name) != flat_given.get(name)
    ]


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
    """Make the folder this run's own: emptied if free, config.yaml written."""
    out = Path(cfg.out)
    if state_of(cfg) == FREE and out.is_dir():
        for entry in out.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    out.mkdir(parents=True, exist_ok=True)
    header = f"# {command_line() or f'rlhf_cli.stages.{stage_name(cfg)}.run'}\n"
    write_text(out / CONFIG, header + yaml.safe_dump(asdict(cfg), sort_keys=False))


def command_line() -> str | None:
    """The command as it was typed (Hydra rewrites sys.argv); None where Python called a stage."""
    script, *words = sys.orig_argv[1:] or [""]
    return shlex.join(["rlhf-cli", *words]) if Path(script).name == "rlhf-cli" else None


def write_text(file: Path, text: str) -> None:
    """Write aside, flush to disk, then rename: readers see the old file or the whole new one."""
    aside = file.with_name(f".{file.name}.part")
    with aside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)


def staging(out: Path) -> Path:
    """An empty folder inside `out` for files that are not to be seen yet."""
    folder = out / STAGING
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def aside(folder: Path) -> Path:
    """An empty folder beside `folder`, for what is to become it."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def move_into_place(part: Path, folder: Path) -> None:
    """Flush what was written aside to disk, then rename: the folder is seen whole or not at all."""
    for file in part.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    part.rename(folder)


def publish(out: Path, manifest: Manifest) -> None:
    """Move staged files into `out`, then write stage.json: only that makes the folder complete."""
    folder = out / STAGING
    if folder.is_dir():
        for file in sorted(folder.iterdir()):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
            file.replace(out / file.name)
        folder.rmdir()
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    write_text(out / MANIFEST, json.dumps({**manifest, "complete": True}, indent=2) + "\n")
