"""What of runs is drawn: curves of training, rewards before and after, evaluations."""

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from rlhf_cli.evaluation.frontier import JUDGES, curves_of, runs_of
from rlhf_cli.evaluation.temperatures import temperature_panels
from rlhf_cli.reporting.plots import (
    BIN,
    Curve,
    curve_panel,
    histogram_panel,
    is_number,
    names_in,
    numbers,
    reliability_panels,
)
from rlhf_cli.reporting.terminal import on_one_line
from rlhf_cli.runs.out_files import STEP
from rlhf_cli.views.records import Record

if TYPE_CHECKING:
    from rlhf_cli.reporting.plots import Panel

MOST_POINTS = 200  # of a curve; more are drawn as means of neighbours, with their span
ALL_POINTS = 600  # of all curves of a panel
MOST_CURVES = 8  # in a panel, as many as there are colours
EVAL = "eval/"
ERRORS = ("_stderr", "_low", "_high")
TERMS = "reward/*/mean"
FIRST = (
    *("loss", "reward", TERMS, "gold", "rlhf_reward", "judge"),
    *("accuracy", "margin", "rewards/accuracy", "rewards/margin", "rewards/chosen"),
    *("rewards/rejected", "kl", "entropy", "length", "clip_fraction", "grad_norm/*"),
    *("tokens_per_second", "peak_memory", "calibration_error"),
)
"""Metrics that a stage's curves begin with, of those that it has; others come after them."""

