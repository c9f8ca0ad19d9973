"""Resume points and out folders: whole or not seen."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.folders.files import seal
from rlhf_cli.folders.integrity import described
from rlhf_cli.folders.manifest import read_manifest
from rlhf_cli.reporting.metrics import JsonLines, round_figures
from rlhf_cli.runs import out_folder as outfolder
from rlhf_cli.runs.config_diff import differing_keys
from rlhf_cli.runs.out_folder import publish, staging
from rlhf_cli.runs.resume_points import load_checkpoint, save_checkpoint

TENSORS = {"policy/a": torch.arange(6.0).view(2, 3), "optimizer/b": torch.ones(2)}


# --------------------------------------------------------------------------- resume points


def test_the_newest_resume_points_are_kept(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    for step in (8, 9, 10):
        save_checkpoint(tmp_path, step, TENSORS, {"kl_coef": 0.03 * step, "logs": {}}, keep=2)
    save_checkpoint(tmp_path, 10, TENSORS, {"kl_coef": 0.1 + 0.2, "logs": {}}, keep=2)  # once more
    kept = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000009", "step-00000010"]
    found = load_checkpoint(tmp_path)
    assert found is not None
    tensors, state = found
    assert state == {"kl_coef": 0.1 + 0.2, "logs": {}, "step": 10}  # not rounded
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.pkl"))


def test_a_crash_while_saving_leaves_the_point_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, TENSORS, {"logs": {}}, keep=1)

    def crash(*args: object, **more: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(json, "dumps", crash)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, 2, TENSORS, {"logs": {}}, keep=1)
    monkeypatch.undo()
    found = load_checkpoint(tmp_path)
    assert found is not None and found[1]["step"] == 1
    save_checkpoint(tmp_path, 2, TENSORS, {"logs": {}}, keep=1)
    found = load_checkpoint(tmp_path)
    assert found is not None and found[1]["step"] == 2


def test_lines_after_the_resume_point_are_written_again(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    log = JsonLines(file)
    for step in (1, 2):
        log.write(step, {"loss": step / 3})
    before = log.described()
    assert before == described(tmp_path, [file.name])[file.name]
    log.write(3, {"loss": 1.0})
    with file.open("a") as stream:
        stream.write('{"step": 4, "lo')  # killed
    again = JsonLines(file, int(before["size"]))
    assert again.described() == before
    again.write(3, {"loss": 0.5})
    assert [line["step"] for line in again.rows()] == [1, 2, 3]
    assert again.rows()[-1]["loss"] == 0.5 and again.rows()[0]["loss"] == 0.333333
    assert again.described() == described(tmp_path, [file.name])[file.name]
    JsonLines(file)
    assert file.read_text() == ""
    assert round_figures({"a": [1.23456789, 3], "b": "x"}) == {"a": [1.23457, 3], "b": "x"}
    row = {"a": [1.23456789, math.nan], "b": math.inf}
    assert round_figures(row, digits=None) == {"a": [1.23456789, None], "b": None}


# --------------------------------------------------------------------------- out folders


def test_publishing_writes_the_manifest_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, TENSORS, {"logs": {}}, keep=1)
    folder = staging(tmp_path)
    (folder / "model.safetensors").write_text("weights")
    assert not (tmp_path / "model.safetensors").exists()
    seen: list[set[str]] = []

    def look(folder: Path, manifest: dict[str, Any], names: set[str]) -> None:
        seen.append({path.name for path in tmp_path.iterdir()})
        seal(folder, manifest, names)

    monkeypatch.setattr(outfolder, "seal", look)
    publish(tmp_path, {"kind": "policy"})
    # resume points go last: a run killed before loses nothing
    assert seen == [{"model.safetensors", "checkpoints"}]
    found = read_manifest(tmp_path)
    assert found is not None and found["complete"] and found["kind"] == "policy"
    assert found["files"] == described(tmp_path, ["model.safetensors"])
    assert found["files"]["model.safetensors"]["size"] == len("weights")
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "stage.json"}


def test_staging_starts_empty(tmp_path: Path) -> None:
    (staging(tmp_path) / "left over").write_text("x")
    assert list(staging(tmp_path).iterdir()) == []


def test_hardware_and_overwrite_are_no_difference() -> None:
    saved = {"seed": 0, "hardware": {"threads": 1}, "overwrite": False, "algo": {"lr": 1, "b": []}}
    given = {"seed": 0, "hardware": {"threads": 2}, "overwrite": True, "algo": {"lr": 1, "b": []}}
    assert differing_keys(saved, given, {}) == []
    assert differing_keys(saved, {**given, "algo": {"lr": 2}}, {}) == [
        "algo.b: [] -> null",
        "algo.lr: 1 -> 2",
    ]


def test_a_key_or_value_of_before_is_no_difference_by_its_new_name() -> None:
    saved: dict[str, Any] = {
        "hardware": {"keep": 2},
        "algo": {"refills": 0, "lr": 1, "loss": "steps"},
        "data": {"convert": ["feedback_to_steps"], "step_end": "steps"},
    }
    given: dict[str, Any] = {
        "hardware": {"keep_checkpoints": 2},
        "algo": {"dynamic_sampling": 0, "lr": 1, "loss": "process"},
        "data": {"convert": ["feedback_to_stepwise"], "step_end": "steps"},
    }
    assert differing_keys(saved, given, {}) == []
    given["algo"] |= {"dynamic_sampling": 3}
    assert differing_keys(saved, given, {}) == ["algo.dynamic_sampling: 0 -> 3"]
