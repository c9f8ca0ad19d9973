"""What a folder is, told without torch: whole or cut, its kind, its identity."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlhf_cli.config.errors import UserError
from rlhf_cli.folders.integrity import check_weights
from rlhf_cli.folders.manifest import (
    content_hash,
    kind_of,
    read_manifest,
    tokenizer_hash,
)
from tests.toys import bpe, characters

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder with one safetensors file."""
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def test_whole_weights_pass(weights: Path) -> None:
    check_weights(weights)


@pytest.mark.parametrize("keep", [0, 5, 8, 20, 100, -1])
def test_cut_weights_are_detected(weights: Path, keep: int) -> None:
    file = weights / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="model.safetensors: (damaged|truncated) weights"):
        check_weights(weights)


@pytest.mark.parametrize(
    "header", [b"[]", b'{"a": {}}', b"\xff\xff", b'{"a": {"data_offsets": 3}}']
)
def test_a_damaged_header_is_detected(weights: Path, header: bytes) -> None:
    (weights / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match="damaged weights"):
        check_weights(weights)


def test_missing_weights_are_detected(weights: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (weights / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"weights missing: model-2\.safetensors"):
        check_weights(weights)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no weights"):
        check_weights(tmp_path / "empty")


# --------------------------------------------------------------------------- identities


def test_kinds_of_folders(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    for name, kind in (
        ("LlamaForCausalLM", "policy"),
        ("LlamaForSequenceClassification", "reward"),
    ):
        config.write_text(json.dumps({"architectures": [name]}))
        assert kind_of(tmp_path) == kind
    adapter = {"task_type": "SEQ_CLS", "base_model_name_or_path": "x"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    assert kind_of(tmp_path) == "reward"
    (tmp_path / "stage.json").write_text('{"kind": "policy"}')
    assert kind_of(tmp_path) == "policy"
    (tmp_path / "stage.json").write_text('{"kind": ')
    with pytest.raises(UserError, match=r"stage\.json: damaged"):
        read_manifest(tmp_path)


def test_identities_change_with_the_content(weights: Path) -> None:
    assert content_hash("owner/name") == "owner/name"
    before = content_hash(str(weights))
    (weights / "notes.txt").write_text("x")
    assert content_hash(str(weights)) == before
    save_file({**TENSORS, "b": torch.zeros(2)}, weights / "model.safetensors")
    assert content_hash(str(weights)) != before
    assert tokenizer_hash(weights) is None
    hashes = set()
    for tokenizer in (bpe(), bpe(), characters()):
        tokenizer.save_pretrained(weights)
        hashes.add(tokenizer_hash(weights))
    assert len(hashes) == 2 and None not in hashes


def test_an_adapter_is_another_one_on_another_base(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for place in (base, adapter):
        place.mkdir()
        save_file(TENSORS, place / "model.safetensors")
    config = {"base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    before = content_hash(str(adapter))
    assert content_hash(str(adapter)) == before
    save_file({**TENSORS, "b": torch.zeros(2)}, base / "model.safetensors")
    assert content_hash(str(adapter)) != before
