"""The figures of README.md: over seeds, from what evaluations of each have found."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def point(chain: Path, name: str, kl: float, gold: float, **more: Any) -> dict[str, Any]:
    """One of a frontier; of a snapshot `step` and `run` are among the rest."""
    whose = {"policy": str(chain / name), "from": "policy", **more}
    return {**whose, "kl": {"mean": kl}, "gold": {"mean": gold}}


def snapshots(chain: Path, *found: tuple[int, float, float]) -> list[dict[str, Any]]:
    """The points of ppo after steps."""
    of: dict[str, Any] = {"from": "snapshot", "run": str(chain / "ppo")}
    return [point(chain, f"ppo/step-{step}", *each, step=step, **of) for step, *each in found]


def judged(chain: Path, by: float) -> Path:
    """The folder of a seed, whose policies are better by so much."""
    rate = {"win": 0.5 + by / 4, "tie": 0.25}
    reports = {
        "snapshots": {
            "frontier": [
                point(chain, "sft", 0.0, 1 + by),
                point(chain, "sft", 0.2, 2 + by, **{"from": "best of n", "n": 2}),
                *snapshots(chain, (20, 3 + by, 3.0), (9, 1 + by, 2 + 2 * by)),
            ]
        },
        "evaluate": {
            "policies": {str(chain / "ppo"): {}},
            "by_temperature": {"0.5": {"against_references": {str(chain / "ppo"): rate}}},
        },
    }
    for name, report in reports.items():
        (chain / name).mkdir(parents=True)
        (chain / name / "report.json").write_text(json.dumps(report))
    return chain


def test_means_over_seeds_from_where_runs_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    figures = importlib.import_module("demo_figures")
    drawn: dict[str, Any] = {}

    def draw(file: Path, *words: str, below: str) -> None:
        drawn[file.name] = (words[-1], below)

    monkeypatch.setattr(figures, "curves_picture", draw)
    figures.main(tmp_path, [judged(tmp_path / "demo0", 0.0), judged(tmp_path / "demo1", 1.0)])
    panels, below = drawn["frontier.png"]
    way, best = panels["gold"]
    assert below == "means of 2 seeds, bars from the least to the greatest"
    assert (way.name, way.x, way.y) == ("ppo", [0.0, 1.5, 3.5], [1.5, 3.0, 3.0])
    assert (way.low, way.high) == ([1.0, 2.0, 3.0], [2.0, 4.0, 3.0])
    assert (best.name, best.x, best.y) == ("best of n of sft", [0.2], [2.5]) and best.dashed
    panels, _ = drawn["win_rates.png"]
    (rates,) = panels["share of prompts, ties half"]
    assert (rates.x, rates.y, rates.low, rates.high) == ([0.5], [0.75], [0.625], [0.875])
