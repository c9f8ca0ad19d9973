"""Code that model folders bring along: which of it model.trust_remote_code lets run."""

from pathlib import Path

from rlhf_cli.config.schema.stages import Run
from rlhf_cli.folders.manifest import (
    SCALAR_HEADS,
    adapter_base,
    implicit_reward_of,
    read_object,
    reference_folder,
)
from rlhf_cli.runs.provenance import models_read


def code_lines(cfg: Run) -> list[str]:
    """A line for each folder and hub id whose code may run; none where the config lets none."""
    if not cfg.model.trust_remote_code:
        return []
    return [
        f"model.trust_remote_code=true: Python code that {path} brings along may run"
        for path in models_loaded(cfg)
        if not Path(path).is_dir() or brings_code(Path(path))
    ]


def models_loaded(cfg: Run) -> list[str]:
    """Every model folder and hub id that a stage loads, sorted."""
    models = set(models_read(cfg).values())
    for path in list(models):  # a policy of dpo as a reward needs its reference
        if (implicit := implicit_reward_of(path)) is not None:
            models.add(reference_folder(path, implicit))
    return sorted(models)


def brings_code(folder: Path) -> bool:
    """Whether a model folder, or an adapter's base, names Python files of its own, or may.

    The scalar head that we write beside weights is for other tools: here it is never run.
    """
    base = Path(adapter_base(folder) or folder)
    if not base.is_dir():  # on the hub
        return True
    places = (folder, base)
    files = [place / name for place in places for name in ("config.json", "tokenizer_config.json")]
    maps = [read_object(file, {}).get("auto_map", {}) for file in files if file.is_file()]
    return any(
        not isinstance(each, dict) or set(map(str, each.values())) - SCALAR_HEADS for each in maps
    )
