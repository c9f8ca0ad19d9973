"""A base, what our stages made of it, and what TRL's trainers did."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_cli.commands import export
from tests.interop.made import LORA, make_base, ours, theirs, write_rows

BASES = ("chat", "bare")


@pytest.fixture(scope="session", params=BASES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and rows.jsonl."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    make_base(request.param, folder / "base")
    write_rows(folder)
    return folder


@pytest.fixture(scope="session")
def made(place: Path) -> Path:
    """That folder with `ours/{sft,reward,dpo_lora,reward_lora}`, and `whole_...` of the last."""
    with contextlib.chdir(place):
        ours("sft", "ours/sft", "model=pretrained", "model.path=base")
        ours("reward", "ours/reward", "policy=ours/sft")
        ours("dpo", "ours/dpo_lora", "policy=ours/sft", *LORA)
        ours("reward", "ours/reward_lora", "policy=ours/sft", *LORA)
        for name in ("dpo_lora", "reward_lora"):
            export.run([f"ours/{name}", f"ours/whole_{name}"])
    return place


@pytest.fixture(scope="session")
def given(place: Path) -> Path:
    """That folder with `theirs/{sft,reward,dpo}` and the same with `_lora`, as TRL writes them."""
    pytest.importorskip("trl")
    import peft

    with contextlib.chdir(place):
        for stage, task in (("sft", "CAUSAL_LM"), ("reward", "SEQ_CLS"), ("dpo", "CAUSAL_LM")):
            theirs(stage, "base", Path(f"theirs/{stage}"))
            lora = peft.LoraConfig(r=4, lora_alpha=8, task_type=task)
            theirs(stage, "base", Path(f"theirs/{stage}_lora"), lora)
    return place


@pytest.fixture
def inside(place: Path) -> Iterator[None]:
    """Work there: adapters name their base from there."""
    with contextlib.chdir(place):
        yield
