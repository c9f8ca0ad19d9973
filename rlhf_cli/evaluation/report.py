"""The tables that `evaluate` ends with, and those on how good a scorer is."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_cli.config.schema import EvaluateConfig
from rlhf_cli.config.secrets import referenced
from rlhf_cli.config.stages import place_in_chain
from rlhf_cli.evaluation.frontier import JUDGES, curves_of
from rlhf_cli.evaluation.judging import Report, calibration_of
from rlhf_cli.folders.files import write_text
from rlhf_cli.folders.manifest import read_manifest
from rlhf_cli.reporting.console import say, show, table
from rlhf_cli.reporting.metrics import JsonLines, round_figures
from rlhf_cli.reporting.plots import Curve, curves_picture, reliability_picture
from rlhf_cli.runs.out_folder import SAMPLES

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

LOSSES = ("text_loss", "demonstration_loss")

TEXT = {
    "distinct_2": "distinct",
    "repetition": "repeated",
    "copied": "copied",
    "self_bleu": "self-BLEU",
    "bleu": "BLEU",
}
"""Of the figures of text those that the table has, and how they are called there."""

AGAINST = {"against_references": "the references", "win_rates": "baselines"}
"""What win rates are against, by where the report has them."""

BUCKETS = {"score margin": "by_score_margin", "row margin": "by_row_margin", "group": "by_group"}
"""What a judgement's accuracies are told by, and where its report has them."""


def write_report(
    folder: Path, cfg: EvaluateConfig, report: dict[str, Any], samples: list[dict[str, object]]
) -> None:
    """report.json, samples.jsonl, and pictures of what is better seen."""
    write_text(
        folder / "report.json", json.dumps(round_figures(referenced(report)), indent=2) + "\n"
    )
    file = JsonLines(folder / SAMPLES)
    for line in samples:
        file.append(line, digits=None)  # of a row's own columns nothing is rounded
    names = {path: brief(cfg, path) for path in report["policies"]}
    panels = {
        judge: curves for judge in JUDGES if (curves := curves_of(report["frontier"], judge, names))
    }
    if panels:
        title = "points of policies with two standard errors; at equal KL, higher is better"
        across = f"KL to {brief(cfg, cfg.reference or '')}, nats per response"
        curves_picture(folder / "frontier.png", title, across, panels)
    panels = temperature_panels(report["by_temperature"], lambda path: brief(cfg, path))
    if panels:
        title = f"wins and half the ties, 95%, on {report['prompts']} prompts"
        curves_picture(folder / "win_rates.png", title, "sampling temperature", panels)


def temperature_panels(
    by_temperature: dict[str, Any], name_of: Callable[[str], str]
) -> dict[str, list[Curve]]:
    """Win rates over temperature, as a picture has them: by whom they are against, by policy."""
    panels: dict[str, list[Curve]] = {}
    for key, against in AGAINST.items():
        won: dict[str, list[tuple[float, float, float, float]]] = {}
        for temperature, found in by_temperature.items():
            for path, w in found[key].items():
                point = float(temperature), w["win"] + w["tie"] / 2, w["low"], w["high"]
                won.setdefault(path, []).append(point)
        if won:
            curves = panels[f"score against {against}"] = []
            for path, points in won.items():
                x, y, low, high = (list(each) for each in zip(*points, strict=True))
                curves.append(Curve(name_of(path), x, y, low, high))
    return panels


def brief(cfg: EvaluateConfig, path: str) -> str:
    """A policy beside the one that is judged by its last name."""
    return Path(path).name if Path(path).parent == Path(cfg.policy).parent else path


def show_report(cfg: EvaluateConfig, report: dict[str, Any]) -> None:
    """Every stage of the policy's chain with its figures, then who wins against whom."""
    policy, home = str(Path(cfg.policy)), Path(cfg.policy).parent
    name_of = partial(brief, cfg)

    def place(path: str) -> int:
        return place_in_chain((read_manifest(path) or {}).get("stage"))

    chain = {**({} if cfg.samples else other_stages(home)), **report["policies"]}
    rows = [
        [
            name_of(path),
            chain[path].get("seconds"),
            *(plus_minus(chain[path].get(name)) for name in ("gold", "reward", "kl")),
            chain[path].get("text_loss"),
        ]
        for path in sorted(chain, key=place)
    ]
    title = "held-out prompts, mean ± standard error clustered by prompt"
    kl = "KL" if cfg.reference is None else f"KL to {name_of(cfg.reference)}"
    table(title, ["stage", "seconds", "gold", "reward", kl, "held-out loss"], rows)
    show_tax(report, name_of)
    show_text(report, name_of)
    if wins := report["win_rates"]:
        show_wins(f"{name_of(policy)}, response by response", "against", wins, name_of)
    if wins := report["against_references"]:
        show_wins("against the references, response by response", "policy", wins, name_of)
    show_temperatures(report["by_temperature"], name_of)
    show_best_of(cfg, report)
    if ratings := report["ratings"]:
        rows = [
            [
                name_of(path),
                round(each["rating"]),
                f"{each['low']:.0f} to {each['high']:.0f}",
                ", ".join(map(name_of, each["not_separable"])) or "-",
            ]
            for path, each in ratings.items()
        ]
        title = f"ratings on Elo's scale, {name_of(report['anchor'])} at 0"
        count = report["prompts"]
        table(title, ["", "rating", "95%", f"not separable at {count} prompts"], rows)


