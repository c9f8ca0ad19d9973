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
from rlhf_cli.reporting.console import say, table
from rlhf_cli.reporting.metrics import JsonLines, round_figures
from rlhf_cli.reporting.plots import Curve, curves_picture, reliability_picture
from rlhf_cli.runs.out_folder import SAMPLES

Results = dict[str, dict[str, Any]]
"""Folder or hub id of a policy -> its figures; an estimate is {mean, stderr}."""

MOST, MOST_PAIRS = 5, 3  # policies in a table, and pairs of them; report.json has them all

LOSSES = ("text_loss", "demonstration_loss")

BIASES = ("consistency", "first_slot", "longer_wins")

CONSISTENT = 0.6  # share of pairs; a judge below it is warned of

AGAINST = {"against_references": "the references", "win_rates": "baselines"}
"""What win rates are against, by where the report has them."""


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
    """Every policy in the order of the chain, with its figures, wins and rating.

    Then win rates over temperature, where several were asked for.
    """
    name_of, results = partial(brief, cfg), report["policies"]

    def place(path: str) -> int:
        return place_in_chain((read_manifest(path) or {}).get("stage"))

    ratings = report["ratings"]
    kl = "KL" if cfg.reference is None else f"KL to {name_of(cfg.reference)}"
    columns: dict[str, Callable[[str], object]] = {
        "policy": name_of,
        **{name: partial(_estimate, results, name) for name in JUDGES},
        **{spec: partial(_estimate, results, f"scores/{spec}") for spec in cfg.scorers},
        kl: partial(_kl, results),
        "held-out loss": lambda path: results[path].get("text_loss"),
        f"{name_of(str(Path(cfg.policy)))} wins": lambda path: won(report["win_rates"].get(path)),
        "beats references": lambda path: won(report["against_references"].get(path)),
        "rating": lambda path: round(ratings[path]["rating"]) if path in ratings else None,
    }
    paths = sorted(results, key=place)
    rows = [[cell(path) for cell in columns.values()] for path in paths]
    used = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
    heads = [list(columns)[i] for i in used]
    table("", heads, [[row[i] for i in used] for row in rows[:MOST]])
    say(remarks(cfg, report, len(rows) - MOST))
    if report["choices_by_chance"] is not None:
        show_tax(report, name_of)
    if "judge" in report:
        show_judge(report["judge"], name_of(str(Path(cfg.policy))), name_of)
    show_temperatures(report["by_temperature"], name_of)


def _estimate(results: Results, name: str, path: str) -> str | None:
    return plus_minus(results[path].get(name))


def _kl(results: Results, path: str) -> str | None:
    """Of the best of n what it is at most."""
    figures = results[path]
    if bound := plus_minus(figures.get("kl_bound")):
        return f"at most {bound}"
    return plus_minus(figures.get("kl"))


def won(rate: dict[str, float] | None) -> str | None:
    """0.62 (p 0.03): wins and half the ties, and the corrected chance that they are even."""
    if rate is None:
        return None
    share = f"{rate['win'] + rate['tie'] / 2:.2f}"
    return share if math.isnan(rate["p_holm"]) else f"{share} (p {rate['p_holm']:.2g})"


def remarks(cfg: EvaluateConfig, report: dict[str, Any], left: int) -> str:
    """How the table is to be read, and what it cannot tell apart; in one line.

    Args:
        left: how many policies it leaves out, if any.
    """
    told = ["± standard error, clustered by prompt"]
    several = max(len(report["win_rates"]), len(report["against_references"]))
    if several:
        told.append("wins with half the ties" + f", p by Holm of {several}" * (several > 1))
    ratings, name_of = report["ratings"], partial(brief, cfg)
    if ratings:
        told.append(f"ratings on Elo's scale, {name_of(report['anchor'])} at 0")
        pairs = {
            tuple(sorted(map(name_of, (path, other))))
            for path, each in ratings.items()
            for other in each["not_separable"]
        }
        alike = ", ".join(f"{one} and {other}" for one, other in sorted(pairs)[:MOST_PAIRS])
        more = f", {len(pairs) - MOST_PAIRS} more" if len(pairs) > MOST_PAIRS else ""
        told += [f"not separable at {report['prompts']} prompts: {alike}{more}"] if alike else []
    if left > 0:
        told.append(f"{left} more policies in report.json")
    return "; ".join(told)