# two-sided 95% quantiles of Student's t for 1, 2, ... degrees of freedom, as tables have them
STUDENT = (
    *(12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
NORMAL = 1.96


@dataclass
class Figure:
    """A picture with its title, and words on how to read it.

    name: of its file.
    panels: what is drawn, from top to bottom.
    said: what a reader who does not see it is told.
    table: HTML that a page has in place of the panels, which then are for files alone.
    whole: whether it takes the width of the page.
    """

    name: str
    title: str
    panels: list["Panel"]
    said: str = ""
    table: str = ""
    whole: bool = False


@dataclass
class Group:
    """Runs of a stage that differ in their seed alone; most are one run."""

    name: str
    records: list[Record] = field(default_factory=list)


# --------------------------------------------------------------------------- curves of training


def metrics_of(groups: Sequence[Group]) -> list[str]:
    """The metrics that vary, those of FIRST first; of held-out ones the name without `eval/`."""
    lows: dict[str, float] = {}
    highs: dict[str, float] = {}
    for row in (row for group in groups for record in group.records for row in record.metrics):
        for name, value in row.items():
            if name != "step" and is_number(value):
                lows[name] = min(lows.get(name, value), value)
                highs[name] = max(highs.get(name, value), value)
    varying = [name for name, low in lows.items() if low < highs[name] and not is_error(name, lows)]
    names = list(dict.fromkeys(name.removeprefix(EVAL) for name in varying))
    return sorted(names, key=_place)


def constants_of(groups: Sequence[Group]) -> dict[str, float]:
    """The metrics that have one value in all lines of all runs."""
    seen: dict[str, set[float]] = {}
    for row in (row for group in groups for record in group.records for row in record.metrics):
        for name, value in row.items():
            if name != "step" and is_number(value) and not is_error(name, row):
                seen.setdefault(name, set()).add(value)
    return {name: min(values) for name, values in seen.items() if len(values) == 1}


def first_of(names: Sequence[str]) -> list[str]:
    """The metrics that a stage's curves begin with; a single term of the reward says no more."""
    terms = fnmatch.filter(names, TERMS)
    return [
        name
        for name in names
        if _place(name) < len(FIRST) and (len(terms) > 1 or name not in terms)
    ]


def _place(name: str) -> int:
    return next((i for i, each in enumerate(FIRST) if fnmatch.fnmatch(name, each)), len(FIRST))


def training_figure(stage: str, metric: str, groups: Sequence[Group]) -> Figure | None:
    """A metric over steps: learnt from in lines, held-out in dashed ones; None without a point."""
    most = points_of_each(groups)
    curves = [
        curve
        for group in groups[:MOST_CURVES]
        for name in (metric, EVAL + metric)
        if (curve := curve_of(group, name, most))
    ]
    if not curves:
        return None
    names = [group.name for group in groups[:MOST_CURVES]]
    ends = "; ".join(
        f"{each.name}{' held out' if each.dashed else ''} from {each.y[0]:.4g} to {each.y[-1]:.4g}"
        for each in curves
    )
    panel = curve_panel(metric, "step", curves, names, titled=False)
    return Figure(plain(f"{stage}-{metric}"), metric, [panel], f"{metric} by step: {ends}")


def points_of_each(groups: Sequence[Group]) -> int:
    """How many points a curve has at most, beside those of other runs."""
    return min(MOST_POINTS, ALL_POINTS // min(len(groups), MOST_CURVES))


def curve_of(group: Group, metric: str, most: int = MOST_POINTS) -> Curve | None:
    """A metric over steps: of one run as it was logged, of several the mean and a 95% interval.

    The interval is Student's, of the mean over seeds, at the steps that at least two have. None
    without a value.
    """
    each = [by_step(record, metric) for record in group.records]
    dashed = metric.startswith(EVAL)
    if len(each) == 1:
        points = [(step, *point) for step, point in each[0].items()]
    else:
        steps = sorted(set().union(*each))
        points = [
            (step, *interval(values))
            for step in steps
            if len(values := [run[step][0] for run in each if step in run]) > 1
        ]
    if not points:
        return None
    points, thinned = thinned_to(most, points)
    x, y, low, high = (list(column) for column in zip(*points, strict=True))
    band = len(each) > 1 or thinned
    if not band and low == high:
        low = high = []
    return Curve(group.name, x, y, low, high, dashed=dashed, band=band)


def by_step(record: Record, metric: str) -> dict[float, tuple[float, float, float]]:
    """Value and ends of its 95% interval by step; both ends are the value where none is known."""
    found = {}
    for row in record.metrics:
        step, value = row.get("step"), row.get(metric)
        if is_number(step) and is_number(value):
            error = row.get(f"{metric}_stderr")
            half = NORMAL * error if is_number(error) else 0.0
            found[step] = (value, value - half, value + half)
    return found


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of at least two values, and the ends of its 95% interval by Student's t."""
    freedom = len(values) - 1
    quantile = STUDENT[freedom - 1] if freedom <= len(STUDENT) else NORMAL
    half = quantile * stdev(values) / math.sqrt(len(values))
    mean = fmean(values)
    return mean, mean - half, mean + half


Point = tuple[float, float, float, float]
"""x, y, and the ends of its interval."""


def thinned_to(most: int, points: Sequence[Point]) -> tuple[list[Point], bool]:
    """At most so many points, and whether neighbours were put together: their means and span."""
    if len(points) <= most:
        return list(points), False
    size = math.ceil(len(points) / most)
    blocks = [points[i : i + size] for i in range(0, len(points), size)]
    return [
        (
            block[-1][0],
            fmean(y for _, y, _, _ in block),
            min(low for _, _, low, _ in block),
            max(high for _, _, _, high in block),
        )
        for block in blocks
    ], True


# --------------------------------------------------------------------------- rewards


def rewards_in_training(record: Record, name: str) -> Figure | None:
    """Rewards of the samples that a run kept of its first and of its last tenth of steps."""
    rows = [
        (row["step"], row["reward"])
        for row in record.samples()
        if is_number(row.get("step")) and is_number(row.get("reward"))
    ]
    steps = sorted({step for step, _ in rows})
    if len(steps) < 2:
        return None
    count = max(1, len(steps) // 10)
    ends = {"first": set(steps[:count]), "last": set(steps[-count:])}
    values = {
        f"{words} {count} of {len(steps)} steps": [reward for step, reward in rows if step in own]
        for words, own in ends.items()
    }
    title = f"{name}: rewards at the start and at the end"
    return histogram(plain(f"rewards-{name}"), title, "reward", values)


def rewards_by_policy(record: Record, names: Callable[[str], str]) -> list[Figure]:
    """Rewards and gold of each policy beside those of the reference, as an evaluation has them."""
    reference, temperature = record.report.get("reference"), record.report.get("temperature")
    # as policies are named
    reference = str(Path(reference)) if isinstance(reference, str) else None
    scores: dict[str, dict[str, list[float]]] = {judge: {} for judge in JUDGES}
    for row in record.samples():
        if row.get("temperature", temperature) == temperature and isinstance(
            row.get("policy"), str
        ):
            for judge in JUDGES:
                if is_number(row.get(judge)):
                    scores[judge].setdefault(row["policy"], []).append(row[judge])
    figures = []
    for judge, by_policy in scores.items():
        before = by_policy.pop(reference, None) if reference is not None else None
        for policy, after in by_policy.items():
            values = {f"before: {names(str(reference))}": before} if before else {}
            values[f"after: {names(policy)}"] = after
            title = f"{names(policy)}: {judge}"
            figures.append(histogram(plain(f"{judge}-{names(policy)}"), title, judge, values))
    return figures


def histogram(
    name: str, title: str, measured: str, values: Mapping[str, Sequence[float]]
) -> Figure:
    """A histogram of each list of numbers, one over the other."""
    means = ", ".join(f"{each} mean {fmean(own):.3g} of {len(own)}" for each, own in values.items())
    return Figure(name, title, [histogram_panel(measured, values)], means)


# --------------------------------------------------------------------------- evaluations


def frontier_figures(report: Mapping[str, Any], names: Callable[[str], str]) -> list[Figure]:
    """Gold and reward over KL, with two standard errors."""
    points = report.get("frontier") or []
    paths = [*(point["policy"] for point in points), *runs_of(points)]
    called = {path: names(path) for path in paths}
    panels = {judge: curves for judge in JUDGES if (curves := curves_of(points, judge, called))}
    colours = names_in(panels)
    across = f"KL to {names(str(report.get('reference')))}, nats per response"
    return [
        Figure(
            plain(f"frontier-{judge}"),
            f"{judge} over KL",
            [curve_panel(judge, across, curves, colours)],
            points_said(curves, " nats"),
        )
        for judge, curves in panels.items()
    ]


def off_the_frontier(report: Mapping[str, Any], names: Callable[[str], str]) -> list[str]:
    """The policies of which a point cannot be drawn: its KL or a score is infinite or not known."""
    points = report.get("frontier") or []
    left = [
        names(point["policy"])
        for point in points
        for judge in JUDGES
        if judge in point
        and not (numbers(point.get("kl"), "mean") and numbers(point[judge], "mean"))
    ]
    return list(dict.fromkeys(left))


def temperature_figures(report: Mapping[str, Any], names: Callable[[str], str]) -> list[Figure]:
    """Wins and half the ties over the temperature of sampling."""
    panels = temperature_panels(report.get("by_temperature") or {}, names)
    colours = names_in(panels)
    return [
        Figure(
            plain(measured),
            measured,
            [curve_panel(measured, "sampling temperature", curves, colours)],
            points_said(curves),
        )
        for measured, curves in panels.items()
    ]


def ratings_figure(report: Mapping[str, Any], names: Callable[[str], str]) -> Figure | None:
    """Ratings on Elo's scale with 95% intervals, best first."""
    ratings = report.get("ratings") or {}
    return intervals_figure("ratings", "Ratings", "rating, Elo's scale", "rating", ratings, names)


def intervals_figure(
    name: str,
    title: str,
    across: str,
    key: str,
    found: Mapping[str, Mapping[str, Any]],
    names: Callable[[str], str],
) -> Figure | None:
    """A figure of each policy with its 95% interval, from top to bottom.

    Args:
        across: what is measured, as the axis says it.
        key: its name among what is found of a policy, beside low and high.
    """
    import altair as alt

    rows: list[dict[str, Any]] = []
    for path, each in found.items():
        if value := numbers(each, key):
            ends = dict(zip(("low", "high"), numbers(each, "low", "high") or [], strict=False))
            rows.append({"name": names(path), "value": value[0], **ends})
    if not rows:
        return None
    y = alt.Y("name:N").sort([row["name"] for row in rows]).title(None).axis(grid=False)
    base = alt.Chart(alt.Data(values=rows)).encode(y=y)
    bars = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2)
    bars = bars.encode(x=alt.X("low:Q").title(across).scale(zero=False, padding=8), x2="high:Q")
    dots = base.mark_circle(size=70, opacity=1).encode(
        x=alt.X("value:Q").title(across).scale(zero=False, padding=8),
        tooltip=[
            alt.Tooltip("name:N").title("policy"),
            alt.Tooltip("value:Q").title(key).format(".4~g"),
            *(alt.Tooltip(f"{end}:Q").format(".4~g") for end in ("low", "high")),
        ],
    )
    said = "; ".join(
        f"{row['name']} {row['value']:.4g}"
        + (f", {row['low']:.4g} to {row['high']:.4g}" if "low" in row else "")
        for row in rows
    )
    layers = [bars, dots] if any("low" in row for row in rows) else [dots]
    panel = alt.layer(*layers, height=30 * len(rows) + 10)
    return Figure(name, title, [panel], said)


def calibration_figure(report: Mapping[str, Any], name: str) -> Figure | None:
    """How often judgements of a scorer are right, over how sure it is of them."""
    bins = [each for each in report.get("calibration_bins") or [] if numbers(each, *BIN)]
    if not bins:
        return None
    error = report.get("calibration_error")
    known = f": calibration error {error:.3f}" if is_number(error) else ""
    words = "; ".join(
        "{accuracy:.3g} right of {count:.0f} at confidence {confidence:.3g}".format_map(each)
        for each in bins
        if each["count"]
    )
    return Figure(plain(f"calibration-{name}"), f"{name}{known}", reliability_panels(bins), words)


# --------------------------------------------------------------------------- words


def points_said(curves: Iterable[Curve], unit: str = "") -> str:
    """The points of all curves in words. Args: unit, that of x, with a space before it."""
    return "; ".join(
        f"{each.name} {y:.3g} at {x:.3g}{unit}"
        for each in curves
        for x, y in zip(each.x, each.y, strict=True)
    )


def names_for(paths: Iterable[str]) -> Callable[[str], str]:
    """What policies are called: by the last part of a path, a snapshot by that of its run as well,
    or by all of it where that is shared.
    """
    ends: dict[str, set[str]] = {}
    for path in paths:
        ends.setdefault(_end_of(path), set()).add(path)

    def name_of(path: str) -> str:
        end = _end_of(path)
        return on_one_line(end if len(ends.get(end, ())) < 2 else path)

    return name_of


def _end_of(path: str) -> str:
    parts = Path(path).parts
    return "/".join(parts[-2:] if parts and STEP.fullmatch(parts[-1]) else parts[-1:])


def plain(text: str) -> str:
    """A name that a file can have everywhere."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()[:80] or "figure"


def is_error(name: str, names: Iterable[str]) -> bool:
    """Whether a metric is an error or end of an interval of another one."""
    return any(name.endswith(end) and name.removesuffix(end) in names for end in ERRORS)
