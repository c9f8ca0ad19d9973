"""Pictures: as files, and as specifications that a page draws with the same library.

Altair is imported where one is made, for that takes half a second. Colours are names until then: a
page puts its own in their place, light or dark.
"""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    import altair

    from rlhf_cli.objectives.estimates import Calibration

    Panel = altair.LayerChart | altair.FacetChart

WIDTH, HEIGHT = 420, 220  # pixels of a panel of a file, at a scale of 1
SCALE = 2.0
BINS = 40
BIN = ("low", "high", "confidence", "accuracy", "count")  # what a bin of judgements has
MOST_DOTS = 40  # points of a line that are seen as such
TITLE_COLUMNS = 58  # characters
SHORT_NAME = 20  # characters; two of these stand beside each other in a legend, on a phone too

LIGHT = {
    "page": "#ffffff",
    "card": "#f6f7f9",
    "text": "#1d1f23",
    "muted": "#59606b",
    "line": "#d5d9e0",
    "accent": "#1f5fbf",
    "good": "#1a7f4b",
    "bad": "#b3392f",
}
DARK = {
    "page": "#15171b",
    "card": "#1d2025",
    "text": "#e7e9ec",
    "muted": "#a0a8b3",
    "line": "#373c45",
    "accent": "#7fb0ff",
    "good": "#5cc98d",
    "bad": "#ff8f83",
}
# told apart with each kind of colour blindness, and at three to one against the page
_ON_LIGHT = ("#0072b2", "#d55e00", "#00855d", "#a8418f", "#8a6d00", "#4b5563", "#0f7f8f", "#b8860b")
_ON_DARK = ("#56b4e9", "#ff9e4a", "#35c79b", "#e58ad0", "#e6d04a", "#b3bac4", "#58c8d8", "#f0c987")
LIGHT |= {f"series-{i}": colour for i, colour in enumerate(_ON_LIGHT)}
DARK |= {f"series-{i}": colour for i, colour in enumerate(_ON_DARK)}
SERIES = len(_ON_LIGHT)
SHAPES = ("circle", "square", "triangle-up", "diamond")  # of points, each for a round of colours


def theme(colours: Mapping[str, str]) -> dict[str, Any]:
    """The look of all pictures, as Vega-Lite configures it. Args: colours, those of `LIGHT`."""
    text, muted, line = (colours[name] for name in ("text", "muted", "line"))
    axis = {
        "domainColor": line,
        "gridColor": line,
        "gridOpacity": 0.6,
        "labelColor": muted,
        "labelFontSize": 11,
        "tickColor": line,
        "tickCount": 5,
        "titleColor": muted,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
    }
    return {
        "background": colours["page"],
        "font": "system-ui, -apple-system, Segoe UI, Roboto, Liberation Sans, Arial, sans-serif",
        "axis": axis,
        "mark": {"color": colours["series-0"]},
        "legend": {
            "labelColor": text,
            "labelFontSize": 11,
            "labelLimit": 280,
            "orient": "top",
            "columns": 2,
            "symbolOpacity": 1,
            "symbolSize": 70,
            "title": None,
        },
        "range": {"category": [colours[f"series-{i}"] for i in range(SERIES)]},
        "rule": {"color": colours["series-0"]},
        "style": {"win": {"color": colours["good"]}, "loss": {"color": colours["bad"]}},
        "text": {"color": text, "fontSize": 11},
        "title": {
            "anchor": "start",
            "color": text,
            "fontSize": 13,
            "fontWeight": 600,
            "offset": 12,
            "subtitleColor": muted,
            "subtitleFontSize": 11,
            "subtitlePadding": 5,
        },
        "view": {"stroke": None},
    }


