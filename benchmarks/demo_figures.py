"""The two figures of the DPO paper on the demo, over several seeds: those of README.md.

    python benchmarks/demo_figures.py docs/pictures runs/demo0 runs/demo1 ...

docs/evaluation.md has the commands of a chain, each of another seed, that leave `evaluate` and
`snapshots` in these folders.
frontier.png (2305.18290 fig. 2, left): gold over the KL to SFT, of each run from SFT through its
snapshots, and of the best of n samples of SFT at the bound of its KL.
win_rates.png (fig. 2, right): how often a policy beats the reference of the data by gold, over the
sampling temperature; ties are half.
Points are means over seeds, bars and bands go from the least seed to the greatest.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_cli.evaluation.frontier import BEST_OF, POLICY, SNAPSHOT, runs_of
from rlhf_cli.reporting.plots import Curve, curves_picture

Report = dict[str, Any]
Points = Callable[[Report], Iterator[tuple[float, float]]]
"""(x, y) of a report, as many in each."""

START = "sft"


def main(folder: Path, chains: Sequence[Path]) -> None:
    """Draw both pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    below = f"means of {len(chains)} seeds, {{}} from the least to the greatest"
    reports = read(chains, "snapshots")
    names = sorted(Path(run).name for run in runs_of(reports[0]["frontier"]))
    curves = [over_seeds(name, reports, partial(way, name=name)) for name in names]
    best = partial(points, name=START, kind=BEST_OF)
    curves.append(over_seeds(f"best of n of {START}", reports, best))
    curves[-1].dashed = True
    curves_picture(
        folder / "frontier.png",
        "The demo: gold over KL in the course of training",
        f"KL to {START} in nats per response; of best of n at most",
        {"gold": curves},
        below=below.format("bars"),
    )
    reports = read(chains, "evaluate")
    names = sorted(Path(path).name for path in reports[0]["policies"])
    curves = [over_seeds(name, reports, partial(wins, name=name), band=True) for name in names]
    curves_picture(
        folder / "win_rates.png",
        "The demo: wins against the references of the data",
        "sampling temperature",
        {"share of prompts, ties half": curves},
        below=below.format("bands"),
    )


def read(chains: Sequence[Path], evaluation: str) -> list[Report]:
    """What an evaluation of each chain has found."""
    return [json.loads((chain / evaluation / "report.json").read_text()) for chain in chains]


def over_seeds(name: str, reports: Sequence[Report], points: Points, band: bool = False) -> Curve:
    """The means of the points over seeds, and how far they reach upward and down."""
    columns = list(zip(*map(points, reports), strict=True))
    return Curve(
        name,
        [sum(x for x, _ in column) / len(column) for column in columns],
        [sum(y for _, y in column) / len(column) for column in columns],
        [min(y for _, y in column) for column in columns],
        [max(y for _, y in column) for column in columns],
        band=band,
    )


def way(report: Report, name: str) -> Iterator[tuple[float, float]]:
    """A run from where it began through its snapshots."""
    yield from points(report, START, POLICY)
    yield from points(report, name, SNAPSHOT)


def points(report: Report, name: str, kind: str) -> Iterator[tuple[float, float]]:
    """(KL, gold) of the points of a kind, in the order of steps."""
    for point in sorted(report["frontier"], key=lambda point: point.get("step", 0)):
        whose = point["run" if kind == SNAPSHOT else "policy"] if point["from"] == kind else ""
        if Path(whose).name == name:
            yield point["kl"]["mean"], point["gold"]["mean"]


def wins(report: Report, name: str) -> Iterator[tuple[float, float]]:
    """(temperature, share) of the prompts at which a policy beats the reference."""
    for temperature, rates in report["by_temperature"].items():
        for path, rate in rates["against_references"].items():
            if Path(path).name == name:
                yield float(temperature), rate["win"] + rate["tie"] / 2


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(each) for each in sys.argv[2:]])
