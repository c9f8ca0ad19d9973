"""Rewards as the stages use them: normalised, checked, and replaced where no EOS came."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import (
    AutoModelForTokenClassification,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.folders.manifest import content_hash
from rlhf_cli.models.heads import init_head
from rlhf_cli.models.score import scores_of
from rlhf_cli.rewards.models import CheckpointReward, ImplicitReward, log_odds_of, statistics_of
from rlhf_cli.rewards.reward import RuleReward, load_reward
from rlhf_cli.rollout.rollouts import Rollout
from tests.toys import bpe, hardware_of, llama, run_of, sequences_of

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
    """The source of a reward of one term."""
    (term,) = load_reward(spec, run_of(), bpe(), torch.device("cpu")).terms
    assert term.weight == 1
    return term.source


def test_a_checkpoints_score_is_centred_and_scaled(folder: Path) -> None:
    reward = load(str(folder))
    assert isinstance(reward, CheckpointReward)
    raw = scores_of(reward.model, SEQUENCES, hardware_of())
    expected = ((raw - 0.7) / 2.0).tolist()
    assert reward.score(ROLLOUTS).tolist() == pytest.approx(expected)
    assert not any(weight.requires_grad for weight in reward.model.parameters())


def test_a_foreign_reward_model_is_used_raw(folder: Path) -> None:
    (folder / "stage.json").unlink()
    assert statistics_of(str(folder)) == (0.0, 1.0)
    reward = load(str(folder))
    raw = scores_of(reward.model, SEQUENCES, hardware_of())
    assert reward.score(ROLLOUTS).tolist() == pytest.approx(raw.tolist())


def test_of_a_model_alone_a_difference_is_log_odds(folder: Path) -> None:
    assert log_odds_of(str(folder)) == 2.0  # by which its scores are divided
    for spec in (f"0.5*{folder}", f"{folder} + length:20", "length:20"):
        assert log_odds_of(spec) is None
    said = json.loads((folder / "stage.json").read_text())
    for target, scale in (("label", 2.0), ("score", None)):  # a logit, and a number of theirs
        (folder / "stage.json").write_text(json.dumps({**said, "head": {"target": target}}))
        assert log_odds_of(str(folder)) == scale


@pytest.mark.parametrize(("accuracy", "holds"), [(0.5, False), (0.7, True), (0.2, False)])
def test_a_reward_model_that_is_a_coin_is_refused(
    accuracy: float, holds: bool, folder: Path
) -> None:
    manifest = {"kind": "reward", "metrics": {"eval/accuracy": accuracy}}
    (folder / "stage.json").write_text(json.dumps(manifest))
    told: list[Any] = []
    load(str(folder)).check([], lambda *all: told.append(all), "reward")
    assert [(name, value, good) for name, value, good, _ in told] == [
        ("reward_accuracy", accuracy, holds)
    ]


def test_a_rule_scores_the_text() -> None:
    reward = load("regex:a")
    assert isinstance(reward, RuleReward)
    assert reward.score(ROLLOUTS).tolist() == [1, 1, 0, 0, 1]


# --------------------------------------------------------------------------- steps and tokens


def token_model(place: Path, **head: Any) -> Any:
    """A folder with a token classifier, as the reward stage writes it, and the plain model."""
    tokenizer = bpe()
    config: Any = llama(len(tokenizer)).config
    config.num_labels = 1
    torch.manual_seed(1)
    LlamaForTokenClassification(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    level = "token" if head["step_end"] is None else "step"
    manifest = {"kind": "reward", "level": level, "head": head, "reward": {"mean": 0.5, "std": 3.0}}
    (place / "stage.json").write_text(json.dumps(manifest))
    return AutoModelForTokenClassification.from_pretrained(place).eval()


@torch.no_grad()
def logits_at(model: Any, tokens: Tokens) -> Tensor:
    """Of each response token, alone and without padding."""
    logits: Tensor = model(torch.tensor([tokens.prompt + tokens.response])).logits[0, :, 0]
    return logits[len(tokens.prompt) :]


def written(*texts: str) -> list[Rollout]:
    """Rollouts of texts; the last one was cut before its EOS."""
    tokenizer = bpe()
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    ends = [[2]] * (len(texts) - 1) + [[]]
    return [
        Rollout(Prompt("p"), Tokens([1, 5, 6][: 1 + i % 3], [*each, *end]), [], "eos", text)
        for i, (each, end, text) in enumerate(zip(ids, ends, texts, strict=True))
    ]


# text -> how it begins up to the end of each step but the last, which ends with the response
STEPS: dict[str, list[str]] = {
    "the cat": [],
    "the cat\nsat\n\non a mat": ["the cat\n", "the cat\nsat\n\n"],
    "\n\n": [],
    "sat\n": [],
    "the dog\nran to": ["the dog\n"],
}


@pytest.mark.parametrize("aggregate", ["product", "min"])
def test_steps_make_one_score(aggregate: str, tmp_path: Path) -> None:
    """The log-probability that all are right, or the logit of the least certain."""
    model = token_model(tmp_path, aggregate=aggregate, step_end="\n")
    rollouts = written(*STEPS)
    found = load(str(tmp_path)).score(rollouts).tolist()
    for rollout, score in zip(rollouts, found, strict=True):
        response = rollout.tokens.response
        shown = [str(bpe().decode(response[: count + 1])) for count in range(len(response))]
        places = [
            next(i for i, text in enumerate(shown) if text.startswith(whole))
            for whole in STEPS[rollout.text]
        ]
        steps = logits_at(model, rollout.tokens)[[*places, len(response) - 1]]
        expected = logsigmoid(steps).sum() if aggregate == "product" else steps.min()
        assert score == pytest.approx((expected.item() - 0.5) / 3, abs=1e-5), rollout.text


@pytest.mark.parametrize("aggregate", ["mean", "sum"])
def test_tokens_make_one_score(aggregate: str, tmp_path: Path) -> None:
    """Of the response alone: neither prompt nor padding counts."""
    model = token_model(tmp_path, aggregate=aggregate, step_end=None)
    for rollouts in (ROLLOUTS, ROLLOUTS[1:2], ROLLOUTS[::-1]):
        found = load(str(tmp_path)).score(rollouts).tolist()
        logits = [logits_at(model, rollout.tokens) for rollout in rollouts]
        raw = [each.mean() if aggregate == "mean" else each.sum() for each in logits]
        expected = [(value.item() - 0.5) / 3 for value in raw]
        assert found == pytest.approx(expected, abs=1e-5)


# --------------------------------------------------------------------------- implicit rewards


def dpo_output(place: Path, reference: str, **implicit: Any) -> Path:
    """A policy folder with what a dpo stage says of its reward."""
    folder = place / "policy"
    tokenizer = bpe()
    llama(len(tokenizer), seed=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    inside = folder / reference
    llama(len(tokenizer), seed=4).save_pretrained(inside)
    said = {"beta": 0.3, "per_token": False, "reference": reference, "hash": ""}
    manifest = {
        "kind": "policy",
        "reward": {"mean": -0.2, "std": 1.5},
        "implicit_reward": said | {"hash": content_hash(str(inside))} | implicit,
    }
    (folder / "stage.json").write_text(json.dumps(manifest))
    return folder


@torch.no_grad()
def logprobs_at(model: Any, tokens: Tokens) -> Tensor:
    """Of the response's own tokens, from plain logits."""
    logits = model(torch.tensor([tokens.prompt + tokens.response])).logits[0]
    grid = torch.log_softmax(logits[len(tokens.prompt) - 1 : -1], -1)
    return grid.gather(-1, torch.tensor(tokens.response)[:, None])[:, 0]


