"""Points of the frontier, and the curves that are drawn of them."""

import json
from pathlib import Path

import pytest

from rlhf_cli.evaluation import frontier
from rlhf_cli.evaluation.frontier import (
    BEST_OF,
    OPTIMUM,
    POLICY,
    SNAPSHOT,
    TRAINING,
    curves_of,
    frontier_of,
    trained,
)
from rlhf_cli.reporting.plots import curve_panel, curves_picture


def figures(kl: float, gold: float) -> dict[str, object]:
    return {"kl": {"mean": kl, "stderr": 0.1}, "gold": {"mean": gold, "stderr": 0.2}}


def test_what_another_reward_said_in_training_is_no_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = {"step": 2, "eval/gold": 1.5, "eval/reward": 9.0, "eval/kl": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    config = {"reward": "exact_answer", "gold": "demo_gold"}
    monkeypatch.setattr(frontier, "config_of_run", lambda folder: config)
    judges = {"reward": "runs/demo/reward", "gold": "demo_gold"}
    (point,) = trained(str(tmp_path), judges)
    assert point["gold"] == {"mean": 1.5} and "reward" not in point
    (point,) = trained(str(tmp_path), {**judges, "reward": "exact_answer"})
    assert point["reward"] == {"mean": 9.0}


def test_policies_their_training_and_best_of_n_of_the_reference(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "reward": 3.0},
        {"step": 2, "eval/gold": 1.5, "eval/gold_stderr": 0.1, "eval/kl": 0.5, "eval/reward": None},
        {"step": 4, "eval/gold": 2.5, "eval/kl": 0.2},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    policy = str(tmp_path)
    best = {"1": {"kl_bound": 0.0, "gold": {"mean": 1.0, "stderr": 0.2}}}
    results = {policy: figures(1.0, 2.0), "base": {**figures(0.0, 1.0), "best_of": best}, "c": {}}
    points = frontier_of(results, "base/")
    assert [(point["policy"], point["from"]) for point in points] == [
        (policy, POLICY),
        (policy, TRAINING),
        (policy, TRAINING),
        ("base", POLICY),
        ("base", BEST_OF),
    ]
    assert points[1] == {
        "policy": policy,
        "from": TRAINING,
        "step": 2,
        "kl": {"mean": 0.5},
        "gold": {"mean": 1.5, "stderr": 0.1},
    }
    assert points[-1]["n"] == 1 and points[-1]["kl"]["mean"] == 0 and points[-1]["at_most"]
    best = {"kl": {"mean": 0.0}, "gold": {"mean": 1.0}}
    bounds = {"best_of": {"1": best}, "optimum": [{"beta": 2.0, **best}]}
    exact = frontier_of(results, "base/", bounds)[-2:]
    assert [(point["from"], "at_most" in point) for point in exact] == [
        (BEST_OF, False),
        (OPTIMUM, False),
    ]
    assert curves_of(exact, "gold", {})[-1].name == "optimum by reward"
    assert frontier_of(results, None)[-1]["from"] == POLICY

    curves = curves_of(points, "gold", {policy: "ppo", "base": "sft"})
    assert [(curve.name, curve.joined) for curve in curves] == [
        *(("ppo", False), ("ppo", True)),
        *(("sft", False), ("best of n of sft", True)),
    ]
    assert curves[1].x == [0.2, 0.5] and curves[1].y == [2.5, 1.5] and not curves[1].low
    assert curves[0].low == [1.6] and curves[0].high == [2.4]
    assert curves_of(points, "reward", {}) == []

    for name in ("a.png", "b.png"):
        curves_picture(tmp_path / name, "of $x^{", "KL", {"gold": curves})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_snapshots_of_a_run_are_joined_from_step_to_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its KL falls again; what its training has logged is not drawn beside them."""
    steps = {Path("ppo/step-10"): 10, Path("ppo/step-20"): 20, Path("ppo/step-30"): 30}
    monkeypatch.setattr(frontier, "snapshot_step", steps.get)
    logged = {"policy": "ppo", "from": TRAINING, "step": 5, **figures(0.5, 1.5)}
    monkeypatch.setattr(frontier, "trained", lambda path, judges: [logged] * (path == "ppo"))
    results = {
        "ppo/step-30": figures(2.0, 3.0),
        "ppo": figures(2.1, 3.1),
        "ppo/step-10": figures(1.0, 2.0),
        "ppo/step-20": figures(2.5, 2.5),
    }
    points = frontier_of(results, None)
    assert points[0] == {
        "policy": "ppo/step-30",
        "from": SNAPSHOT,
        "run": "ppo",
        "step": 30,
        **figures(2.0, 3.0),
    }
    snapshots, policy = curves_of(points, "gold", {"ppo": "PPO"})
    assert (snapshots.name, snapshots.joined, snapshots.turns) == ("PPO", True, True)
    assert list(snapshots.x) == [1.0, 2.5, 2.0] and list(snapshots.y) == [2.0, 2.5, 3.0]
    assert snapshots.low[0] == 1.6
    assert (policy.name, policy.joined, list(policy.x)) == ("PPO", False, [2.1])
    (panel,) = [curve_panel("gold", "KL", [snapshots, policy], ["PPO"]).to_dict()]
    (line,) = [each for each in panel["layer"] if each["mark"]["type"] == "line"]
    assert line["encoding"]["order"]["field"] == "place"
    assert [row["place"] for row in panel["data"]["values"]] == [0, 1, 2, 0]
    without = curve_panel("gold", "KL", [policy], ["PPO"]).to_dict()["data"]["values"]
    assert all("place" not in row for row in without)
