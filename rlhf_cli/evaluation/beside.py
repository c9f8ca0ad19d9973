"""What `evaluate` says beside its table, a line for each thing that was asked for.

report.json has all of it, of every policy.
"""

from collections.abc import Callable, Mapping
from typing import Any

MOST = 3  # policies, in a line
LOSSES = ("text_loss", "demonstration_loss")
CONSISTENT = 0.6  # share of pairs; a judge below it is warned of
Report = Mapping[str, Any]


def lines_beside(report: Report, policy: str, name_of: Callable[[str], str]) -> list[str]:
    """The tax of alignment, what a language model says, and win rates over temperature.

    Args:
        policy: the one that is judged. name_of: what a policy is called.
    """
    lines = []
    if report["choices_by_chance"] is not None:
        lines.append(tax_line(report["policies"][policy], name_of(policy)))
    if "judge" in report:
        lines.append(judge_line(report["judge"], name_of(policy), name_of))
    if line := temperature_line(report["by_temperature"], policy, name_of):
        lines.append(line)
    return lines


def tax_line(figures: Report, name: str) -> str:
    """How losses and choices of a policy differ from the reference's, paired by row."""
    changed = [
        f"{each.replace('_', ' ')} {change['mean']:+.3f} ± {change['stderr']:.3f}"
        for each in LOSSES
        if (change := figures.get(f"{each}_change"))
    ]
    if right := plus_minus(figures.get("choices"), 3):
        change = figures.get("choices_change")
        told = f" ({change['mean']:+.3f} ± {change['stderr']:.3f})" if change else ""
        changed.append(f"choices right {right}{told}")
    return f"tax of {name} to the reference: {', '.join(changed)}"


def judge_line(judge: Report, policy: str, name_of: Callable[[str], str]) -> str:
    """Win rates by a language model, and whether it knows its own mind."""
    rates = [f"{name_of(path)} {score(w)}" for path, w in judge["win_rates"].items()]
    more = f" and {len(rates) - MOST} more" if len(rates) > MOST else ""
    told = f"wins against {', '.join(rates[:MOST])}{more}" if rates else "stands against nobody"
    line = f"{judge['judge']} as judge: {policy} {told}"
    if same := judge["consistency"]:
        line += f"; both orders agree in {same['mean']:.2f}"
        if same["mean"] < CONSISTENT:
            line += ": it often goes by the order, so what it says is little"
    for other, agrees in judge["agreement"].items():
        if agrees is not None and agrees["pairs"]:
            line += f"; it agrees with {other} on {agrees['mean']:.2f} of {agrees['pairs']} pairs"
    return line + (f"; {judge['failed']} pairs without a verdict" if judge["failed"] else "")


def temperature_line(
    by_temperature: Report, policy: str, name_of: Callable[[str], str]
) -> str | None:
    """Wins and half the ties of the policy at each temperature: against the references where the
    data has any, else against the first baseline. None where there is neither.
    """
    found = by_temperature.values()
    if any(policy in each["against_references"] for each in found):
        key, place, whom = "against_references", policy, "the references"
    elif (other := next((name for each in found for name in each["win_rates"]), None)) is not None:
        key, place, whom = "win_rates", other, name_of(other)
    else:
        return None
    each = [
        f"{share(rates[key][place]):.2f} at {t}"
        for t, rates in by_temperature.items()
        if place in rates[key]  # else no prompt has all scores there
    ]
    return f"by temperature {name_of(policy)} wins against {whom}: {', '.join(each)}"


def share(won: Report) -> float:
    """Wins and half the ties."""
    return float(won["win"] + won["tie"] / 2)


def score(won: Report) -> str:
    """0.61 (0.55 to 0.67)."""
    return f"{share(won):.2f} ({won['low']:.2f} to {won['high']:.2f})"


def plus_minus(estimate: Mapping[str, float] | None, digits: int = 2) -> str | None:
    """1.23 ± 0.04."""
    if not estimate:
        return None
    return f"{estimate['mean']:.{digits}f} ± {estimate['stderr']:.{digits}f}"
