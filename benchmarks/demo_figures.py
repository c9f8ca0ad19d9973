"""The two figures of the DPO paper on the demo, over several seeds, from finished evaluations.

    python benchmarks/demo_figures.py docs/pictures runs/seed0/evaluate runs/seed1/evaluate ...

frontier.png (2305.18290 fig. 2, left): gold over the KL to SFT, of each policy, of its snapshots or
else of the evaluations that its training has logged, and of the best of n samples of SFT at the
bound of its KL.
win_rates.png (fig. 2, right): how often a policy beats the reference of the data by gold, over the
sampling temperature; ties are half.
Points are means over seeds, bars go from the least seed to the greatest.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.evaluation.frontier import BEST_OF, POLICY, SNAPSHOT, TRAINING
from rlhf_cli.reporting.plots import Curve, curves_picture

Report = dict[str, Any]


def main(folder: Path, evaluations: Sequence[Path]) -> None:
    """Draw both pictures into a folder."""
    reports = [json.loads((each / "report.json").read_text()) for each in evaluations]
    folder.mkdir(parents=True, exist_ok=True)
    kept = {point["policy"] for point in reports[0]["frontier"] if point["from"] == SNAPSHOT}
    names = sorted({Path(path).name for path in reports[0]["policies"] if path not in kept})
    seeds = f"{len(reports)} seeds"
    frontier = [
        curve
        for name in names
        for curve in (
            over_seeds(name, reports, lambda report, name=name: way_of(report, name), joined=True),
            over_seeds(name, reports, lambda report, name=name: sampled(report, name)),
        )
        if curve.x
    ]
    frontier.append(over_seeds("best of n of sft", reports, best_of, joined=True))
    curves_picture(
        folder / "frontier.png",
        f"The demo: gold over KL, {seeds}",
        "KL to sft in nats per response; of best of n at most",
        {"gold": frontier},
    )
    rates = [
        over_seeds(name, reports, lambda report, name=name: wins(report, name), joined=True)
        for name in names
    ]
    curves_picture(
        folder / "win_rates.png",
        f"The demo: wins against the references of the data, {seeds}",
        "sampling temperature",
        {"share of prompts, ties half": rates},
    )


Points = Callable[[Report], Iterator[tuple[float, float]]]
"""(x, y) of a report, as many in each."""


def over_seeds(name: str, reports: Sequence[Report], points: Points, joined: bool = False) -> Curve:
    """The means of the points over seeds, and how far they reach upward and down."""
    columns = list(zip(*map(points, reports), strict=False))
    means = [sum(y for _, y in column) / len(column) for column in columns]
    return Curve(
        name,
        [sum(x for x, _ in column) / len(column) for column in columns],
        means,
        [min(y for _, y in column) for column in columns],
        [max(y for _, y in column) for column in columns],
        joined,
        band=joined,
    )


def sampled(report: Report, name: str) -> Iterator[tuple[float, float]]:
    """A policy as it was evaluated."""
    yield from of_frontier(report, name, POLICY)


def way_of(report: Report, name: str) -> Iterator[tuple[float, float]]:
    """Its snapshots, or what its training has logged, in the order of steps."""
    kept = [*of_frontier(report, name, SNAPSHOT)]
    yield from kept or of_frontier(report, name, TRAINING)


def best_of(report: Report) -> Iterator[tuple[float, float]]:
    """The best of n samples of SFT by the reward."""
    yield from of_frontier(report, "sft", BEST_OF)


def of_frontier(report: Report, name: str, kind: str) -> Iterator[tuple[float, float]]:
    """(KL, gold) of the points of a kind."""
    for point in sorted(report["frontier"], key=lambda point: point.get("step") or 0):
        path = point["run" if kind == SNAPSHOT and "run" in point else "policy"]
        if Path(path).name == name and point["from"] == kind and "gold" in point:
            yield point["kl"]["mean"], point["gold"]["mean"]


def wins(report: Report, name: str) -> Iterator[tuple[float, float]]:
    """(temperature, share) of the prompts at which a policy beats the reference."""
    for temperature, rates in report["by_temperature"].items():
        for path, rate in rates["against_references"].items():
            if Path(path).name == name:
                yield float(temperature), rate["win"] + rate["tie"] / 2


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(each) for each in sys.argv[2:]])
