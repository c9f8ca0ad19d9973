"""Losses of the user's: given by name, the same as ours to the bit, and checked."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.runs.preflight import preflight
from tests.contents import without_times
from tests.tiny import run_stage, words_of

SOURCE = """
import torch
from torch.nn.functional import logsigmoid

def mine(chosen_logps, rejected_logps, reference_chosen_logps, reference_rejected_logps, beta,
         label_smoothing=0.0):
    h = (chosen_logps - reference_chosen_logps) - (rejected_logps - reference_rejected_logps)
    return -(1 - label_smoothing) * logsigmoid(beta * h) - label_smoothing * logsigmoid(-beta * h)

def clipped(logprobs, old_logprobs, advantages, clip, clip_high=None, dual_clip=None):
    ratio = (logprobs - old_logprobs).clamp(max=20.0).exp()
    high = clip if clip_high is None else clip_high
    return torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip, 1 + high) * advantages)

def per_token(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, gamma):
    return gamma + (rejected_logps / rejected_lengths - chosen_logps / chosen_lengths).exp()

def every(**given):
    print(sorted(name for name in given))
    return given["logprobs"].mul_(-1.0)

def number(chosen_logps): return chosen_logps.mean().item()
def mean(chosen_logps): return chosen_logps.mean()
def whole(chosen_logps): return chosen_logps.long()
def flat(reference_chosen_logps): return reference_chosen_logps * 1.0
def endless(chosen_logps): return chosen_logps / 0
def broken(chosen_logps):
    return inner(chosen_logps)
def inner(x):
    raise KeyError("no such thing")
def other(chosen, rejected): ...
def nothing(beta): ...
async def later(chosen_logps): ...
"""


@pytest.fixture(autouse=True)
def inside(chain: Path, tmp_path: Path) -> Iterator[None]:
    """Work in the chain's folder, as a user would, with losses in own.py."""
    (tmp_path / "own.py").write_text(SOURCE)
    with contextlib.chdir(chain):
        yield


