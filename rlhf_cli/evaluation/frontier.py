"""The frontier: what reward and gold cost in KL to the reference, for policies and best of n.

A point is a policy as it was sampled here, which may be a snapshot of a run, the best of n samples
of the reference, an evaluation that a policy's own training has logged, or the optimum, which
nothing lies above. Compare points at equal KL: more reward for more KL is no better way to it.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

from rlhf_cli.reporting.plots import Curve, numbers
from rlhf_cli.runs.lineage import config_of_run
from rlhf_cli.runs.out_files import snapshot_step

Point = dict[str, Any]

POLICY, SNAPSHOT, BEST_OF = "policy", "snapshot", "best of n"
TRAINING, OPTIMUM = "training", "optimum"
"""What a point is: sampled here, a run after one of its steps or not, n of the reference's samples,
a line of a metrics.jsonl, or enumerated.
"""

JUDGES = ("gold", "reward")
"""Those who decide and choose; other scorers only tell what they see."""


def frontier_of(
    results: Mapping[str, Mapping[str, Any]],
    reference: str | None,
    bounds: Mapping[str, Any] | None = None,
    judges: Mapping[str, str | None] | None = None,
) -> list[Point]:
    """The points, policy by policy; empty where no KL was measured.

    Args:
        results: the figures of each policy.
        reference: that KL is measured to; of it stand the points of best of n, at the bound of
            their KL.
        bounds: what was enumerated of it; then best of n stands at its true KL, and the optimum.
        judges: what reward and gold are here; what another reward has said is no point.
    """
    points: list[Point] = []
    for path, figures in results.items():
        kl = figures.get("kl") or figures.get("kl_bound")
        if kl is None:
            continue
        own = {judge: figures[judge] for judge in JUDGES if figures.get(judge)}
        at_most = {} if figures.get("kl") else {"at_most": True}
        step = snapshot_step(Path(path))
        whose: Point = {"from": POLICY}
        if step is not None:
            whose = {"from": SNAPSHOT, "run": str(Path(path).parent), "step": step}
        points.append({"policy": path, **whose, "kl": kl, **at_most, **own})
        points += trained(path, judges or {})
        if reference is not None and path == str(Path(reference)) and bounds is None:
            for n, best in figures.get("best_of", {}).items():
                own = {judge: best[judge] for judge in JUDGES if judge in best}
                kl = {"mean": best["kl_bound"], "stderr": 0.0}
                point = {"policy": path, "from": BEST_OF, "n": int(n), "kl": kl, "at_most": True}
                points.append({**point, **own})
    if reference is not None and bounds is not None:
        path = str(Path(reference))
        for n, best in bounds["best_of"].items():
            points.append({"policy": path, "from": BEST_OF, "n": int(n), **best})
        for best in bounds["optimum"]:
            points.append({"policy": path, "from": OPTIMUM, **best})
    return points


def trained(path: str, judges: Mapping[str, str | None]) -> list[Point]:
    """What the evaluations of a policy's own training have logged, if they measured a KL.

    They stand for the prompts of `algo.eval_prompts`; the KL has no error there.

    Args: judges, as `frontier_of` has them.
    """
    points: list[Point] = []
    config = config_of_run(Path(path))
    same = [each for each in JUDGES if config.get(each, judges.get(each)) == judges.get(each)]
    with suppress(OSError, ValueError):
        lines = (Path(path) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        for line in map(json.loads, lines):
            own = {
                judge: {
                    "mean": line[f"eval/{judge}"],
                    **({"stderr": error} if (error := line.get(f"eval/{judge}_stderr")) else {}),
                }
                for judge in same
                if isinstance(line.get(f"eval/{judge}"), float | int)
            }
            if own and isinstance(line.get("eval/kl"), float | int):
                kl = {"mean": line["eval/kl"]}
                step = line.get("step")
                points.append({"policy": path, "from": TRAINING, "step": step, "kl": kl, **own})
    return points


def runs_of(points: Sequence[Point]) -> list[str]:
    """The runs of which there are snapshots, each once."""
    return list(dict.fromkeys(point["run"] for point in points if "run" in point))


def snapshots_in(points: Sequence[Point]) -> list[str]:
    """The snapshots themselves."""
    return [point["policy"] for point in points if point["from"] == SNAPSHOT]


def curves_of(points: Sequence[Point], judge: str, names: Mapping[str, str]) -> list[Curve]:
    """The points of a judge as a picture has them, error bars of two errors.

    One whose KL or score is infinite, or not known, is left out. Snapshots of a run are joined from
    step to step, wherever that leads; of such a run what its training has logged, of fewer samples,
    is not drawn beside them.

    Args: names, what policies and runs are called there.
    """
    curves: dict[tuple[str, str], list[Point]] = {}
    kept = runs_of(points)
    for point in points:
        if point["from"] == TRAINING and point["policy"] in kept:
            continue
        if numbers(point.get("kl"), "mean") and numbers(point.get(judge), "mean"):
            whose = point["run" if "run" in point else "policy"]
            curves.setdefault((whose, point["from"]), []).append(point)
    drawn = []
    for (path, kind), own in curves.items():
        along = itemgetter("step") if kind == SNAPSHOT else lambda point: point["kl"]["mean"]
        own = sorted(own, key=along)
        means = [point[judge]["mean"] for point in own]
        errors = [2 * (numbers(point[judge], "stderr") or [0.0])[0] for point in own]
        bars: tuple[list[float], list[float]] = ([], [])
        if kind != TRAINING:
            bars = (
                [mean - error for mean, error in zip(means, errors, strict=True)],
                [mean + error for mean, error in zip(means, errors, strict=True)],
            )
        name = names.get(path, path)  # the reference need not be among the policies
        name = {BEST_OF: f"best of n of {name}", OPTIMUM: "optimum by reward"}.get(kind, name)
        x = [point["kl"]["mean"] for point in own]
        drawn.append(Curve(name, x, means, *bars, joined=kind != POLICY))
    return drawn
