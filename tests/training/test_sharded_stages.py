"""Whole stages on ranks that share one copy of all weights end as on one process."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import on_ranks
from tests.tiny import WORDS
from tests.training.test_stages import RUNS, untimed
from tests.training.test_stages_on_ranks import run_all

LORA = WORDS["lora"]
STAGES: dict[str, list[str]] = {
    "sft": ["sft", "model.dropout=0"],
    "reward": ["reward", "algo.epochs=1"],
    "reward lora": [*RUNS["reward token lora"]],
    "dpo": ["dpo", "algo.epochs=1"],
    "dpo bootstrap": [*RUNS["dpo bootstrap"]],
    "dpo lora": [*RUNS["dpo lora"], "algo.epochs=1"],
    "ppo": ["ppo"],
    "ppo four roles": [*RUNS["ppo four roles"]],
    "grpo": [*RUNS["grpo refreshed"]],
    "grpo lora": ["grpo", *LORA],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_two_ranks_learn_what_one_process_learns(name: str, chain: Path, tmp_path: Path) -> None:
    stage, *words = STAGES[name]
    run_all(chain, tmp_path, {"one": [stage, *words]})
    on_ranks(2, run_all, chain, tmp_path, {"two": [stage, *words, "hardware.shard=full"]})
    one, two = tmp_path / "one", tmp_path / "two"
    files = sorted(str(file.relative_to(one)) for file in one.rglob("*.safetensors"))
    assert files
    for file in files:
        ours, theirs = load_file(two / file), load_file(one / file)
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-5)
    lines = zip(untimed(two / "metrics.jsonl"), untimed(one / "metrics.jsonl"), strict=True)
    for our_line, their_line in lines:
        assert our_line == pytest.approx(their_line, rel=1e-3, abs=1e-4)
