"""The trackers themselves, in local mode: what they have of a run that was resumed."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.reporting.trackers import outlets
from tests.reporting.tracked import TERM, begun, hear

pytestmark = pytest.mark.interop


@pytest.fixture(autouse=True)
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing leaves the folder of the test."""
    monkeypatch.chdir(tmp_path)
    for name in [each for each in os.environ if each.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr(outlets, "PATIENCE", 120.0)


def interrupted_and_resumed(name: str) -> None:
    """Steps 1 to 3, of which the last is done again, then 4 and the end."""
    pytest.importorskip(name)
    before = begun(name)
    hear(before, 1, 2, 3)
    before.leave()
    assert before._outlets[0].ended(120)
    after = begun(name, resumed=True)
    hear(after, 3, 4)
    after.finish({"reward": 0.5})
    assert not after._outlets[0]._given_up


def test_tensorboard() -> None:
    interrupted_and_resumed("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("runs/demo/ppo")
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars(TERM)] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("final/reward")] == [0.5]
    assert "eval/gold" not in events.Tags()["scalars"]
    shown = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0] for tag in ("run", "samples")}
    assert b"    seed: 3\n" in shown["run"] and b"hash: ab12" in shown["run"]
    assert b"    response: <b>Hi\n" in shown["samples"]


def test_tensorboard_forgets_nothing_of_a_run_that_had_only_its_end_to_do() -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    before = begun("tensorboard")
    hear(before, 1, 2, 3)
    before.leave()
    assert before._outlets[0].ended(120)
    begun("tensorboard", resumed=True).finish({"reward": 0.5})
    events = EventAccumulator("runs/demo/ppo")
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("final/reward")] == [0.5]


def test_wandb() -> None:
    interrupted_and_resumed("wandb")
    found = [list(records(file)) for file in sorted(Path("wandb").glob("offline-run-*/*.wandb"))]
    assert len(found) == 2
    runs = [next(each.run for each in part if each.HasField("run")) for part in found]
    assert {run.run_id for run in runs} == {"0123456789ab"}
    assert {(run.project, run.display_name, run.job_type) for run in runs} == {
        ("demo", "runs/demo/ppo", "ppo")
    }
    config = {each.key: each.value_json for each in runs[0].config.update}
    assert config["seed"] == "3" and '"hash":"ab12"' in config["parents"].replace(" ", "")
    rows = [row_of(each.history) for part in found for each in part if each.HasField("history")]
    assert [row["step"] for row in rows if "loss" in row] == ["1", "2", "3", "3", "4"]
    assert [row[TERM] for row in rows if "loss" in row] == ["1", "2", "3", "3", "4"]
    assert any("samples" in name for row in rows for name in row)
    ends = [each.exit.exit_code for part in found for each in part if each.HasField("exit")]
    assert ends == [1, 0]
    final = [each.summary for each in found[1] if each.HasField("summary")]
    assert any(item.key == "final/reward" for summary in final for item in summary.update)


def test_mlflow() -> None:
    interrupted_and_resumed("mlflow")
    from mlflow import MlflowClient

    from rlhf_cli.reporting.trackers.mlflow import accepted

    client = MlflowClient()
    experiment = client.get_experiment_by_name("demo")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "runs/demo/ppo"
    assert run.data.params["algo.lr"] == "0.5" and run.data.params["algo.loss"] == "None"
    assert run.data.tags["parents.policy"] == "runs/demo/sft (ab12)"
    assert run.data.metrics["final/reward"] == 0.5
    steps = [each.step for each in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(set(steps)) == [1, 2, 3, 4]
    assert accepted(TERM) in run.data.metrics
    assert accepted("final/policies//a/../b/gold") == "final/policies/b/gold"
    assert len(accepted("x/" * 200)) <= 250
    names = [each.path for each in client.list_artifacts(run.info.run_id, "samples")]
    assert names == [f"samples/step-0000000{step}.json" for step in (1, 2, 3, 4)]


def test_trackio() -> None:
    interrupted_and_resumed("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    rows: list[dict[str, Any]] = SQLiteStorage.get_logs("demo", "runs/demo/ppo")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 3, 4]
    assert [row["final/reward"] for row in rows if "final/reward" in row] == [0.5]
    config: dict[str, Any] = SQLiteStorage.get_run_config("demo", "runs/demo/ppo") or {}
    assert config["seed"] == 3 and config["parents"]["policy"]["hash"] == "ab12"


def records(file: Path) -> Iterator[Any]:
    """What W&B wrote to a file of an offline run: blocks as LevelDB's log has them."""
    from wandb.proto import wandb_internal_pb2 as proto

    data, at, parts, block, head = file.read_bytes(), 7, b"", 32768, 7
    while at + head <= len(data):
        if (left := block - at % block) < head:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + head])
        parts += data[at + head : at + head + size]
        at += head + size
        if kind in (1, 4):  # whole, or the last part
            record = proto.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def row_of(history: Any) -> dict[str, str]:
    """name -> value of a row, as JSON."""
    return {".".join(item.nested_key) or item.key: item.value_json for item in history.item}
