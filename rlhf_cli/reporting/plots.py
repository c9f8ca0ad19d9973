"""Pictures of reports; matplotlib is imported where one is drawn, for it is slow to import."""

from collections.abc import Mapping, Sequence
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
