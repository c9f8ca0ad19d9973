"""Win rates over the temperature that policies were sampled at, as curves."""

from collections.abc import Callable
from typing import Any

from rlhf_cli.reporting.plots import Curve, numbers

AGAINST = {"against_references": "the references", "win_rates": "baselines"}
"""What win rates are against, by where the report has them."""


def temperature_panels(
    by_temperature: dict[str, Any], name_of: Callable[[str], str]
) -> dict[str, list[Curve]]:
    """Win rates over temperature, as a picture has them: by whom they are against, by policy."""
    panels: dict[str, list[Curve]] = {}
    for key, against in AGAINST.items():
        won: dict[str, list[tuple[float, float, float, float]]] = {}
        for temperature, found in by_temperature.items():
            for path, rate in (found.get(key) or {}).items():
                if known := numbers(rate, "win", "tie", "low", "high"):
                    win, tie, *ends = known
                    point = float(temperature), win + tie / 2, ends[0], ends[1]
                    won.setdefault(path, []).append(point)
        if won:
            curves = panels[f"score against {against}"] = []
            for path, points in won.items():
                x, y, low, high = (list(each) for each in zip(*points, strict=True))
                curves.append(Curve(name_of(path), x, y, low, high))
    return panels
