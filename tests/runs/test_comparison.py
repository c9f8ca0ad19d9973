"""Runs side by side: what differs, final metrics with errors, sweeps as a table and as CSV."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.commands import compare
from rlhf_cli.config.errors import UserError
from rlhf_cli.runs.comparison import Figure, compared, differing, figure_names, names_of

METRICS = {
    "eval/accuracy": 0.75,
    "eval/accuracy_stderr": 0.02,
    "eval/accuracy_low": 0.7,
    "eval/pairs": 4,
}


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def write_run(out: str, lr: float = 1.0, stage: str = "reward", **manifest: Any) -> Path:
    """A run as its stage leaves it; without metrics one that has not ended."""
    folder = Path(out)
    folder.mkdir(parents=True)
    config = {"name": "demo", "out": out, "seed": 0, "algo": {"lr": lr, "epochs": 2}}
    (folder / "config.yaml").write_text(f"# rlhf-cli {stage}\n{json.dumps(config)}\n")
    if manifest:
        said = {"stage": stage, "kind": "policy", "parents": {}, "seconds": 9.5, "complete": True}
        (folder / "stage.json").write_text(json.dumps(said | manifest))
    return folder


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    compare.run(list(words))
    return capsys.readouterr().out


def test_settings_that_differ_and_metrics_with_errors(capsys: pytest.CaptureFixture[str]) -> None:
    write_run("a/reward", lr=1e-3, metrics=METRICS)
    write_run("b/reward", lr=2e-3, metrics={**METRICS, "eval/accuracy": 0.8})
    assert shown(capsys, "a/reward", "b/reward").splitlines() == [
        "settings that differ",
        "         a/reward  b/reward",
        "algo.lr     0.001     0.002",
        "",
        "final metrics, ± standard error",
        "                    a/reward       b/reward",
        "eval/accuracy  0.750 ± 0.020  0.800 ± 0.020",
        "eval/pairs                 4              4",
        "seconds                  9.5            9.5",
    ]


def test_a_run_that_has_not_ended_shows_its_newest_metrics() -> None:
    write_run("a", metrics=METRICS)
    folder = write_run("b")
    rows = [
        {"step": 1, "loss": 2.0, "eval/accuracy": 0.6},
        {"step": 2, "loss": None, "seconds/x": 1},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = compared([Path("a"), Path("b")])
    assert (first.state, second.state) == ("finished", "unfinished")
    assert second.figures == {"eval/accuracy": Figure(0.6), "step": Figure(2)}
    assert list(first.figures)[0] == "eval/accuracy"


def test_contents_and_versions_that_differ() -> None:
    def made(digits: str, torch: str) -> dict[str, Any]:
        parents = {"policy": {"path": "sft", "hash": digits}}
        return {"metrics": METRICS, "parents": parents, "versions": {"torch": torch}}

    write_run("a", **made("1" * 16, "2.1"))
    write_run("b", **made("2" * 16, "2.2"))
    assert differing(compared([Path("a"), Path("b")])) == ["content of policy", "version of torch"]


def test_an_evaluation_shows_the_judged_policy_first() -> None:
    figures = {"gold": {"mean": 2.0, "stderr": 0.1}, "text_loss": 0.5, "seconds": 3}
    metrics = {
        "policies": {"runs/sft": {**figures, "text_loss": 0.6}, "runs/ppo": figures},
        "win_rates": {"runs/sft": {"win": 0.7, "low": 0.6, "high": 0.8}},
    }
    said: dict[str, Any] = {
        "metrics": metrics,
        "parents": {"policy": {"path": "runs/ppo", "hash": "0"}},
    }
    for out in "ab":
        write_run(out, stage="evaluate", kind="report", **said)
    first, _ = compared([Path("a"), Path("b")])
    assert first.figures["gold"] == Figure(2.0, 0.1)
    assert first.figures["text_loss of sft"] == Figure(0.6)
    assert first.figures["win against sft"] == Figure(0.7)
    assert first.figures["seconds"] == Figure(9.5)  # of the evaluation


def test_a_sweep_is_a_table_and_csv(capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(5):
        write_run(f"sweep/lr={i}", lr=i, metrics={**METRICS, "eval/accuracy": i / 10})
    write_run("sweep/lr=5/inside", lr=9)
    lines = shown(capsys, "sweep").splitlines()
    assert lines[0] == "reward, ± standard error; 1 more metrics: --csv"
    assert lines[1].split() == ["run", "state", "algo.lr", "eval/accuracy", "seconds"]
    assert lines[3].split() == ["lr=1", "finished", "1", "0.100", "±", "0.020", "9.5"]
    assert len(lines) == 2 + 6
    rows = list(csv.DictReader(io.StringIO(shown(capsys, "sweep", "--csv"))))
    assert [row["algo.lr"] for row in rows] == ["0", "1", "2", "3", "4", "9"]
    assert rows[1]["run"] == "sweep/lr=1" and rows[1]["eval/accuracy"] == "0.1"
    assert rows[1]["eval/accuracy_stderr"] == "0.02" and rows[1]["eval/accuracy_low"] == "0.7"
    assert rows[5]["eval/accuracy"] == ""
    told = json.loads(shown(capsys, "sweep", "--json"))
    assert told[1]["metrics"]["eval/accuracy"] == {"value": 0.1, "stderr": 0.02}
    assert told[1]["settings"] == {"algo.lr": 1}


def test_stages_of_a_chain_are_compared_with_their_own_kind(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for i in range(3):
        write_run(f"runs/{i}/reward", lr=i, metrics=METRICS)
        write_run(f"runs/{i}/sft", lr=7, stage="sft", metrics={"eval/loss": 1.0 + i})
    said = shown(capsys, "runs").split("\n\n")
    assert [part.partition(",")[0] for part in said] == ["reward", "sft"]
    assert "algo.lr" in said[0] and "algo.lr" not in said[1]


def test_narrow_tables_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(5):
        write_run(f"sweep/a_rather_long_name_of_a_job={i}", lr=i, metrics=METRICS)
    for columns in (40, 80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = shown(capsys, "sweep").splitlines()
        assert max(map(len, lines[1:])) <= columns


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "compare takes folders of runs"),
        (["a"], "a is one run; name another"),
        (["nowhere", "a"], "no folder nowhere"),
        (["empty"], "no runs in empty"),
        (["a", "--html"], "unknown flag --html"),
        (["a", "--csv", "--json"], "take one of --csv and --json"),
    ],
)
def test_what_cannot_be_compared(words: list[str], message: str) -> None:
    write_run("a", metrics=METRICS)
    Path("empty").mkdir()
    with pytest.raises(UserError, match=message):
        compare.run(words)


def test_a_damaged_run_is_said_to_be() -> None:
    write_run("a", metrics=METRICS)
    write_run("b", metrics=METRICS)
    Path("b/stage.json").write_text("{")
    _, damaged = compared([Path("a"), Path("b")])
    assert damaged.state == "damaged" and damaged.figures == {}


def test_a_run_may_hold_a_sweep_of_its_stage() -> None:
    write_run("ppo", metrics=METRICS)
    write_run("ppo/lr=2", lr=2, metrics=METRICS)
    assert [run.name for run in compared([Path("ppo")])] == [".", "lr=2"]


def test_names_tell_folders_apart() -> None:
    assert names_of([Path("x/a/ppo"), Path("x/b/ppo")]) == ["a/ppo", "b/ppo"]
    assert names_of([Path("x"), Path("x/y")]) == [".", "y"]
    write_run("a", metrics=METRICS)
    write_run("b", metrics={"loss": 1.0})
    runs = compared([Path("a"), Path("b"), Path("a")])
    assert [run.name for run in runs] == ["a", "b"]
    assert figure_names(runs) == [
        "eval/accuracy",
        "eval/accuracy_low",
        "eval/pairs",
        "seconds",
        "loss",
    ]
