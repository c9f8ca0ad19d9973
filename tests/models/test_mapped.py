"""Ranks of a machine share the pages of a model's float32 weights, whatever type its files have."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.models import mapped
from rlhf_cli.models.load import load_base, load_policy
from rlhf_cli.models.save import save_model
from rlhf_cli.ranks.world import World, world
from tests.ranks import on_ranks
from tests.toys import bpe, llama, model_of

SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}


def own_memory() -> int:
    """Bytes of this process that are no pages of a file."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def loaded(folder: Path, over: str, temporary: str) -> tuple[float, bool, list[float], int]:
    """What loading takes as a share of the model, whether it is named so, weights, files left."""
    world().shard(over)
    tempfile.tempdir = temporary
    mapped.AT_ONCE = 2**18
    first = load_base(str(folder), model_of(), None, set())  # and all that is imported for it
    before = own_memory()
    model = load_base(str(folder), model_of(), None, set())
    share = (own_memory() - before) / sum(4 * each.numel() for each in model.parameters())
    sums = [each.double().sum().item() for each in model.parameters()]
    same = model.config._name_or_path == str(folder)
    sharded = load_policy(str(folder), model_of(), bpe(), torch.device("cpu"))
    del first, model, sharded
    world().barrier("the first rank to have removed what it wrote")
    return share, same, sums, len(list(Path(temporary).glob("rlhf-cli-*")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = bpe()
    model = llama(len(tokenizer), **SIZES)
    save_model(model, tokenizer, tmp_path / "policy", True, torch.bfloat16, "3MB")
    assert len(list((tmp_path / "policy").glob("*.safetensors"))) > 1
    return tmp_path / "policy"


def test_ranks_share_what_they_load(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(mapped, "AT_ONCE", mapped.AT_ONCE)
    share_of_one, _, weights, _ = loaded(folder, "none", str(place))
    assert share_of_one > 0.9
    for share, named, same, left in on_ranks(2, loaded, folder, "full", str(place)):
        assert share < 0.1 and named and same == weights and left == 0


class Sharded(World):
    """A rank of a sharded run, alone."""

    mesh: Any = object()


def test_a_signal_leaves_nothing_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(mapped, "world", Sharded)
    with mapped.mapped(str(folder)) as place:
        assert (Path(place) / mapped.INDEX).is_file()
        ended = (
            "import os, signal, sys; from pathlib import Path\n"
            "import rlhf_cli.runs.session; from rlhf_cli.runs import interrupts\n"
            "from rlhf_cli.models import mapped\n"
            "mapped._written.add(Path(sys.argv[1])); interrupts.take()\n"
            "os.kill(os.getpid(), signal.SIGTERM)"
        )
        status = subprocess.run([sys.executable, "-c", ended, place], timeout=60).returncode
        assert status == 75 and not Path(place).exists()
    assert not mapped._written


def test_they_load_it_each_where_there_is_no_room(folder: Path, tmp_path: Path) -> None:
    (place := tmp_path / "no folder").write_text("")
    for share, *_ in on_ranks(2, loaded, folder, "full", str(place)):
        assert share > 0.9