def show_tax(report: dict[str, Any], name_of: Callable[[str], str]) -> None:
    """What of the reference was forgotten, where choices were asked or losses have changed."""
    rows = [
        [
            name_of(path),
            *(plus_minus(each.get(f"{name}_change"), 3) for name in LOSSES),
            plus_minus(each.get("choices"), 3),
            plus_minus(each.get("choices_change"), 3),
        ]
        for path, each in report["policies"].items()
        if "text_loss_change" in each or "choices" in each
    ]
    if len(rows) > 1 or report["choices_by_chance"] is not None:
        heads = ["text loss", "demonstration loss", "choices right", "change"]
        table("tax: change of losses from the reference, paired by row", ["", *heads], rows)


def show_text(report: dict[str, Any], name_of: Callable[[str], str]) -> None:
    """The health of what each policy writes."""
    names = [name for name in TEXT if any(name in of["text"] for of in report["policies"].values())]
    rows = [
        [
            name_of(path),
            f"{each['length']:.1f}",
            f"{each['ended']:.3f}",
            *(decimals(mean_in(each["text"].get(name))) for name in names),
        ]
        for path, each in report["policies"].items()
    ]
    heads = [TEXT[name] for name in names]
    table("health of the text", ["", "tokens", "ended", *heads], rows)


def mean_in(figure: float | dict[str, float] | None) -> float | None:
    """A figure, or the mean of an estimate."""
    return figure["mean"] if isinstance(figure, dict) else figure


def show_wins(title: str, who: str, wins: Results, name_of: Callable[[str], str]) -> None:
    """Win rates, a line each; of several with the corrected chance that they are even."""
    corrected = "p" if len(wins) == 1 else f"p (Holm, of {len(wins)})"
    shares = [
        [
            name_of(path),
            *(f"{w[each]:.3f}" for each in ("win", "tie", "loss")),
            f"{w['low']:.3f} to {w['high']:.3f}",
            None if math.isnan(w["p_holm"]) else f"{w['p_holm']:.2g}",
        ]
        for path, w in wins.items()
    ]
    table(title, [who, "win", "tie", "loss", "wins + ties/2, 95%", corrected], shares)


def show_temperatures(by_temperature: dict[str, Any], name_of: Callable[[str], str]) -> None:
    """Wins + ties / 2 of each policy at each temperature, against the references or the policy."""
    for against, what in AGAINST.items():
        columns = {t: each[against] for t, each in by_temperature.items() if each[against]}
        if columns:
            names = dict.fromkeys(name for each in columns.values() for name in each)
            rows = [
                [name_of(name), *(score(each.get(name)) for each in columns.values())]
                for name in names
            ]
            title = f"wins + ties/2 against {what}, by temperature"
            table(title, ["", *columns], rows)


def score(won: dict[str, float] | None) -> str | None:
    """0.61 (0.55 to 0.67)."""
    if won is None:
        return None
    return f"{won['win'] + won['tie'] / 2:.2f} ({won['low']:.2f} to {won['high']:.2f})"


def show_best_of(cfg: EvaluateConfig, report: dict[str, Any]) -> None:
    """What the best of n samples of the reference would have, or of the policy without one."""
    reference = str(Path(cfg.reference or ""))
    path = reference if reference in report["policies"] else str(Path(cfg.policy))
    if best := report["policies"][path].get("best_of"):
        rows = [
            [n, *(plus_minus(of.get(judge)) for judge in JUDGES), f"{of['kl_bound']:.2f}"]
            for n, of in best.items()
        ]
        title = f"best of n samples of {brief(cfg, path)}, chosen by reward"
        table(title, ["n", *JUDGES, "KL to one sample, at most"], rows)


def plus_minus(estimate: dict[str, float] | None, digits: int = 2) -> str | None:
    """1.23 ± 0.04."""
    if not estimate:
        return None
    return f"{estimate['mean']:.{digits}f} ± {estimate['stderr']:.{digits}f}"


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
