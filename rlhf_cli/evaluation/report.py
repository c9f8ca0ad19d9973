"""The tables that `evaluate` ends with, and those on how good a scorer is."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_cli.config.schema import EvaluateConfig
from rlhf_cli.config.stages import place_in_chain
from rlhf_cli.evaluation.judging import Report, calibration_of
from rlhf_cli.folders.manifest import read_manifest
from rlhf_cli.reporting.console import say, show, table
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


def show_report(cfg: EvaluateConfig, report: dict[str, Any]) -> None:
    """Every stage of the policy's chain with its figures, then who wins against whom."""
    policy, home = str(Path(cfg.policy)), Path(cfg.policy).parent

    def brief(path: str) -> str:
        return Path(path).name if Path(path).parent == home else path

    def place(path: str) -> int:
        return place_in_chain((read_manifest(path) or {}).get("stage"))

    chain = {**other_stages(home), **report["policies"]}
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
    kl = "KL" if cfg.reference is None else f"KL to {brief(cfg.reference)}"
    table(title, ["stage", "seconds", "gold", "reward", kl, "held-out loss"], rows)
    if wins := report["win_rates"]:
        show_wins(f"{brief(policy)}, response by response", "against", wins, brief)
    if wins := report["against_references"]:
        show_wins("against the references, response by response", "policy", wins, brief)
    show_temperatures(report["by_temperature"], brief)
    if ratings := report["ratings"]:
        rows = [
            [
                brief(path),
                round(each["rating"]),
                f"{each['low']:.0f} to {each['high']:.0f}",
                ", ".join(map(brief, each["not_separable"])) or "-",
            ]
            for path, each in ratings.items()
        ]
        title = f"ratings on Elo's scale, {brief(report['anchor'])} at 0"
        count = report["prompts"]
        table(title, ["", "rating", "95%", f"not separable at {count} prompts"], rows)


def show_wins(title: str, who: str, wins: Results, brief: Callable[[str], str]) -> None:
    """Win rates, a line each; of several with the corrected chance that they are even."""
    corrected = "p" if len(wins) == 1 else f"p (Holm, of {len(wins)})"
    shares = [
        [
            brief(path),
            *(f"{w[each]:.3f}" for each in ("win", "tie", "loss")),
            f"{w['low']:.3f} to {w['high']:.3f}",
            None if math.isnan(w["p_holm"]) else f"{w['p_holm']:.2g}",
        ]
        for path, w in wins.items()
    ]
    table(title, [who, "win", "tie", "loss", "wins + ties/2, 95%", corrected], shares)


def show_temperatures(by_temperature: dict[str, Any], brief: Callable[[str], str]) -> None:
    """Wins + ties / 2 of each policy at each temperature, against the references or the policy."""
    for against in ("against_references", "win_rates"):
        columns = {t: each[against] for t, each in by_temperature.items() if each[against]}
        if columns:
            names = dict.fromkeys(name for each in columns.values() for name in each)
            rows = [
                [brief(name), *(score(each.get(name)) for each in columns.values())]
                for name in names
            ]
            what = "the references" if against == "against_references" else "each baseline"
            title = f"wins + ties/2 against {what}, by temperature"
            table(title, ["", *columns], rows)


def score(won: dict[str, float] | None) -> str | None:
    """0.61 (0.55 to 0.67)."""
    if won is None:
        return None
    return f"{won['win'] + won['tie'] / 2:.2f} ({won['low']:.2f} to {won['high']:.2f})"


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
