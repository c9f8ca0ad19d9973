"""Whatever happened to a file of a model folder, it is loaded or refused in one line.

Where stage.json records what was written, as our stages do, no changed byte passes.
"""

import contextlib
import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.tokenizers import load_tokenizer, stop_ids_of
from rlhf_cli.rewards.reward import load_reward
from rlhf_cli.runs.preflight import preflight
from tests.cli.made import POLICY, ROWS
from tests.pace import fast

ANY = settings(
    deadline=timedelta(seconds=10),  # an example that hangs fails
    phases=[Phase.explicit, Phase.generate],  # loading is slow, and a change says enough as it is
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FEW, MANY = 4, 15

REWARD, ADAPTER = "runs/demo/reward", "runs/demo/adapter"
JSON = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
FILES = [
    *(f"{POLICY}/{name}" for name in (*JSON, "model.safetensors", "stage.json")),
    *(f"{REWARD}/{name}" for name in ("config.json", "model.safetensors", "stage.json")),
    *(f"{ADAPTER}/{name}" for name in ("adapter_config.json", "adapter_model.safetensors")),
    f"{ADAPTER}/stage.json",
]
CPU = torch.device("cpu")
VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, -1, 0, 1, 3, 10**12, 10**400, 0.5, -1e300, float("nan"), "", "x", "\ud800", "\0"]
    + ["a/b", "../sft", "</s>", "{% for", "{{ 1 / 0 }}", [], [1], ["x"], {}, {"a": 1}, "9" * 300]
)


def change(draw: Any, file: Path) -> bytes:
    """A file cut, with flipped bits, or, where it is JSON, with another value somewhere."""
    content = file.read_bytes()
    ways = ["cut", "flip"] + 3 * ["value"] * (file.suffix == ".json")
    way = draw(st.sampled_from(ways))
    # Half of the flips hit the beginning, where safetensors say what follows.
    ends = st.sampled_from([200, len(content)])
    place = draw(st.integers(0, 2**20)) % min(draw(ends), len(content))
    if way == "cut":
        return content[:place]
    if way == "flip":
        bits = draw(st.integers(1, 255))
        return content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :]
    whole: Any = json.loads(content)
    spot, inside = whole, True
    while inside:
        key = draw(st.sampled_from(list(spot) if isinstance(spot, dict) else [*range(len(spot))]))
        inside = bool(isinstance(spot[key], dict | list) and spot[key] and draw(st.booleans()))
        spot = spot[key] if inside else spot
    if isinstance(spot, dict) and draw(st.integers(0, 3)) == 0:
        del spot[key]
    else:
        spot[key] = draw(VALUES)
    return json.dumps(whole).encode()


@contextlib.contextmanager
def changed(file: Path, content: bytes) -> Iterator[None]:
    """The file has another content for a while."""
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


def loaded(name: str) -> None:
    """Check and load what a file is part of, as the stages that read it do."""
    words = f"{ROWS} out=new"
    if name.startswith(ADAPTER):
        use(f"dpo {words} policy={ADAPTER} model=lora model.lora_rank=2")
        use(f"dpo {words} policy={ADAPTER}")
        words = f"{words} reward={ADAPTER}"
    use(f"ppo {words} algo.max_tokens=8")


def use(words: str) -> None:
    """The loading of a stage."""
    stage, *rest = words.split()
    cfg = compose(stage, rest)
    preflight(cfg)
    tokenizer = load_tokenizer(cfg.policy, cfg.model)
    Encoder(tokenizer, cfg.data)
    policy = load_policy(cfg.policy, cfg.model, tokenizer, CPU)
    stop_ids_of(cfg.policy, tokenizer)
    if stage == "ppo":
        load_reward(cfg.reward, cfg, tokenizer, CPU, policy)


def check(place: Path, name: str, content: bytes) -> str | None:
    """The line that refuses a changed file, if there is one; no other exception passes."""
    with changed(place / name, content), contextlib.chdir(place):
        try:
            loaded(name)
        except UserError as error:
            return str(error)
    return None


@pytest.fixture
def foreign(place: Path) -> Path:
    """The folders without a record of their files."""
    for file in place.glob("runs/*/*/stage.json"):
        manifest = json.loads(file.read_text())
        manifest.pop("files", None)
        file.write_text(json.dumps(manifest))
    return place


@pytest.mark.parametrize("name", [f"{POLICY}/config.json", f"{ADAPTER}/adapter_config.json"])
def test_unchanged_folders_are_loaded(name: str, place: Path) -> None:
    assert check(place, name, (place / name).read_bytes()) is None


@pytest.mark.parametrize("name", [f"{POLICY}/config.json", f"{ADAPTER}/adapter_config.json"])
def test_unrecorded_folders_are_loaded(name: str, foreign: Path) -> None:
    assert check(foreign, name, (foreign / name).read_bytes()) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@settings(ANY, max_examples=MANY)
@given(data=st.data())
def test_many_changes(name: str, data: st.DataObject, foreign: Path) -> None:
    check(foreign, name, change(data.draw, foreign / name))


@pytest.mark.parametrize(
    "name",
    fast(
        lambda name: name.endswith("tensors"),
        [name for name in FILES if not name.endswith("stage.json")],
    ),
)
@settings(ANY, max_examples=FEW)
@given(data=st.data())
def test_no_change_passes_that_is_recorded(name: str, data: st.DataObject, place: Path) -> None:
    content = change(data.draw, place / name)
    if content != (place / name).read_bytes():
        said = check(place, name, content)
        assert said is not None and Path(name).name in said
