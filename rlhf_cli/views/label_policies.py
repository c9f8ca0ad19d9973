"""How the policies behind the labels fare: whom they beat, their ratings, what was marked."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_cli.labelling.summary import inseparable
from rlhf_cli.labelling.tasks import RANDOM
from rlhf_cli.reporting.plots import numbers
from rlhf_cli.views import charts
from rlhf_cli.views.grids import Column, count_of, grid, share_of, within
from rlhf_cli.views.html import cell, listed, remark, said, with_stderr


def wins(report: Mapping[str, Any]) -> str:
    """Whom each policy beats, as labels have it, and a reward and a judge beside them."""
    tables = {
        "": report,
        ", by the reward": report.get("with_reward") or {},
        ", by the judge": report.get("judge") or {},
    }
    found = {
        (one, other, by): figures
        for by, each in tables.items()
        for one, others in (each.get("win_rates") or {}).items()
        for other, figures in others.items()
    }
    name_of = charts.names_for({name for one, other, _ in found for name in (one, other)})
    named = {
        f"{name_of(one)} over {name_of(other)}{by}": figures
        for (one, other, by), figures in sorted(found.items(), key=lambda each: each[0][:2])
    }
    note = (
        "A tie is half a win; brackets hold 95%. At equal length is what would be won if the "
        "responses of both had as many characters (2404.04475)."
    )
    body = grid("policies", named, OF_WINS)
    return body and body + remark(note)


def _score(each: Mapping[str, Any]) -> str | None:
    """Wins and half the ties, with their interval."""
    known = numbers(each, "win", "tie")
    return within("score")({**each, "score": known[0] + known[1] / 2}) if known else None


OF_WINS: dict[str, Column] = {
    "wins": _score,
    "ties": share_of("tie"),
    "at equal length": lambda each: with_stderr(each.get("at_equal_length"), "mean", "stderr"),
    "pairs": count_of("pairs"),
}
"""On one policy over another."""


def ratings(report: Mapping[str, Any]) -> str:
    """Of policies whose responses were rated and marked, the means."""
    scores = report.get("scores") or {}
    marks = {name for each in scores.values() for name, share in marked(each).items() if share}
    columns = {"rating": lambda each: with_stderr(each, "score", "stderr")}
    columns |= {"ratings": count_of("ratings")}
    columns |= {name.replace("_", " "): mark_of(name) for name in sorted(marks)}
    name_of = charts.names_for(scores)
    body = grid("policy", {name_of(path): each for path, each in scores.items()}, columns)
    against = with_stderr(report.get("contradictions"), "share", "stderr")
    note = f"The better ranked of two has the lower rating in {against} of the pairs."
    return body + (remark(note) if against else "")


def mark_of(name: str) -> Column:
    """How often a mark is there."""
    return lambda each: cell(marked(each), name, ".3f")


def marked(each: Mapping[str, Any]) -> Mapping[str, Any]:
    """The shares of a policy's responses that have each mark."""
    return each.get("marks") or {}


def policies(
    report: Mapping[str, Any], drawn: Callable[[Sequence[charts.Figure | None]], str]
) -> str:
    """How policies fare, with intervals, and whom the labels do not tell apart."""
    found = report.get("ratings") or {}
    name_of = charts.names_for(found)
    if any("up" in (each or {}) for each in found.values()):
        across = "share of responses that are good"
        figure = charts.intervals_figure("liked", "Good responses", across, "up", found, name_of)
        note = "Bars are 95%, clustered by prompt."
    else:
        figure = charts.ratings_figure({"ratings": found}, name_of)
        note = "Bradley-Terry on Elo's scale, over all pairs within a task; bars are 95%."
        alike = [
            f"{name_of(one)} and {name_of(other)}" for one, other in inseparable({"ratings": found})
        ]
        if left := [name_of(path) for path, each in found.items() if not numbers(each, "rating")]:
            note += f" Not rated: {listed(left)}."
        if alike:
            drawn_of = (report.get("selected") or {}).get(RANDOM, report)
            note += f" Not separable at {said(drawn_of.get('tasks'))} tasks: {listed(alike)}."
    if not (body := drawn([figure])):
        return ""
    return body + remark(note)