@dataclass
class Curve:
    """Points of a picture under one name, in the order in which a line goes through them.

    low, high: ends of their error bars; none without.
    joined: whether a line goes through them.
    dashed: whether that line is.
    band: whether low and high are a band around the line, not bars.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = field(default_factory=list)
    high: Sequence[float] = field(default_factory=list)
    joined: bool = True
    dashed: bool = False
    band: bool = False

    @property
    def turns(self) -> bool:
        """Whether its line does not go from left to right."""
        return self.joined and list(self.x) != sorted(self.x)


def curve_panel(
    measured: str,
    across: str,
    curves: Sequence[Curve],
    names: Sequence[str],
    titled: bool = True,
    zero: bool = False,
) -> "Panel":
    """A panel of what is measured over x.

    Args:
        names: all that have a colour, in its order.
        titled: whether the axis says what is measured, where no title does.
        zero: whether the axes begin there.
    """
    import altair as alt

    up = measured if titled else None

    turns = any(curve.turns for curve in curves)
    data = alt.Data(values=[row for curve in curves for row in _points(curve, turns)])
    # a dot in the name of a column would be a path to Vega, so columns have plain ones
    shown = _colours(names)
    x = alt.X("x:Q").title(across).scale(zero=zero, nice=False, padding=6)
    y = alt.Y("y:Q").title(up).scale(zero=zero)
    base = alt.Chart().encode(x=x, y=y, color=shown)  # each layer would copy the data
    ends = {"y": alt.Y("low:Q").title(up).scale(zero=zero), "y2": "high:Q"}
    tooltip = [
        alt.Tooltip("name:N").title("run"),
        alt.Tooltip("x:Q").title(across).format(".6~g"),
        alt.Tooltip("y:Q").title(measured).format(".4~g"),
    ]
    layers: list[alt.Chart] = []
    if any(curve.band for curve in curves):
        band = base.transform_filter("datum.band").mark_area(opacity=0.18)
        layers.append(band.encode(**ends))
    if any(curve.joined for curve in curves):
        dash = alt.StrokeDash("dashed:N").legend(None)
        line = base.transform_filter("datum.joined").mark_line(strokeWidth=1.6, strokeJoin="round")
        line = line.encode(order="place:Q") if turns else line
        layers.append(
            line.encode(strokeDash=dash.scale(domain=[False, True], range=[[1, 0], [5, 3]]))
        )
    if any(curve.low and not curve.band for curve in curves):
        bar = base.transform_filter("!datum.band && isValid(datum.low)").mark_rule(strokeWidth=1.4)
        layers.append(bar.encode(**ends))
    dots = base.mark_circle(size=34)
    if len(names) > SERIES:
        shapes = [SHAPES[i // SERIES % len(SHAPES)] for i in range(len(names))]
        shape = alt.Shape("name:N").scale(domain=list(names), range=shapes)
        dots = base.mark_point(filled=True, size=34).encode(shape=shape)
    dots = dots.encode(
        tooltip=tooltip,
        opacity=alt.Opacity("dot:Q").scale(None).legend(None),  # unseen ones answer the pointer
    )
    return alt.layer(*layers, dots, data=data).properties(height=HEIGHT)


def _colours(names: Sequence[str]) -> "altair.Color":
    """A colour for each name, and a legend of them where there are several."""
    import altair as alt

    colour = alt.Color("name:N").scale(domain=list(names))
    if len(names) < 2:
        return colour.legend(None)
    return colour.legend(columns=1) if max(map(len, names)) > SHORT_NAME else colour


def _points(curve: Curve, placed: bool) -> list[dict[str, Any]]:
    """Rows of a chart's data; what is false of them is left out.

    Args:
        placed: whether they tell their place on the line, which else goes by x.
    """
    look: dict[str, Any] = {"name": curve.name, "dashed": curve.dashed}
    look |= {"joined": True} if curve.joined else {}
    look |= {"band": True} if curve.band else {}
    look["dot"] = int(not curve.joined or len(curve.x) <= MOST_DOTS)
    rows = []
    for i, (x, y) in enumerate(zip(curve.x, curve.y, strict=True)):
        ends = {"low": rounded(curve.low[i]), "high": rounded(curve.high[i])} if curve.low else {}
        place = {"place": i} if placed else {}
        rows.append({**look, "x": rounded(x), "y": rounded(y), **ends, **place})
    return rows


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value can be drawn: what is infinite or not known cannot, and is null in JSON."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def numbers(figures: object, *names: str) -> list[float] | None:
    """The values under these names; None where one of them cannot be drawn."""
    values = [figures.get(name) if isinstance(figures, Mapping) else None for name in names]
    known = [value for value in values if is_number(value)]
    return known if len(known) == len(names) else None


def rounded(value: float) -> float:
    """A number with as many digits as a picture shows."""
    return float(f"{value:.6g}")


def histogram_panel(measured: str, values: Mapping[str, Sequence[float]]) -> "Panel":
    """Shares of lists of numbers by name, binned alike, one over the other."""
    import altair as alt

    every = [value for each in values.values() for value in each]
    low, width = _bins(every)
    rows = []
    for name, each in values.items():
        counts = [0] * BINS
        for value in each:
            counts[min(int((value - low) / width), BINS - 1)] += 1
        rows += [
            {
                "name": name,
                "low": low + i * width,
                "high": low + (i + 1) * width,
                "share": count / len(each),
                "count": count,
            }
            for i, count in enumerate(counts)
            if count
        ]
    bars = alt.Chart().mark_bar(opacity=0.55 if len(values) > 1 else 0.85, binSpacing=0)
    bars = bars.encode(
        x=alt.X("low:Q").title(measured).scale(zero=False, nice=False),
        x2="high:Q",
        y=alt.Y("share:Q").title("share").stack(None).axis(format="~%"),
        y2=alt.datum(0),
        color=_colours(list(values)),
        tooltip=[
            alt.Tooltip("name:N").title("of"),
            alt.Tooltip("low:Q").title("from").format(".4~g"),
            alt.Tooltip("high:Q").title("to").format(".4~g"),
            alt.Tooltip("count:Q").title("count"),
        ],
    )
    return alt.layer(bars, data=alt.Data(values=rows)).properties(height=HEIGHT)


def _bins(values: Sequence[float]) -> tuple[float, float]:
    """Where the first of `BINS` bins begins, and how wide each is; whole numbers share none."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if all(value == int(value) for value in values):
        return low - 0.5, float(max(1, math.ceil((high - low + 1) / BINS)))
    return low, (high - low) / BINS or 1.0


