"""Each policy against each other one: in a page a table, as a file a picture."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rlhf_cli.reporting.plots import numbers
from rlhf_cli.views.charts import Figure
from rlhf_cli.views.html import said, table

if TYPE_CHECKING:
    from rlhf_cli.reporting.plots import Panel

MOST_BESIDE = 7  # policies of a table that has room beside other figures
STRENGTH = 0.9  # of the colour of a cell, times how far its score is from one half

Scores = dict[tuple[str, str], tuple[float, list[float] | None]]
"""Of each against each other one wins and half the ties, with the ends of their interval."""


def matrix_figure(report: Mapping[str, Any], names: Callable[[str], str]) -> Figure | None:
    """What the policy of each row wins against that of each column; None where nothing is known.

    A page has a table, which scrolls beneath the names of its rows where columns have no room.
    """
    found = scores_of(report)
    if not found:
        return None
    order = list(report.get("ratings") or report["policies"])
    ones, others = (
        [each for each in order if any(each == pair[side] for pair in found)] for side in (0, 1)
    )
    lines = [
        [said(names(one)), *(_cell(found.get((one, other)), one == other) for other in others)]
        for one in ones
    ]
    heads = [f'<span class="upward">{said(names(each))}</span>' for each in others]
    text = table(["policy", *heads], lines, "of each row against each column", "matrix")
    panel = _panel(found, list(map(names, order)), names)
    title, whole = "Wins and half the ties", len(others) > MOST_BESIDE
    return Figure("wins", title, [panel], table=text, whole=whole)


def scores_of(report: Mapping[str, Any]) -> Scores:
    """All that is known; reports of old versions have those of the judged policy alone."""
    found = report.get("head_to_heads")
    if not found:
        policy = next(iter(report.get("policies") or {}), "")
        found = {policy: report.get("win_rates") or {}}
    return {
        (one, other): (shares[0] + shares[1] / 2, numbers(won, "low", "high"))
        for one, row in found.items()
        for other, won in row.items()
        if (shares := numbers(won, "win", "tie"))
    }


def _cell(score: tuple[float, list[float] | None] | None, itself: bool) -> str | None:
    if score is None:
        return "" if itself else None
    share, ends = score
    side = "good" if share >= 0.5 else "bad"
    interval = f"95%: {ends[0]:.3f} to {ends[1]:.3f}" if ends else "its interval is not known"
    look = f"--side: var(--{side}); --far: {STRENGTH * abs(share - 0.5):.0%}"
    return f'<span style="{look}" title="{share:.3f}, {interval}">{share:.2f}</span>'


def _panel(found: Scores, order: list[str], names: Callable[[str], str]) -> "Panel":
    import altair as alt

    rows = [
        {
            "one": names(one),
            "other": names(other),
            "score": score,
            "text": f"{score:.2f}",
            "far": abs(score - 0.5),
        }
        for (one, other), (score, _) in found.items()
    ]
    y = alt.Y("one:N").sort(order).title(None).axis(domain=False, ticks=False, grid=False)
    head = alt.Axis(orient="top", labelAngle=-30, domain=False, ticks=False, grid=False)
    x = alt.X("other:N").sort(order).title("against").axis(head)
    strength = alt.Opacity("far:Q").scale(domain=[0, 0.5], range=[0.06, 0.7]).legend(None)
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, y=y)
    cells = [
        base.transform_filter(f"datum.score {sign} 0.5")
        .mark_rect(style=style, cornerRadius=3)
        .encode(opacity=strength)
        for sign, style in ((">=", "win"), ("<", "loss"))
    ]
    words = base.mark_text().encode(text="text:N")
    count = len({row["one"] for row in rows})
    return alt.layer(*cells, words).properties(height=36 * count + 20)