def verdict(cfg: EvaluateConfig, results: Results) -> str:
    """What an evaluation says, in a sentence: the policy, what it gained, and who is the best."""
    name_of, policy = partial(brief, cfg), str(Path(cfg.policy))
    reference = str(Path(cfg.reference)) if cfg.reference else None
    ours = results[policy]
    judge = "gold" if ours.get("gold") else "reward"
    if not ours.get(judge):
        return "no response of the policy has a score"
    line = f"{judge} of {name_of(policy)} is {plus_minus(ours[judge])}"
    gain = ours.get("gain_over_reference")
    if reference not in (None, policy) and gain:
        way = "above" if gain["mean"] >= 0 else "below"
        size = plus_minus({**gain, "mean": abs(gain["mean"])})
        line += f", {size} {way} {name_of(reference)} on the same prompts"
    before = results.get(reference or "", {}).get("reward")
    fell = judge == "gold" and gain is not None and gain["mean"] < 0
    if fell and before and ours.get("reward") and ours["reward"]["mean"] > before["mean"]:
        line += f", though the reward rose to {plus_minus(ours['reward'])}: it is fooled"
    others = {path: each[judge] for path, each in results.items() if each.get(judge)}
    best = max(others, key=lambda path: others[path]["mean"])
    if best != policy:
        line += f"; the highest is {name_of(best)} with {plus_minus(others[best])}"
    return line


def show_tax(report: dict[str, Any], name_of: Callable[[str], str]) -> None:
    """What of the reference was forgotten: losses, and the choices that were asked for."""
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
    heads = ["policy", "text loss", "demonstration loss", "choices right", "change"]
    table("tax: change of losses from the reference, paired by row", heads, rows)


def show_judge(judge: dict[str, Any], policy: str, name_of: Callable[[str], str]) -> None:
    """Win rates by a language model, raw and at equal length, and what it goes by."""
    rows = [
        [
            name_of(path),
            *(f"{w[each]:.3f}" for each in ("win", "tie", "loss")),
            f"{w['low']:.3f} to {w['high']:.3f}",
            plus_minus(w["at_equal_length"], 3),
            w["failed"],
        ]
        for path, w in judge["win_rates"].items()
    ]
    heads = ["against", "win", "tie", "loss", "wins + ties/2, 95%", "at equal length", "failed"]
    table(f"{policy} as {judge['judge']} judges", heads, rows)
    words = {"consistency": "both orders agree", "first_slot": "first shown preferred"}
    shown = [
        f"{words.get(name, 'longer one wins')} {share_of(each)}"
        for name in BIASES
        if (each := judge[name])
    ]
    counts = f"{judge['calls']} calls, {judge['cached']} answers kept before"
    say(f"judge: {'; '.join([*shown, counts])}")
    for other, agrees in judge["agreement"].items():
        if agrees is not None and agrees["pairs"]:
            say(
                f"judge: agrees with {other} on {share_of(agrees)} of {agrees['pairs']} pairs, "
                f"undecided on {decimals(agrees['tied'])}; a coin on 0.5"
            )
    if (same := judge["consistency"]) and same["mean"] < CONSISTENT:
        say(
            "note: the judge often changes its mind with the order of two responses: what it says "
            "of them is little"
        )


def share_of(share: dict[str, float]) -> str:
    """0.712 (95% 0.640 to 0.774)."""
    low, high = decimals(share["low"]), decimals(share["high"])
    return f"{decimals(share['mean'])} (95% {low} to {high})"


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


def plus_minus(estimate: dict[str, float] | None, digits: int = 2) -> str | None:
    """1.23 ± 0.04."""
    if not estimate:
        return None
    return f"{estimate['mean']:.{digits}f} ± {estimate['stderr']:.{digits}f}"


def write_judgement(folder: Path, report: Report, title: str) -> None:
    """report.json, and the picture of the calibration where there is one."""
    text = json.dumps(round_figures(report), indent=2) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    if "calibration_bins" in report:
        reliability_picture(folder / "reliability.png", calibration_of(report), title)


def decimals(value: float | None) -> str:
    """0.712; a dash for None."""
    return "-" if value is None else f"{value:.3f}"