@pytest.mark.parametrize("where", ["inside", "elsewhere"])
@pytest.mark.parametrize("per_token", [False, True])
def test_an_implicit_reward_is_the_log_ratio(where: str, per_token: bool, tmp_path: Path) -> None:
    reference = "bootstrap" if where == "inside" else str(tmp_path / "ref")
    folder = dpo_output(tmp_path, reference, per_token=per_token)
    reward = load(str(folder))
    assert isinstance(reward, ImplicitReward)
    policy, ref = (llama(len(bpe()), seed=seed) for seed in (3, 4))
    ratios = [logprobs_at(policy, tokens) - logprobs_at(ref, tokens) for tokens in SEQUENCES]
    raw = [0.3 * (each.mean() if per_token else each.sum()).item() for each in ratios]
    expected = [(value + 0.2) / 1.5 for value in raw]
    assert reward.score(ROLLOUTS).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for model in (reward.policy, reward.reference):
        assert not any(weight.requires_grad for weight in model.parameters())


def test_the_reference_of_an_implicit_reward_must_be_there_unchanged(tmp_path: Path) -> None:
    folder = dpo_output(tmp_path, str(tmp_path / "ref"))
    config = tmp_path / "ref" / "config.json"
    config.write_text(config.read_text().replace("silu", "gelu"))
    with pytest.raises(UserError, match=r"ref has changed since; run dpo again, or give a reward"):
        load(str(folder))
    (tmp_path / "ref").rename(tmp_path / "other")
    with pytest.raises(UserError, match=r"its reference .*ref is gone; run dpo again"):
        load(str(folder))


# --------------------------------------------------------------------------- bad numbers


def overflow(model: Any, bad: float) -> None:
    """Let the head say `bad` of the second sequence of a batch."""

    def spoil(module: Any, inputs: Any, scores: Tensor) -> Tensor:
        spoilt = scores.clone()  # (B, 1)
        spoilt[1] = bad
        return spoilt

    model.score.register_forward_hook(spoil)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_costs_the_response_its_whole_reward(
    folder: Path, bad: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a user's function that fails; told once, with the row and the folder; counted."""
    reward = load_reward(f"{folder} + length:2", run_of(), bpe(), torch.device("cpu"))
    model = reward.terms[0].source
    assert isinstance(model, CheckpointReward)
    rollouts = [
        replace(each, tokens=replace(each.tokens, source=f"rows.jsonl:{i}"))
        for i, each in enumerate(ROLLOUTS)
    ]
    fine = reward.score(rollouts)
    overflow(model.model, bad)
    capsys.readouterr()
    scores, again = reward.score(rollouts), reward.score(rollouts)
    (lost,) = scores.total.isnan().nonzero()[:, 0].tolist()
    kept = [i for i in range(len(rollouts)) if i != lost]
    torch.testing.assert_close(scores.total[kept], fine.total[kept])
    assert again.total.isnan().sum() == 1
    assert not any(part.isinf().any() for part in scores.parts.values())
    assert reward.metrics(scores)[f"reward/{folder}/none"] == pytest.approx(1 / 5)
    assert capsys.readouterr().err == (
        f"note: reward={folder}: scores that are not finite are no reward, such as "
        f"rows.jsonl:{lost} (1 of the first 5; told once)\n"
    )
