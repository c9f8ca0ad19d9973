"""The table and lines that `evaluate` ends with, and its files."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_cli.config.schema.stages import EvaluateConfig
from rlhf_cli.config.secrets import referenced
from rlhf_cli.config.stages import place_in_chain
from rlhf_cli.evaluation.beside import lines_beside, plus_minus
from rlhf_cli.evaluation.frontier import JUDGES, curves_of, runs_of, snapshots_in
from rlhf_cli.evaluation.judging import Report, calibration_of
from rlhf_cli.evaluation.temperatures import temperature_panels
from rlhf_cli.folders.files import write_text
from rlhf_cli.folders.manifest import read_manifest
from rlhf_cli.reporting.console import say, table
from rlhf_cli.reporting.grid import show, side_by_side
from rlhf_cli.reporting.metrics import JsonLines, round_figures
from rlhf_cli.reporting.plots import curves_picture, reliability_picture
from rlhf_cli.reporting.terminal import width
from rlhf_cli.runs.out_files import SAMPLES

Results = dict[str, dict[str, Any]]
"""Folder or hub id of a policy -> its figures; an estimate is {mean, stderr}."""

MOST, MOST_PAIRS = 5, 3  # policies in a table, and pairs of them; report.json has them all

DISPENSABLE = ("held-out loss", "beats references", "rating")
"""Columns that a narrow table goes without, in the order in which they go."""


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
    points = report["frontier"]
    names = {path: brief(cfg, path) for path in (*report["policies"], *runs_of(points))}
    panels = {judge: curves for judge in JUDGES if (curves := curves_of(points, judge, names))}
    if panels:
        title = "points of policies with two standard errors; at equal KL, higher is better"
        across = f"KL to {brief(cfg, cfg.reference or '')}, nats per response"
        curves_picture(folder / "frontier.png", title, across, panels)
    panels = temperature_panels(report["by_temperature"], lambda path: brief(cfg, path))
    if panels:
        title = f"wins and half the ties, 95%, on {report['prompts']} prompts"
        curves_picture(folder / "win_rates.png", title, "sampling temperature", panels)


def brief(cfg: EvaluateConfig, path: str) -> str:
    """A policy beside the one that is judged, or below its folder, by the rest of its path."""
    folder = Path(cfg.policy).parent
    return str(Path(path).relative_to(folder)) if folder in Path(path).parents else path


def show_report(cfg: EvaluateConfig, report: dict[str, Any]) -> None:
    """Policies in the order of the chain, with their figures, wins and ratings; then a line each
    for what was asked for beside them.
    """
    name_of, results = partial(brief, cfg), report["policies"]
    policy = judged_first(results)

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
        f"{name_of(policy)} wins": lambda path: won(report["win_rates"].get(path)),
        "beats references": lambda path: won(report["against_references"].get(path)),
        "rating": lambda path: round(ratings[path]["rating"]) if path in ratings else None,
    }
    beside = lines_beside(report, policy, name_of)
    first, snapshots = (policy, str(Path(cfg.reference or ""))), snapshots_in(report["frontier"])
    kept = sorted(results, key=lambda path: (path not in first, path in snapshots, place(path)))
    kept = kept[: MOST - len(beside)]
    rows = [[cell(path) for cell in columns.values()] for path in sorted(kept, key=place)]
    used = {head: i for i, head in enumerate(columns) if any(row[i] is not None for row in rows)}
    dropped = []
    for head in (*DISPENSABLE, *cfg.scorers):
        cells = [[show(row[i]) for i in used.values()] for row in rows]
        if head in used and not side_by_side(list(used), cells, width()):
            dropped.append(head)
            del used[head]
    table("", list(used), [[row[i] for i in used.values()] for row in rows])
    say(remarks(cfg, report, len(results) - len(rows), dropped))
    for line in beside:
        say(line)


def judged_first(results: Results) -> str:
    """The policy whose win rates are told; with samples=FILE the first that the file names."""
    return next(iter(results))


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


def remarks(cfg: EvaluateConfig, report: dict[str, Any], left: int, dropped: list[str]) -> str:
    """How the table is to be read, and what it cannot tell apart; in one line.

    Args:
        left: how many policies it leaves out, if any.
        dropped: the columns that it has no room for.
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
    if unseen := [*([f"{left} more policies"] if left else []), *dropped]:
        told.append(f"in report.json: {', '.join(unseen)}")
    return "; ".join(told)


def verdict(cfg: EvaluateConfig, results: Results) -> str:
    """What an evaluation says, in a sentence: the policy, what it gained, and who is the best."""
    name_of, policy = partial(brief, cfg), judged_first(results)
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


def write_judgement(folder: Path, report: Report, title: str) -> None:
    """report.json, and the picture of the calibration where there is one."""
    text = json.dumps(round_figures(report), indent=2) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    if "calibration_bins" in report:
        reliability_picture(folder / "reliability.png", calibration_of(report), title)
