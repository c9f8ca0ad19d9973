"""Code that model folders bring along: which of it model.trust_remote_code lets run."""

from pathlib import Path

from rlhf_cli.config.schema import EvaluateConfig, Run
from rlhf_cli.folders.manifest import (
    adapter_base,
    implicit_reward_of,
    read_object,
    reference_folder,
)
from rlhf_cli.rewards.specs import models_of
from rlhf_cli.runs.provenance import baselines_of


def code_lines(cfg: Run) -> list[str]:
    """A line for each folder and hub id whose code may run; none where the config lets none."""
    if not cfg.model.trust_remote_code:  # type: ignore[attr-defined]
        return []
    return [
        f"model.trust_remote_code=true: Python code that {path} brings along may run"
        for path in places_of(cfg)
        if not Path(path).is_dir() or brings_code(Path(path))
    ]


def places_of(cfg: Run) -> list[str]:
    """Every model folder and hub id that a stage loads, sorted."""
    found = {getattr(cfg, "policy", None), getattr(cfg, "reference", None)} - {"bootstrap"}
    found.add(getattr(cfg.model, "path", None))  # type: ignore[attr-defined]
    for key in ("reward", "gold", "judge"):
        spec = getattr(cfg, key, None)
        found.update(models_of(spec) if spec is not None else [])
    if isinstance(cfg, EvaluateConfig):
        found.update(baselines_of(cfg))
    places = {path for path in found if path is not None}
    for path in list(places):  # a policy of dpo as a reward needs its reference
        if (implicit := implicit_reward_of(path)) is not None:
            places.add(reference_folder(path, implicit))
    return sorted(places)


def brings_code(folder: Path) -> bool:
    """Whether a model folder, or an adapter's base, names Python files of its own, or may."""
    base = Path(adapter_base(folder) or folder)
    if not base.is_dir():  # on the hub
        return True
    places = (folder, base)
    files = [place / name for place in places for name in ("config.json", "tokenizer_config.json")]
    return any("auto_map" in read_object(file, {}) for file in files if file.is_file())
