"""Pipes, folders and circles of links where files are read or written: a line, and no waiting."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf_cli.runs.resume_points import load_checkpoint, save_checkpoint
from tests.cli.made import POLICY, REWARD, ROWS, SFT
from tests.cli.test_user_errors import value
from tests.conftest import Cli
from tests.pace import fast


def circle(place: Path) -> None:
    place.symlink_to(place.name)


ODD: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "circle": circle,
}


def put(place: Path, kind: str) -> None:
    """Something odd where a file, a folder or nothing was."""
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    ODD[kind](place)


def refused(cli: Cli, words: str, *parts: str) -> None:
    done = cli(*words.split())
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("rlhf-cli: error: ") and done.stderr.count("\n") == 1
    for part in parts:
        assert part in done.stderr


MODEL_FILES = ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"]
OTHERS = [
    "tokenizer_config.json",
    "stage.json",
    "model.safetensors.index.json",
    "other.safetensors",
]


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", [*MODEL_FILES, *OTHERS])
@pytest.mark.slow
def test_in_a_model_folder(name: str, kind: str, cli: Cli, place: Path) -> None:
    put(place / POLICY / name, kind)
    refused(cli, f"{REWARD} out=new", POLICY)
    assert not (place / "new").exists()


@pytest.mark.parametrize("name", ["vocab.txt", "merges.txt", "tokenizer.model"])
def test_a_pipe_of_any_name_in_a_model_folder(name: str, cli: Cli, place: Path) -> None:
    put(place / POLICY / name, "pipe")
    refused(cli, f"{REWARD} out=new", f"{POLICY}/{name} is a named pipe, not a file; remove it")


@pytest.mark.parametrize("kind", ["pipe", "circle"])
@pytest.mark.parametrize("words", [f"{REWARD} policy=odd out=new", f"{REWARD} out=odd"])
def test_as_a_folder_of_models_or_as_out(words: str, kind: str, cli: Cli, place: Path) -> None:
    put(place / "odd", kind)
    refused(cli, words, "odd")


@pytest.mark.parametrize("kind", ODD)
def test_as_the_base_of_an_adapter(kind: str, cli: Cli, place: Path) -> None:
    put(place / "odd", kind)
    value("runs/demo/adapter/stage.json", files={})(place)
    base = {"base_model_name_or_path": str(place / "odd")}
    value("runs/demo/adapter/adapter_config.json", **base)(place)
    refused(cli, f"dpo {ROWS} policy=runs/demo/adapter out=new", "odd")


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize(
    "name", fast(["metrics.jsonl"], ["config.yaml", "metrics.jsonl", "checkpoints/inputs.json"])
)
def test_in_an_unfinished_out(name: str, kind: str, cli: Cli, place: Path) -> None:
    unfinished(place)
    put(place / POLICY / name, kind)
    refused(cli, SFT, POLICY)


@pytest.mark.parametrize("kind", ["pipe", "circle"])
def test_instead_of_resume_points(kind: str, cli: Cli, place: Path) -> None:
    unfinished(place)
    put(place / POLICY / "checkpoints", kind)
    refused(cli, SFT, f"{POLICY}/checkpoints is ")


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.slow
def test_overwriting_removes_them_and_follows_none(kind: str, cli: Cli, place: Path) -> None:
    (place / "mine").mkdir()
    (place / "mine/file").write_text("kept")
    out = place / POLICY
    for name in ("stage.json", "metrics.jsonl", "checkpoints", ".staging", ".trash", "other"):
        put(out / name, kind)
    put(out / ".config.yaml.part", kind)
    (out / "link").symlink_to(place / "mine")
    done = cli(*SFT.split(), "seed=5", "overwrite=true")
    assert done.returncode == 0, done.stderr
    assert (place / "mine/file").read_text() == "kept"
    assert not any((out / name).exists() for name in ("other", "link", ".staging"))


def unfinished(place: Path) -> None:
    """The policy's folder as a run leaves it that was killed before its first resume point."""
    out = place / POLICY
    (out / "stage.json").unlink()
    (out / "checkpoints").mkdir()
    (out / "checkpoints/inputs.json").write_text('{"parents": {}, "inputs": {}}')


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["", "files.json", "state.json", "tensors.safetensors"])
def test_in_a_resume_point_which_is_given_up_for_the_one_before(
    name: str, kind: str, tmp_path: Path
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"a": torch.ones(2)}, {"logs": {}}, keep=2)
    point = tmp_path / "checkpoints/step-00000002"
    put(point / name if name else point, kind)
    put(point.with_name(".damaged-step-00000002"), kind)
    put(point.with_name(".step-00000002.part"), kind)
    found = load_checkpoint(tmp_path)
    assert found is not None and found[1]["step"] == 1
    save_checkpoint(tmp_path, 2, {"a": torch.ones(2)}, {"logs": {}}, keep=2)
    found = load_checkpoint(tmp_path)
    assert found is not None and found[1]["step"] == 2


@pytest.mark.parametrize("kind", ODD)
def test_ls_shows_the_other_runs(kind: str, cli: Cli, place: Path) -> None:
    for name in ("config.yaml", "stage.json"):
        put(place / POLICY / name, kind)
    put(place / "runs/demo/odd", kind)
    done = cli("ls", "runs")
    assert done.returncode == 0, done.stderr
    assert "reward" in done.stdout


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("reward", ["odd.py:f", "lexicon:odd.py"])
def test_as_the_file_of_a_reward(reward: str, kind: str, cli: Cli, place: Path) -> None:
    put(place / "odd.py", kind)
    refused(cli, f"ppo {ROWS} reward={reward} out=new", "odd.py")


def test_a_pipe_in_a_folder_of_rows_is_no_row(cli: Cli, place: Path) -> None:
    (place / "data").mkdir()
    shutil.copy(place / "rows.jsonl", place / "data/rows.jsonl")
    os.mkfifo(place / "data/more.jsonl")
    done = cli(*f"{REWARD} data.path=data out=new --check".split())
    assert done.returncode == 0, done.stderr
