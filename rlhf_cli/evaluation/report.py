"""What `evaluate` ends with, and the files on how good a scorer is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_cli.config.stages import place_in_chain
from rlhf_cli.evaluation.judging import Report, calibration_of
from rlhf_cli.folders.manifest import read_manifest
from rlhf_cli.reporting.console import say, table
from rlhf_cli.reporting.metrics import round_figures
from rlhf_cli.reporting.plots import reliability_picture

Results = dict[str, dict[str, Any]]
"""Folder or hub id of a policy -> its figures; an estimate is {mean, stderr}."""

MOST = 5  # policies in a table; report.json has them all


def show_report(policy: str, reference: str | None, results: Results, wins: Results) -> None:
    """Every policy with its figures, in the order of the chain, and who wins against it."""
    brief = briefly(policy)

    def place(path: str) -> int:
        return place_in_chain((read_manifest(path) or {}).get("stage"))

    rows = [
        [
            brief(path),
            *(plus_minus(results[path].get(name)) for name in ("gold", "reward", "kl")),
            results[path].get("text_loss"),
            wins_of(wins[path]) if path in wins else None,
        ]
        for path in sorted(results, key=place)
    ]
    kl = "KL" if reference is None else f"KL to {brief(reference)}"
    heads = ["policy", "gold", "reward", kl, "held-out loss", f"{brief(policy)} wins, 95%"]
    table("held-out prompts, mean ± standard error clustered by prompt", heads, rows[:MOST])
    if len(rows) > MOST:
        say(f"and {len(rows) - MOST} more policies: report.json")


def briefly(policy: str) -> Callable[[str], str]:
    """How a path is written beside a policy: those in the same folder by their names alone."""
    home = Path(policy).parent
    return lambda path: Path(path).name if Path(path).parent == home else path


def wins_of(rate: dict[str, float]) -> str:
    """0.62 (0.53 to 0.71): wins and half the ties, with a 95% interval."""
    return f"{rate['win'] + rate['tie'] / 2:.2f} ({rate['low']:.2f} to {rate['high']:.2f})"


def verdict(policy: str, reference: str | None, results: Results) -> str:
    """What an evaluation says, in a sentence: the policy, what it gained, and who is the best."""
    brief, ours = briefly(policy), results[policy]
    judge = "gold" if ours.get("gold") else "reward"
    if not ours.get(judge):
        return "no response of the policy has a score"
    line = f"{judge} of {brief(policy)} is {plus_minus(ours[judge])}"
    gain = ours.get("gain_over_reference")
    if reference is not None and gain and str(Path(reference)) != policy:
        way = "above" if gain["mean"] >= 0 else "below"
        size = plus_minus({**gain, "mean": abs(gain["mean"])})
        line += f", {size} {way} {brief(reference)} on the same prompts"
    before = results.get(str(Path(reference)), {}).get("reward") if reference else None
    fell = judge == "gold" and gain is not None and gain["mean"] < 0
    if fell and before and ours.get("reward") and ours["reward"]["mean"] > before["mean"]:
        line += f", though the reward rose to {plus_minus(ours['reward'])}: it is fooled"
    others = {path: each[judge] for path, each in results.items() if each.get(judge)}
    best = max(others, key=lambda path: others[path]["mean"])
    if best != policy:
        line += f"; the highest is {brief(best)} with {plus_minus(others[best])}"
    return line


def plus_minus(estimate: dict[str, float] | None) -> str | None:
    """1.23 ± 0.04."""
    return f"{estimate['mean']:.2f} ± {estimate['stderr']:.2f}" if estimate else None


def write_judgement(folder: Path, report: Report, title: str) -> None:
    """report.json, and the picture of the calibration where there is one."""
    text = json.dumps(round_figures(report), indent=2) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    if "calibration_bins" in report:
        reliability_picture(folder / "reliability.png", calibration_of(report), title)
