"""A report of labels in short: what the terminal shows of it, and what stage.json has."""

import math
from itertools import combinations

from rlhf_cli.labelling.outcomes import Figures
from rlhf_cli.labelling.tasks import RANDOM
from rlhf_cli.reporting.grid import with_error


def table_of(report: Figures) -> list[tuple[object, ...]]:
    """A line for each policy: its rating with its interval, and whom it is above."""
    lines: list[tuple[object, ...]] = []
    for name, each in (report["ratings"] or {}).items():
        if "up" in each:
            lines.append((name, each["up"], each["labels"]))
        else:
            ends = each["low"], each["high"]
            interval = "unknown" if math.isnan(ends[0]) else "{:.0f} to {:.0f}".format(*ends)
            lines.append(
                (name, round(each["rating"]), interval, ", ".join(each["above"]) or "none")
            )
    return lines


def inseparable(report: Figures) -> list[tuple[str, str]]:
    """Pairs of policies that the labels do not tell apart."""
    above = {
        name: each["above"]
        for name, each in (report["ratings"] or {}).items()
        if each and each.get("above") is not None
    }
    return [
        (ours, theirs)
        for ours, theirs in combinations(above, 2)
        if theirs not in above[ours] and ours not in above[theirs]
    ]


def labels_at_random(report: Figures) -> int:
    """The labels that agreement and ratings rest on."""
    selected = report["selected"]
    return int(selected[RANDOM]["labels"] if selected else report["labels"])


def headline(report: Figures) -> Figures:
    """The figures that stage.json has."""
    between, again = report["between_annotators"] or {}, report["with_themselves"] or {}
    reward, judge = report["with_reward"] or {}, report.get("with_judge") or {}
    told = {
        "labels": report["labels"],
        "left": report["left"],
        "ties": report.get("ties"),
        "agreement": between.get("agreement"),
        "agreement_stderr": between.get("stderr"),
        "alpha": between.get("alpha"),
        "alpha_low": between.get("alpha_low"),
        "alpha_high": between.get("alpha_high"),
        "self_agreement": again.get("agreement"),
        "reward_agreement": reward.get("agreement"),
        "judge_agreement": judge.get("agreement"),
    }
    return {name: value for name, value in told.items() if value is not None}


def beliefs(report: Figures) -> list[str]:
    """How far a judge and a reward can be believed how sure they are, where people have judged."""
    lines = []
    for who, found in (("judge", report.get("judge")), ("reward", report["with_reward"])):
        if (belief := (found or {}).get("calibration")) is not None:
            brier = with_error(belief["brier"], belief["brier_stderr"])
            lines.append(
                f"how sure the {who} is: Brier score {brier} (always saying one half has 0.25), "
                f"calibration error {belief['calibration_error']:.3f} on {belief['pairs']} pairs"
            )
    return lines


def alpha_with_ends(between: Figures) -> str:
    """Alpha with the ends of its interval, where it has one: `0.45, 0.31 to 0.58`."""
    told, low, high = (between[f"alpha{end}"] for end in ("", "_low", "_high"))
    return f"{told:.2f}" if low is None else f"{told:.2f}, {low:.2f} to {high:.2f}"


def sentence(report: Figures) -> str:
    """What was labelled, and how far it can be relied on."""
    told = f"{report['labels']} labels of {report['tasks']} tasks"
    if report["left"]:
        told += f", {report['left']} left"
    if report["selected"]:
        told += f"; ratings and agreement are of the {labels_at_random(report)} drawn at random"
    between, reward = report["between_annotators"], report["with_reward"]
    if between is not None:
        share = with_error(between["agreement"], between.get("stderr"))
        told += f"; annotators agree on {share} of {between['outcomes']} outcomes"
        told += f" (alpha {alpha_with_ends(between)})" if between["alpha"] is not None else ""
    if reward is not None:
        share = with_error(reward["agreement"], reward.get("stderr"))
        told += f"; the reward agrees with them on {share}"
    if (judge := report.get("with_judge")) is not None:
        share = with_error(judge["agreement"], judge.get("stderr"))
        told += f"; the judge agrees with them on {share}"
    return told
