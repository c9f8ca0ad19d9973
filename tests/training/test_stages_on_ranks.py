"""Whole stages on several ranks end as on one process."""

import contextlib
import importlib
from collections import defaultdict
from pathlib import Path

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.ranks.world import world
from tests.ranks import on_ranks
from tests.tiny import words_of
from tests.training.test_stages import RUNS, same

UNREAD = defaultdict(list, {"ppo": ["ptx"]})  # of the words of each stage
EACH_ALONE = ["hardware.tokens_per_microbatch=1", "hardware.rollout_tokens=1"]


def run_all(folder: Path, out: Path, runs: dict[str, list[str]]) -> None:
    """Run stages one after the other, each into a folder of its name."""
    with contextlib.chdir(folder):
        for name, (stage, *words) in runs.items():
            place = out / name if world().is_main else out / f"rank {world().rank}" / name
            given = [
                each for each in words_of(stage) if not any(key in each for key in UNREAD[name])
            ]
            cfg = compose(stage, [*given, *words, f"out={place}"])
            importlib.import_module(f"rlhf_cli.stages.{stage}").run(cfg)


TO_THE_BIT: dict[str, list[str]] = {
    "sft": ["sft", "algo.batch_size=2", "model.dropout=0"],
    "reward": ["reward", "algo.batch_size=2", "algo.epochs=1", "algo.max_steps=6"],
    "dpo": [*RUNS["dpo"], "algo.batch_size=2", "algo.epochs=1", "algo.max_steps=6"],
    "kto": [*RUNS["kto"], "algo.batch_size=2", "algo.max_steps=6"],
    "ppo": [*("ppo", "algo.batch_size=4", "algo.minibatch_size=2", "algo.steps=3")],
    "dapo": [
        *(*RUNS["dapo"], "algo.batch_size=2", "algo.minibatch_size=1", "algo.group_size=2"),
        "algo.steps=3",
    ],
}


@pytest.mark.parametrize(
    "names", [["dapo"], pytest.param([*TO_THE_BIT], marks=pytest.mark.slow)], ids=["grpo", "all"]
)
def test_with_a_micro_batch_each_two_ranks_end_with_the_bytes_of_one(
    names: list[str], chain: Path, tmp_path: Path
) -> None:
    runs = {name: [*TO_THE_BIT[name], *EACH_ALONE] for name in names}
    run_all(chain, tmp_path / "1", runs)
    on_ranks(2, run_all, chain, tmp_path / "2", runs)
    for name in runs:
        same(tmp_path / "1" / name, tmp_path / "2" / name)
