"""Rewards as the stages use them: normalised, checked, and replaced where no EOS came."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification

from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.tokens import Tokens
from rlhf_cli.models.heads import init_head
from rlhf_cli.models.score import scores_of
from rlhf_cli.rewards.sources import (
    CheckpointReward,
    RuleReward,
    load_reward,
    scores_with_eos_rule,
    statistics_of,
)
from rlhf_cli.rollout.rollouts import Rollout
from tests.toys import FROZEN, bpe, hardware_of, llama, sequences_of

SEQUENCES = sequences_of(5)
ROLLOUTS = [
    Rollout(Prompt("p"), tokens, [], finish, text)
    for tokens, finish, text in zip(
        SEQUENCES,
        ("eos", "length", "stop", "eos", "length"),
        ("a", "b a", "c", "", "a a"),
        strict=True,
    )
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A reward model with statistics."""
    tokenizer = bpe()
    config: Any = llama(len(tokenizer)).config
    config.num_labels = 1
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    init_head(model.score, 0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    manifest = {"kind": "reward", "reward": {"mean": 0.7, "std": 2.0}, "metrics": {}}
    (tmp_path / "stage.json").write_text(json.dumps(manifest))
    return tmp_path


def load(spec: str) -> Any:
    return load_reward(spec, FROZEN, bpe(), hardware_of(), torch.device("cpu"))


def test_a_checkpoints_score_is_centred_and_scaled(folder: Path) -> None:
    reward = load(str(folder))
    assert isinstance(reward, CheckpointReward)
    raw = scores_of(reward.model, SEQUENCES, hardware_of())
    expected = ((raw - 0.7) / 2.0).tolist()
    assert reward.score(ROLLOUTS) == pytest.approx(expected)
    assert not any(weight.requires_grad for weight in reward.model.parameters())


def test_a_foreign_reward_model_is_used_raw(folder: Path) -> None:
    (folder / "stage.json").unlink()
    assert statistics_of(str(folder)) == (0.0, 1.0)
    reward = load(str(folder))
    raw = scores_of(reward.model, SEQUENCES, hardware_of())
    assert reward.score(ROLLOUTS) == pytest.approx(raw.tolist())


@pytest.mark.parametrize(("accuracy", "holds"), [(0.5, False), (0.7, True), (0.2, False)])
def test_a_reward_model_that_is_a_coin_is_refused(
    accuracy: float, holds: bool, folder: Path
) -> None:
    manifest = {"kind": "reward", "metrics": {"eval/accuracy": accuracy}}
    (folder / "stage.json").write_text(json.dumps(manifest))
    told: list[Any] = []
    load(str(folder)).check([], lambda *all: told.append(all))
    assert [(name, value, good) for name, value, good, _ in told] == [
        ("reward_accuracy", accuracy, holds)
    ]


def test_a_rule_scores_the_text() -> None:
    reward = load("regex:a")
    assert isinstance(reward, RuleReward)
    assert reward.score(ROLLOUTS) == [1, 1, 0, 0, 1]


def test_the_missing_eos_rule_replaces_the_score() -> None:
    """A stop string is an end; max_tokens is none."""
    reward = load("regex:a")
    assert scores_with_eos_rule(ROLLOUTS, reward, None).tolist() == [1, 1, 0, 0, 1]
    assert scores_with_eos_rule(ROLLOUTS, reward, -3.0).tolist() == [1, -3, 0, 0, -3]


def test_a_rule_gives_as_many_scores_as_rollouts() -> None:
    one = Rollout(Prompt("p"), Tokens([1], [2]), [0.0], "eos", "a")
    assert scores_with_eos_rule([one], load("length:1"), 0.0).shape == (1,)
