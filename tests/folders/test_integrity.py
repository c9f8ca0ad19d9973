"""A model folder is as its stage.json describes it, and what it says of itself is possible."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rlhf_cli.config.errors import UserError
from rlhf_cli.folders.integrity import check_files, check_weights_hash, check_whole, described
from rlhf_cli.folders.json_forms import ADAPTER, COUNT, POSITIVE, REAL, SIZE, misfit
from rlhf_cli.folders.manifest import read_config, read_manifest

CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": 6, "hidden_size": 4, "n_layer": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A policy's folder with a record of its files."""
    save_file({"a": torch.arange(24.0).view(6, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    return recorded(tmp_path)


def recorded(folder: Path) -> Path:
    """The folder, with a stage.json that describes its files as they are."""
    names = [file.name for file in folder.iterdir() if file.name != "stage.json"]
    manifest = {"kind": "policy", "files": described(folder, names)}
    (folder / "stage.json").write_text(json.dumps(manifest))
    return folder


def flipped(name: str, place: int) -> Callable[[Path], None]:
    """One bit of a byte of a file; the file keeps its size and time."""

    def change(folder: Path) -> None:
        file = folder / name
        before, content = file.stat(), bytearray(file.read_bytes())
        content[place] ^= 1
        file.write_bytes(content)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    return change


def written(name: str, text: str) -> Callable[[Path], None]:
    """A file with another content."""

    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


def test_a_folder_as_it_was_written_passes(folder: Path) -> None:
    check_whole(folder)
    check_weights_hash(str(folder))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flipped("config.json", 3), r"config\.json is damaged: its bytes"),
        (flipped("tokenizer.json", 3), r"tokenizer\.json is damaged: its bytes"),
        (written("config.json", "{}"), r"config\.json has 2 bytes instead of \d+"),
        (written("model.safetensors", ""), r"model\.safetensors has 0 bytes instead of"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    ],
)
def test_a_change_is_told_with_the_way_out(
    folder: Path, change: Callable[[Path], None], said: str
) -> None:
    change(folder)
    with pytest.raises(UserError, match=rf"{said}.*overwrite=true.*\"files\" in .*stage\.json"):
        check_whole(folder)


def test_weights_are_read_in_full_only_where_they_are_loaded(folder: Path) -> None:
    flipped("model.safetensors", -1)(folder)
    check_files(folder)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged: its bytes"):
        check_weights_hash(str(folder))


def test_weights_are_hashed_once_until_they_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_cli.folders.manifest.SMALL", 0)
    check_weights_hash(str(folder))
    read: list[Path] = []

    def another(file: Path) -> str:
        read.append(file)
        return "another"

    monkeypatch.setattr("rlhf_cli.folders.manifest._sha256", another)
    check_weights_hash(str(folder))
    assert read == []
    os.utime(folder / "model.safetensors", ns=(0, 0))
    with pytest.raises(UserError, match="is damaged"):
        check_weights_hash(str(folder))
    assert read == [folder / "model.safetensors"]


def test_what_people_may_edit_is_not_verified(folder: Path) -> None:
    written("config.yaml", "seed: 1\n")(folder)
    (folder / "metrics.jsonl").unlink()
    check_whole(folder)


def test_a_meant_change_passes_once_its_entry_is_gone(folder: Path) -> None:
    written("config.json", json.dumps(CONFIG | {"note": 1}))(folder)
    manifest = json.loads((folder / "stage.json").read_text())
    del manifest["files"]["config.json"]
    (folder / "stage.json").write_text(json.dumps(manifest))
    check_whole(folder)


def test_a_foreign_folder_has_no_record_and_passes(folder: Path) -> None:
    (folder / "stage.json").unlink()
    flipped("model.safetensors", -1)(folder)
    check_whole(folder)
    check_weights_hash(str(folder))


# --------------------------------------------------------------------------- sound in itself


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("vocab_size", -1, r"vocab_size is -1, not a whole number from 1 to 2\^31"),
        ("vocab_size", 1e12, r"vocab_size is 1000000000000.0, not a whole number"),
        ("hidden_size", "64", "hidden_size is '64', not a whole number"),
        ("vocab_size", 7, "vocab_size=7 is more than the weights"),
        ("num_hidden_layers", 2, "num_hidden_layers=2 is more than the weights"),
        ("text_config", {"hidden_size": 10**6}, "hidden_size=1000000 is more than the weights"),
        ("architectures", "Llama", "architectures is 'Llama', not a list"),
        ("architectures", [3], r"architectures\[0\] is 3, not text"),
        ("max_position_embeddings", 0, "max_position_embeddings is 0, not a whole number"),
    ],
)
def test_a_config_that_no_weights_fit_is_refused(
    folder: Path, key: str, value: object, said: str
) -> None:
    (folder / "stage.json").unlink()
    (folder / "config.json").write_text(json.dumps(CONFIG | {key: value}))
    with pytest.raises(UserError, match=rf"config\.json: .*{said}"):
        check_whole(folder)


