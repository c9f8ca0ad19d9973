"""The tables that `evaluate` ends with."""

from pathlib import Path
from typing import Any

from rlhf_cli.config.schema import STAGES
from rlhf_cli.models.manifest import read_manifest
from rlhf_cli.reporting.console import table

Results = dict[str, dict[str, Any]]
"""Folder or hub id of a policy -> its figures; an estimate is {mean, stderr}."""


def show_report(policy: str, reference: str | None, results: Results, wins: Results) -> None:
    """Every stage of the policy's chain with its figures, then the policy against baselines."""
    home = Path(policy).parent

    def brief(path: str) -> str:
        return Path(path).name if Path(path).parent == home else path

    def place(path: str) -> int:
        stages = list(STAGES)
        stage = (read_manifest(path) or {}).get("stage", "")
        return stages.index(stage) if stage in stages else len(stages)

    chain = {**other_stages(home), **results}
    rows = [
        [
            brief(path),
            chain[path]["seconds"],
            *(plus_minus(chain[path].get(name)) for name in ("gold", "reward", "kl")),
            chain[path].get("text_loss"),
        ]
        for path in sorted(chain, key=place)
    ]
    title = "held-out prompts, mean ± standard error clustered by prompt"
    kl = "KL" if reference is None else f"KL to {brief(reference)}"
    table(title, ["stage", "seconds", "gold", "reward", kl, "held-out loss"], rows)
    if wins:
        shares = [
            [brief(path), w["win"], w["tie"], w["loss"], f"{w['low']:.3f} to {w['high']:.3f}"]
            for path, w in wins.items()
        ]
        heads = ["against", "win", "tie", "loss", "wins + ties/2, 95%"]
        table(f"{brief(policy)}, response by response", heads, shares)


def plus_minus(estimate: dict[str, float] | None) -> str | None:
    """1.23 ± 0.04."""
    return f"{estimate['mean']:.2f} ± {estimate['stderr']:.2f}" if estimate else None


def other_stages(folder: Path) -> Results:
    """The finished reward and generate stages of a folder, with their working time."""
    found = {}
    for file in sorted(folder.glob("*/stage.json")):
        manifest = read_manifest(file.parent) or {}
        if manifest.get("kind") in ("reward", "samples"):
            found[str(file.parent)] = {"seconds": manifest.get("seconds")}
    return found
