"""Whole stages on several ranks end as on one process."""

import contextlib
import importlib
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf_cli.config.compose import compose
from rlhf_cli.training.diagnosis import draws_of_rank
from tests.online.test_refresh import REFRESH
from tests.pace import slow
from tests.ranks import on_ranks
from tests.tiny import words_of
from tests.training.test_stages import RUNS, same, untimed, weights

UNREAD = defaultdict(
    list, {"ppo to the bit": ["ptx"], "ppo_klpen to the bit": ["ptx"]}
)  # of the words of each stage
EACH_ALONE = ["hardware.tokens_per_microbatch=1", "hardware.rollout_tokens=1"]
# Largest distance of a weight, and of figures in relation to their size.
FAR, SHARE = 1e-5, 1e-4


def run_all(folder: Path, out: Path, runs: dict[str, list[str]]) -> None:
    """Run stages one after the other, each into a folder of its name."""
    with contextlib.chdir(folder):
        for name, (stage, *words) in runs.items():
            given = [each for each in words_of(stage) if not any(k in each for k in UNREAD[name])]
            cfg = compose(stage, [*given, *words, f"out={out / name}"])
            importlib.import_module(f"rlhf_cli.stages.{stage}").run(cfg)


TO_THE_BIT: dict[str, list[str]] = {
    "sft": ["sft", "algo.batch_size=2", "model.dropout=0", "select_by=reward", "reward=regex:Hi"],
    "reward": ["reward", "algo.batch_size=2", "algo.epochs=1", "algo.max_steps=6"],
    "dpo": [*RUNS["dpo"], "algo.batch_size=2", "algo.epochs=1", "algo.max_steps=6"],
    "kto": [*RUNS["kto"], "algo.batch_size=2", "algo.max_steps=6"],
    "ppo to the bit": ["ppo", "algo.batch_size=4", "algo.minibatch_size=2", "algo.steps=3"],
    "ppo_klpen to the bit": [
        *(*RUNS["ppo_klpen"], "algo.batch_size=4", "algo.minibatch_size=2", "algo.steps=3"),
    ],
    "refresh to the bit": [
        *("grpo", *REFRESH, "algo.refresh_batch_size=2", "algo.refresh_replay=0"),
        *("algo.batch_size=2", "algo.minibatch_size=1", "algo.group_size=2", "algo.steps=4"),
    ],
    "dapo": [
        *(*RUNS["dapo"], "algo.batch_size=2", "algo.minibatch_size=1", "algo.group_size=2"),
        "algo.steps=3",
    ],
}


@pytest.mark.parametrize(
    "names",
    [["dapo"], slow([*TO_THE_BIT][:-1])],
    ids=["grpo", "all"],
)
def test_with_a_micro_batch_each_two_ranks_end_with_the_bytes_of_one(
    names: list[str], chain: Path, tmp_path: Path
) -> None:
    runs = {name: [*TO_THE_BIT[name], *EACH_ALONE] for name in names}
    run_all(chain, tmp_path / "1", runs)
    on_ranks(2, run_all, chain, tmp_path / "2", runs)
    for name in runs:
        same(tmp_path / "1" / name, tmp_path / "2" / name)


TWO = ["reward steps", "dpo bootstrap lora", "kto precomputed", "ppo"]
TWO += ["ppo watched", "ppo_klpen", "ppo four roles", "grpo refreshed", "grpo_process", "refresh"]
FOUR = ["reward of few", "dapo of few", "grpo watched"]
MORE = {
    # gradients so small that AdamW makes steps of their rounding, of one process as well where
    # micro-batches are cut otherwise
    "ppo_klpen": [*RUNS["ppo_klpen"], "algo.adam_eps=1e-3"],
    "refresh": ["grpo", *REFRESH, "algo.dynamic_sampling=0"],
    "reward of few": ["reward", "algo.batch_size=3", "algo.epochs=1"],
    "dapo of few": [*RUNS["dapo"], "algo.batch_size=2", "algo.minibatch_size=1"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("size", "names"), [(2, TWO), (4, FOUR)], ids=["two", "four"])
def test_ranks_end_as_one_process_up_to_rounding(
    size: int, names: list[str], chain: Path, tmp_path: Path
) -> None:
    """Of uneven micro-batches, of which some ranks have none, with all that decides by figures."""
    runs = {name: {**RUNS, **MORE}[name] for name in names}
    run_all(chain, tmp_path / "1", runs)
    on_ranks(size, run_all, chain, tmp_path / "n", runs, seconds=300)
    for name in names:
        one, other = tmp_path / "1" / name, tmp_path / "n" / name
        assert weights(one).keys() == weights(other).keys()
        for file in weights(one):
            torch.testing.assert_close(
                load_file(one / file), load_file(other / file), rtol=0, atol=FAR
            )
        for log in (one / "metrics.jsonl", one / "samples.jsonl"):
            if log.exists():
                near(untimed(log), untimed(other / log.name), SHARE)


def near(one: object, other: object, share: float) -> None:
    """The same but for rounding, in all that JSON may hold."""
    if isinstance(one, float):
        assert other == pytest.approx(one, rel=share, abs=1e-4)
    elif isinstance(one, dict):
        assert isinstance(other, dict) and one.keys() == other.keys()
        for name, value in one.items():
            near(value, other[name], share)
    elif isinstance(one, list):
        assert isinstance(other, list)
        for ours, theirs in zip(one, other, strict=True):
            near(ours, theirs, share)
    else:
        assert one == other


def draws(folder: Path, out: Path) -> tuple[list[float], list[float]]:
    """What a rank draws within a step and after it; then two runs with dropout."""
    torch.manual_seed(5)
    with draws_of_rank():
        inside: Tensor = torch.rand(3)
    after: Tensor = torch.rand(3)
    run_all(folder, out, {"one": ["sft"], "again": ["sft"]})
    return inside.tolist(), after.tolist()


@pytest.mark.slow
def test_ranks_draw_dropout_of_their_own_and_the_same_again(chain: Path, tmp_path: Path) -> None:
    (inside, after), (other, alike) = on_ranks(2, draws, chain, tmp_path / "2")
    torch.manual_seed(5)
    assert inside == torch.rand(3).tolist() != other and after == alike
    same(tmp_path / "2" / "one", tmp_path / "2" / "again")
    run_all(chain, tmp_path / "1", {"one": ["sft"]})
    assert weights(tmp_path / "1" / "one") != weights(tmp_path / "2" / "one")