def test_the_vocabulary_of_a_model_that_sees_is_that_of_its_decoder(folder: Path) -> None:
    (folder / "stage.json").unlink()
    text = {"vocab_size": CONFIG["vocab_size"]}
    (folder / "config.json").write_text(
        json.dumps(CONFIG | {"vocab_size": 257152, "text_config": text})
    )
    check_whole(folder)


def test_an_adapter_needs_its_base(folder: Path) -> None:
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())

    def on(base: object) -> Path:
        words = {"base_model_name_or_path": base}
        (adapter / "adapter_config.json").write_text(json.dumps(words))
        return adapter

    check_whole(on(str(folder)))
    check_whole(on("owner/name"))
    with pytest.raises(UserError, match="is an adapter on /gone, which is gone"):
        check_whole(on("/gone"))
    with pytest.raises(UserError, match="which is an adapter too"):
        check_whole(on(str(adapter)))
    with pytest.raises(UserError, match="base_model_name_or_path is None, not a path"):
        check_whole(on(None))
    for rank, said in ((7, "r=7 is more than the weights"), (-1, "r is -1, not a whole number")):
        words = {"base_model_name_or_path": str(folder), "r": rank}
        (adapter / "adapter_config.json").write_text(json.dumps(words))
        with pytest.raises(UserError, match=said):
            check_whole(adapter)
    on(str(folder))
    flipped("config.json", 3)(folder)
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        check_whole(on(str(folder)))


# --------------------------------------------------------------------------- forms


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"kind": 3}, "kind is 3, not text"),
        ({"kind": None}, "kind is None, not text"),
        ({"parents": 3}, "parents is 3, not an object"),
        ({"parents": {"policy": "x"}}, "parents.policy is 'x', not an object"),
        ({"parents": {"policy": {"path": "x"}}}, "parents.policy.hash is missing"),
        ({"parents": {"p": {"path": "\0", "hash": ""}}}, r"parents.p.path is '.x00', not a path"),
        ({"files": []}, "files is \\[\\], not an object"),
        (
            {"files": {"a": {"size": -1, "sha256": ""}}},
            "files.a.size is -1, not a whole number of 0 or more",
        ),
        ({"reward": "x"}, "reward is 'x', not an object"),
        ({"reward": {"std": 0}}, "reward.std is 0, not a number above 0"),
        ({"reward": {"mean": float("nan")}}, "reward.mean is nan, not a finite number"),
        ({"reward": {"mean": True}}, "reward.mean is True, not a finite number"),
        ({"eos_ids": [1, "2"]}, r"eos_ids\[1\] is '2', not a whole number of 0 or more"),
        ({"head": {"step_end": 3}}, "head.step_end is 3, not text"),
        ({"template": "\ud800"}, "template is .*, not text"),
        ({"implicit_reward": {"beta": 0.1}}, "implicit_reward.per_token is missing"),
        ({"complete": 1}, "complete is 1, not true or false"),
    ],
)
def test_a_manifest_of_another_form_is_one_line(
    tmp_path: Path, entries: dict[str, object], said: str
) -> None:
    (tmp_path / "stage.json").write_text(json.dumps({"kind": "policy", **entries}))
    with pytest.raises(UserError, match=rf"stage\.json: damaged: {said}; make the folder again"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "nu", "[" * 100_000, '{"kind": ', "\ud800"])
def test_what_is_no_object_is_one_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(UserError, match=r"config\.json: damaged"):
        read_config(tmp_path)


def test_numbers() -> None:
    assert REAL.fits(0) and REAL.fits(-1.5)
    for value in (10**400, float("inf"), float("nan"), False, "1", None):
        assert not REAL.fits(value)
    assert COUNT.fits(0) and not COUNT.fits(1.0) and not COUNT.fits(-1)
    assert SIZE.fits(2**31) and not SIZE.fits(2**31 + 1) and not SIZE.fits(0)
    assert POSITIVE.fits(1e-300) and not POSITIVE.fits(0.0)
    assert misfit([1, 2], [COUNT, COUNT]) is None
    assert misfit([1], [COUNT, COUNT]) == "it holds 1 entries, not 2"


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("modules_to_save", 10, "modules_to_save is 10, not a list"),
        ("target_modules", {}, "target_modules is {}, not text"),
        ("target_modules", [1], "target_modules[0] is 1, not text"),
        ("lora_alpha", "16", "lora_alpha is '16', not a finite number"),
        ("lora_dropout", True, "lora_dropout is True, not a finite number"),
        ("target_modules", "all-linear", None),
        ("target_modules", ["q_proj"], None),
        ("modules_to_save", None, None),
    ],
)
def test_settings_of_an_adapter_have_their_types(name: str, value: Any, fault: str | None) -> None:
    assert misfit({"base_model_name_or_path": "base", name: value}, ADAPTER) == fault