def figures(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What any loss has, and no clock says."""
    ours = ("gradient_weight", "eval/gradient_weight")
    return [
        {key: value for key, value in without_times(line).items() if key not in ours}
        for line in lines
    ]


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("stage", "name", "more"),
    [
        ("dpo", "mine", ["algo.label_smoothing=0.1", "algo.sft_coef=0.5"]),
        ("grpo", "clipped", ["algo.clip_high=0.3"]),
        ("ppo", "clipped", ["hardware.tokens_per_microbatch=64"]),
    ],
)
def test_a_copy_of_our_loss_is_the_same_to_the_bit(
    stage: str, name: str, more: list[str], tmp_path: Path
) -> None:
    ours = run_stage(stage, tmp_path / "ours", *more)
    own = run_stage(stage, tmp_path / "own", *more, f"algo.loss={tmp_path}/own.py:{name}")
    assert figures(own) == figures(ours)
    assert weights(tmp_path / "own") == weights(tmp_path / "ours")
    inputs = json.loads((tmp_path / "own/stage.json").read_text())["inputs"]
    assert f"algo.loss {tmp_path}/own.py" in inputs


def test_a_loss_of_keys_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is given what it names, or all; what it does to a tensor stays its own."""
    words = [f"algo.loss={tmp_path}/own.py:per_token", "algo.gamma=2", "algo.epochs=1"]
    lines = run_stage("dpo", tmp_path / "dpo", *words)
    assert all(line["loss"] > 2 for line in lines)
    words = [f"algo.loss={tmp_path}/own.py:every", "algo.steps=1", "algo.kl_coef=0"]
    (line,) = run_stage("grpo", tmp_path / "grpo", *words)
    assert line["loss/policy"] > 0
    told = capsys.readouterr().err
    names = "advantages, clip, clip_high, dual_clip, logprobs, mask, old_logprobs"
    assert str([*names.split(", "), "reference_logprobs"]) in told
    assert "algo.loss: code of" in told


def test_a_changed_file_makes_another_run(tmp_path: Path) -> None:
    words = [f"algo.loss={tmp_path}/own.py:mine", "algo.epochs=1"]
    run_stage("dpo", tmp_path / "out", *words)
    (tmp_path / "own.py").write_text(SOURCE + "\n")
    with pytest.raises(UserError, match=r"algo.loss \(.*own.py has changed since"):
        run_stage("dpo", tmp_path / "out", *words)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("number", "number gave float; it must give a tensor of losses, of the shape of chosen"),
        ("whole", "gave torch.int64; it must give a tensor of losses"),
        ("mean", r"gave losses of shape \(\), not \(8,\) as chosen_logps is"),
        ("flat", "gave losses without a gradient; it must compute them from chosen_logps"),
        ("endless", "gave losses that are not finite, for log-probs that all are"),
        ("broken", r"own.py:broken: KeyError: 'no such thing' \(own.py line 30\)"),
    ],
)
def test_what_is_no_loss(
    name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunError, match=said) as told:
        run_stage("dpo", tmp_path / "out", f"algo.loss={tmp_path}/own.py:{name}")
    assert "\n" not in str(told.value)
    if name == "broken":
        assert "own.py line 28 in broken: return inner(chosen_logps)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "words", "said"),
    [
        ("dpo", ["{}:nobody"], "defines no function nobody (functions: mine, clipped"),
        ("dpo", ["nowhere.py:f"], "algo.loss=nowhere.py:f: no such file: nowhere.py"),
        (
            "dpo",
            ["{}:other"],
            "cannot be given 'chosen'; parameters are given by name: chosen_logps",
        ),
        ("dpo", ["{}:nothing"], "names nothing to compute a loss from"),
        ("dpo", ["{}:later"], "is async"),
        ("dpo", ["{}:clipped"], "cannot be given 'logprobs'"),
        ("grpo", ["{}:mine"], "parameters are given by name: logprobs, old_logprobs"),
        ("dpo", ["{}:per_token"], "names gamma, so it needs algo.gamma=VALUE: Margin that"),
        ("dpo", ["{}:mean", "algo.tau=1"], "algo.tau is not used by algo.loss="),
        ("dpo", ["{}:mean", "algo.soft_labels=true"], "algo.soft_labels is not used by algo.loss="),
        ("dpo", ["{}:mean", "algo=ipo"], "algo.tau is not used by algo.loss="),
        ("grpo", ["{}:clipped", "algo.clip=null"], "names clip, so it needs algo.clip=VALUE"),
        ("ppo", ["{}:every", "algo.old_kl_coef=1"], "algo.old_kl_coef is not used by algo.loss="),
        ("reward", ["{}:mine"], "algo.loss must be bradley_terry|"),
        ("dpo", ["mine"], "algo.loss must be dpo|"),
    ],
)
def test_what_is_refused_before_anything_runs(
    stage: str, words: list[str], said: str, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text("raise SystemExit('was run')\n" + SOURCE)
    loss, *more = words
    with pytest.raises(UserError) as told:
        compose(stage, [*words_of(stage), f"algo.loss={loss.format(tmp_path / 'own.py')}", *more])
    assert said in str(told.value) and "\n" not in str(told.value)


def test_a_check_tells_of_the_code_and_runs_none(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("raise SystemExit('was run')\n" + SOURCE)
    words = [f"algo.loss={tmp_path}/own.py:mine", "algo.beta=0.2"]
    cfg = compose("dpo", [*words_of("dpo"), *words, f"out={tmp_path}/out"])
    (line,) = (line for line in preflight(cfg, check_only=True).lines() if "algo.loss" in line)
    assert line.endswith(
        "own.py runs: mine gives the losses, of chosen_logps, rejected_logps, "
        "reference_chosen_logps, reference_rejected_logps, beta, label_smoothing"
    )
    with pytest.raises(UserError, match=r"own.py: SystemExit: was run \(own.py line 1\)"):
        run_stage("dpo", tmp_path / "out", *words)
    assert not (tmp_path / "out" / "stage.json").exists()
