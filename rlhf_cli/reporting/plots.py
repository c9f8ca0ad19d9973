"""Pictures of reports; matplotlib is imported where one is drawn, for it is slow to import."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_cli.objectives.estimates import Calibration

INCHES = (4.5, 5.0)
DOTS_PER_INCH = 150


def reliability_picture(file: Path, calibration: Calibration, title: str) -> None:
    """A PNG of the share right over the confidence of each bin, above how many each bin holds.

    Points on the diagonal are calibrated, points below it overconfident. The same calibration
    makes the same bytes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bins = calibration.bins
    lows, widths = [b.low for b in bins], [b.high - b.low for b in bins]
    start = 0.5 if min(lows, default=0.0) >= 0.5 else 0.0  # confidence in the preferred of two
    figure = Figure(INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    curve, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    curve.plot([start, 1], [start, 1], color="0.6", linestyle="--", label="calibrated")
    label = f"scorer, calibration error {calibration.error:.3f}"
    curve.plot([b.confidence for b in bins], [b.accuracy for b in bins], marker="o", label=label)
    curve.set_title(title, wrap=True, parse_math=False)  # a path may hold a dollar
    curve.set(ylabel="share right", xlim=(start, 1), ylim=(0, 1.02))
    curve.legend(loc="best", frameon=False)
    counts.bar(lows, [b.count for b in bins], widths, align="edge", edgecolor="white")
    counts.set(xlabel="confidence", ylabel="count")
    for axes in (curve, counts):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format="png", metadata={"Software": None})  # no version in the bytes


def lengths_picture(file: Path, lengths: Mapping[str, Sequence[int]]) -> None:
    """A PNG with a histogram of each list of lengths, in tokens, by name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    grid = figure.subplots(len(lengths), 1, squeeze=False)
    for axes, (name, values) in zip(grid[:, 0], lengths.items(), strict=True):
        axes.hist(values, bins=40, edgecolor="white")
        axes.set(xlabel=name.replace("_", " "), ylabel="count")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format="png", metadata={"Software": None})


@dataclass
class Curve:
    """Points of a picture under one name, from left to right.

    low, high: ends of their error bars; none without.
    joined: whether a line goes through them.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = field(default_factory=list)
    high: Sequence[float] = field(default_factory=list)
    joined: bool = True


def curves_picture(
    file: Path, title: str, across: str, panels: Mapping[str, Sequence[Curve]]
) -> None:
    """A PNG with a panel above the other for each thing that is measured, over the same x.

    Args:
        across: what x is.
        panels: curves by what their y is; a name has one colour in all of them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wide, high = INCHES
    figure = Figure(
        (1.4 * wide, 0.75 * high * len(panels)), dpi=DOTS_PER_INCH, layout="constrained"
    )
    FigureCanvasAgg(figure)  # draws without a display
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    names = list(dict.fromkeys(curve.name for curves in panels.values() for curve in curves))
    for axes, (measured, curves) in zip(grid, panels.items(), strict=True):
        for curve in curves:
            look = {"color": f"C{names.index(curve.name) % 10}", "label": curve.name}
            line = "-" if curve.joined else "none"
            if curve.low:
                down = [y - low for y, low in zip(curve.y, curve.low, strict=True)]
                up = [high - y for y, high in zip(curve.y, curve.high, strict=True)]
                bars = {"yerr": [down, up], "capsize": 2}
                axes.errorbar(curve.x, curve.y, marker="o", linestyle=line, **bars, **look)
            else:
                axes.plot(curve.x, curve.y, marker=".", linestyle=line, alpha=0.6, **look)
        axes.set(ylabel=measured)
        axes.spines[["top", "right"]].set_visible(False)
    grid[-1].set(xlabel=across)
    grid[0].set_title(title, wrap=True, parse_math=False)
    for label in grid[0].legend(loc="best", frameon=False, fontsize="small").get_texts():
        label.set_parse_math(False)  # a path may hold a dollar
    figure.savefig(file, format="png", metadata={"Software": None})