def reliability_panels(bins: Sequence[Mapping[str, float]]) -> list["Panel"]:
    """The share right over the confidence of each bin, above how many each bin holds.

    Points on the diagonal are calibrated, points below it overconfident.

    Args:
        bins: low, high, confidence, accuracy and count of each.
    """
    import altair as alt

    # confidence in the preferred of two starts at a half
    rows = [dict(each) for each in bins if numbers(each, *BIN)]
    start = 0.5 if min((each["low"] for each in rows), default=0.0) >= 0.5 else 0.0
    across = alt.Scale(domain=[start, 1.0])
    ends = [{"confidence": end, "accuracy": end} for end in (start, 1.0)]
    x = alt.X("confidence:Q").title("confidence").scale(across)
    y = alt.Y("accuracy:Q").title("share right").scale(domain=[0.0, 1.0])
    even = alt.Chart(alt.Data(values=ends)).mark_line(strokeDash=[5, 3], opacity=0.5)
    right = alt.Chart(alt.Data(values=rows)).mark_line(point=True)
    right = right.encode(
        x=x,
        y=y,
        tooltip=[
            alt.Tooltip("confidence:Q").format(".3f"),
            alt.Tooltip("accuracy:Q").title("share right").format(".3f"),
            alt.Tooltip("count:Q"),
        ],
    )
    counts = alt.Chart(alt.Data(values=rows)).mark_bar()
    counts = counts.encode(
        x=alt.X("low:Q").title("confidence").scale(across),
        x2="high:Q",
        y=alt.Y("count:Q").title("count"),
        y2=alt.datum(0),
    )
    return [
        alt.layer(even.encode(x=x, y=y), right).properties(height=HEIGHT),
        alt.layer(counts).properties(height=HEIGHT // 3),
    ]


@contextmanager
def unchecked() -> Iterator[None]:
    """Here Altair does not compare all that it is given with its schema: four fifths of its time.

    For pages of many panels; what makes panels is compared where a file is written, and in tests.
    """
    from altair.utils.schemapi import debug_mode

    with debug_mode(False):
        yield


def embedded(panel: "Panel") -> dict[str, Any]:
    """The specification of a panel as wide as its place in a page, without a look of its own."""
    spec: dict[str, Any] = panel.properties(width="container").to_dict(validate=False)
    return {key: value for key, value in spec.items() if key not in ("$schema", "config")}


# --------------------------------------------------------------------------- files


def reliability_picture(file: Path, calibration: "Calibration", title: str) -> None:
    """`reliability_panels` as a file, with the calibration error."""
    error = f"calibration error {calibration.error:.3f}"
    write_picture(file, reliability_panels(list(map(vars, calibration.bins))), title, error)


def lengths_picture(file: Path, lengths: Mapping[str, Sequence[int]]) -> None:
    """A histogram of each list of lengths, in tokens, by name, as a file."""
    panels = [
        histogram_panel(name.replace("_", " "), {name: values}) for name, values in lengths.items()
    ]
    write_picture(file, panels)


def curves_picture(
    file: Path,
    title: str,
    across: str,
    panels: Mapping[str, Sequence[Curve]],
    zero: bool = False,
    below: str = "",
) -> None:
    """A panel below the other for each thing that is measured, over the same x, as a file.

    Args:
        across: what x is.
        panels: curves by what their y is; a name has one colour in all of them.
        zero: whether the axes begin there.
        below: said under the title.
    """
    names = names_in(panels)
    drawn = [
        curve_panel(measured, across, curves, names, zero=zero)
        for measured, curves in panels.items()
    ]
    write_picture(file, drawn, title, below)


def names_in(panels: Mapping[str, Sequence[Curve]]) -> list[str]:
    """The names of all curves, each once."""
    return list(dict.fromkeys(curve.name for curves in panels.values() for curve in curves))


def write_picture(file: Path, panels: Sequence["Panel"], title: str = "", below: str = "") -> None:
    """Panels below each other as a PNG, or as an SVG where the name of the file ends so.

    The same panels make the same bytes, and nothing is read from the network.

    Args:
        below: said under the title.
    """
    import altair as alt
    import vl_convert

    whole = alt.vconcat(*(panel.properties(width=WIDTH) for panel in panels))
    lines = textwrap.wrap(title, TITLE_COLUMNS)
    if lines:
        whole = whole.properties(title=alt.TitleParams(lines, subtitle=[below] if below else []))
    spec = {**whole.to_dict(), "config": theme(LIGHT), "padding": 10}
    if file.suffix == ".svg":
        drawn = vl_convert.vegalite_to_svg(spec, allowed_base_urls=[]).encode()
    else:
        drawn = vl_convert.vegalite_to_png(spec, scale=SCALE, allowed_base_urls=[])
    file.write_bytes(drawn)
