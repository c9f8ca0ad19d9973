"""The tables that `evaluate` ends with, and those on how good a scorer is."""

import json
from pathlib import Path
from typing import Any

from rlhf_cli.config.stages import place_in_chain
from rlhf_cli.evaluation.judging import Report, calibration_of
from rlhf_cli.folders.manifest import read_manifest
from rlhf_cli.reporting.console import say, table
from rlhf_cli.reporting.grid import show
from rlhf_cli.reporting.metrics import round_figures
from rlhf_cli.reporting.plots import reliability_picture

Results = dict[str, dict[str, Any]]
"""Folder or hub id of a policy -> its figures; an estimate is {mean, stderr}."""

FIGURES = {
    "accuracy": "accuracy",
    "base_rate": "base rate",
    "auc": "AUC",
    "kendall_tau": "Kendall tau",
    "top1": "best on top",
    "top1_chance": "by chance",
    "mse": "squared error",
    "r2": "R2",
    "correlation": "correlation",
    "loss": "loss",
    "calibration_error": "calibration error",
    "length_correlation": "correlation with tokens",
    "longer_preferred": "longer one (tokens) preferred",
    "longer_chosen": "longer one chosen",
}
"""What the headline of a judgement names, and how."""

BUCKETS = {"score margin": "by_score_margin", "row margin": "by_row_margin", "group": "by_group"}
"""What a judgement's accuracies are told by, and where its report has them."""


def show_report(policy: str, reference: str | None, results: Results, wins: Results) -> None:
    """Every stage of the policy's chain with its figures, then the policy against baselines."""
    home = Path(policy).parent

    def brief(path: str) -> str:
        return Path(path).name if Path(path).parent == home else path

    def place(path: str) -> int:
        return place_in_chain((read_manifest(path) or {}).get("stage"))

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
    stages = {}
    for file in sorted(folder.glob("*/stage.json")):
        manifest = read_manifest(file.parent) or {}
        if manifest.get("kind") in ("reward", "samples"):
            stages[str(file.parent)] = {"seconds": manifest.get("seconds")}
    return stages


def show_judgement(name: str, report: Report) -> None:
    """How good a scorer is: a line of figures, then accuracy by bucket and calibration by bin."""
    counted = ("rankings", "pairs", "labels", "targets", "prompts")
    counts = [f"{report[things]} {things}" for things in counted if things in report]
    figures = [figure(report, key, words) for key, words in FIGURES.items() if key in report]
    say("; ".join([f"{name}: {', '.join(counts)}", *figures]))
    rows: list[list[object]] = [
        [
            by,
            part.get("group") or span(part),
            decimals(part["accuracy"]),
            interval(part),
            part["pairs"],
        ]
        for by, parts in BUCKETS.items()
        for part in report.get(parts, [])
    ]
    if rows:
        if "longer_accuracy" in report:
            rule = decimals(report["longer_accuracy"])
            rows.append(["rule", "longer is better", rule, None, report["pairs"]])
        table(f"{name}: accuracy", ["by", "value", "accuracy", "95%", "count"], rows)
    if bins := report.get("calibration_bins"):
        rows = [
            [span(part), decimals(part["confidence"]), decimals(part["accuracy"]), part["count"]]
            for part in bins
        ]
        table(f"{name}: calibration", ["confidence", "mean", "share right", "count"], rows)


def write_judgement(folder: Path, report: Report, title: str) -> None:
    """report.json, and the picture of the calibration where there is one."""
    text = json.dumps(round_figures(report), indent=2) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    if "calibration_bins" in report:
        reliability_picture(folder / "reliability.png", calibration_of(report), title)


def figure(report: Report, key: str, words: str) -> str:
    """accuracy 0.712 ± 0.014 (95% 0.684 to 0.739), with as much of it as the report has."""
    shown = f"{words} {decimals(report[key])}"
    if f"{key}_stderr" in report:
        shown += f" ± {decimals(report[f'{key}_stderr'])}"
    return f"{shown} (95% {interval(report)})" if f"{key}_low" in report else shown


def interval(part: dict[str, Any]) -> str:
    """0.684 to 0.739."""
    return f"{decimals(part['accuracy_low'])} to {decimals(part['accuracy_high'])}"


def decimals(value: float | None) -> str:
    """0.712; a dash for None."""
    return "-" if value is None else f"{value:.3f}"


def span(part: dict[str, Any]) -> str:
    """From low to high."""
    low, high = show(part["low"]), show(part["high"])
    return low if low == high else f"{low} to {high}"
