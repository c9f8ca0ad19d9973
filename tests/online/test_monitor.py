"""Alarms and the weights that are written: by hand, and in whole runs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rlhf_cli.config.compose import compose
from rlhf_cli.online.alarms import Alarms
from rlhf_cli.online.mismatch import mismatch
from rlhf_cli.online.monitor import WRITTEN
from rlhf_cli.online.written import WrittenWeights
from tests.contents import without_times
from tests.tiny import run_stage, words_of

CALM = {"kl": 1.0, "reward": 0.0, "entropy": 1.0, "length": 10.0, "repetition": 0.0, "ended": 1.0}
CALM |= {"unscored": 0.0}


def algo_of(*words: str) -> Any:
    gold = ["gold=length:2", "algo.eval_every=1"]
    return compose("ppo", [*words_of("ppo"), *gold, *words]).algo


@pytest.mark.parametrize(
    ("limit", "alarm", "broken"),
    [
        ("max_kl=2", "kl", {"kl": 2.1}),
        ("target_reward=0.5", "reward", {"reward": 0.5}),
        ("min_entropy=0.3", "entropy", {"entropy": 0.3}),
        ("max_length_drift=0.5", "length", {"length": 15.1}),
        ("max_length_drift=0.5", "length", {"length": 4.9}),
        ("max_repetition=0.2", "repetition", {"repetition": 0.21}),
        ("max_truncated=0", "truncated", {"ended": 0.9}),
        ("target_reward=-1", "reward", {"reward": -0.5}),
    ],
)
def test_a_limit_breaks_after_so_many_steps_in_a_row(
    limit: str, alarm: str, broken: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    algo = algo_of(f"algo.{limit}", "algo.alarm_steps=2", f"algo.stop_on=[{alarm}]")
    alarms = Alarms(algo, {})
    calm = CALM | ({"reward": -2.0} if alarm == "reward" else {})
    steps = [calm, {**calm, **broken}, calm, {**calm, **broken}, {**calm, **broken}]
    seen = [dict(each) for each in steps]
    stops = [alarms.on_rollouts(step, metrics) for step, metrics in enumerate(seen, 1)]
    assert stops == [[], [], [], [], [alarm]]
    assert [metrics[f"alarm/{alarm}"] for metrics in seen] == [0, 0, 0, 0, 1]
    assert set(seen[0]) - set(calm) == {f"alarm/{alarm}"}  # limits of null are not watched
    said = capsys.readouterr().err
    assert said.count("alarm at step 5") == 1 and f"algo.{limit}" in said and "stops" in said


def test_an_alarm_that_is_not_in_stop_on_only_shows(capsys: pytest.CaptureFixture[str]) -> None:
    alarms = Alarms(algo_of("algo.max_kl=0.5", "algo.alarm_steps=1"), {})
    metrics = [dict(CALM), dict(CALM)]
    assert [alarms.on_rollouts(step, each) for step, each in enumerate(metrics)] == [[], []]
    assert [each["alarm/kl"] for each in metrics] == [1, 1]
    assert capsys.readouterr().err.count("alarm") == 1  # said once, not at every step


def test_a_gap_of_sampling_above_its_limit_or_grown_is_an_alarm(
    capsys: pytest.CaptureFixture[str],
) -> None:
    algo = algo_of("algo.alarm_steps=2", "algo.stop_on=[sampling_gap]")
    for course, stopped in (
        ([0.012, 0.029, 0.029], False),  # rounding of bfloat16, said once
        ([0.012, 0.06, 0.012, 0.06, 0.06], True),
        ([1e-6, 0.02, 0.031, 0.031], True),  # grown
        ([0.04, 0.045, 0.04], False),
    ):
        alarms, found = Alarms(algo, {}), []
        for step, gap in enumerate(course, 1):
            alarms = Alarms(algo, json.loads(json.dumps(alarms.state())))  # as after a resume
            found.append(alarms.on_updates(step, {"sampling_gap": gap}))
        assert found == [False] * (len(course) - 1) + [stopped]
        said = capsys.readouterr().err
        assert said.count("note: sampling and training differ") == 1
        assert ("alarm at step" in said) == stopped
    assert not Alarms(algo, {}).on_updates(1, {})  # nothing was learnt
    skipped = Alarms(algo, {})
    assert not skipped.on_updates(1, {"sampling_gap": math.nan})
    assert skipped.state() == Alarms(algo, {}).state()
    off: dict[str, float] = {"sampling_gap": 9.0}
    assert not Alarms(algo_of("algo.max_sampling_gap=null"), {}).on_updates(1, off)
    assert set(off) == {"sampling_gap"}


def test_the_mismatch_of_two_responses_by_hand() -> None:
    found = mismatch([torch.tensor([0.1, -0.3]), torch.tensor([0.0, 0.8, 0.0])])
    expected = {
        "sampling_gap": 1.2 / 5,
        "sampling_gap_p99": 0.8,
        "sampling_gap_max": 0.8,
        "sampling_kl": sum(math.expm1(d) - d for d in (0.1, -0.3, 0.8)) / 5,
        "sampling_far": 1 / 5,  # above ln 2
        "sampling_ratio_max": math.exp(0.8),
    }
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_reward_rising_while_gold_falls_is_over_optimisation() -> None:
    algo = algo_of("algo.overoptimised=2", "algo.stop_on=[overoptimised]")
    alarms, found = Alarms(algo, {}), []
    course = [(1.0, 3.0), (1.1, 2.9), (1.2, 3.0), (1.3, 2.8), (1.4, 2.7)]
    for step, (reward, gold) in enumerate(course, 1):
        alarms = Alarms(algo, json.loads(json.dumps(alarms.state())))  # as after a resume
        found.append(alarms.on_evaluation(step, {"eval/reward": reward, "eval/gold": gold}))
    assert found == [False, False, False, False, True]


# --------------------------------------------------------------------------- weights


def test_the_average_follows_its_recursion_and_leaves_the_model_alone() -> None:
    """As InstructGPT's, golden ema_0.992: decay * average + (1 - decay) * weight."""
    model = nn.Linear(1, 1, bias=False)
    written = WrittenWeights(model, algo_of("algo.ema_decay=0.9"), {}, {})
    expected = model.weight.item()
    for value in (1.0, -2.0, 0.5):
        with torch.no_grad():
            model.weight.fill_(value)
        written.after_update()
        expected = 0.9 * expected + 0.1 * value
    with written.in_place():
        assert model.weight.item() == pytest.approx(expected, rel=1e-6)
    assert model.weight.item() == 0.5
    again = WrittenWeights(model, algo_of("algo.ema_decay=0.9"), written.state(), written.tensors())
    again.put()
    assert model.weight.item() == pytest.approx(expected, rel=1e-6)


def test_the_best_weights_are_those_that_were_measured() -> None:
    model = nn.Linear(1, 1, bias=False)
    written = WrittenWeights(model, algo_of("algo.keep=reward"), {}, {})
    for step, (weight, reward) in enumerate([(1.0, 0.1), (2.0, 0.5), (3.0, 0.5), (4.0, 0.2)], 1):
        with torch.no_grad():
            model.weight.fill_(weight)
        written.offer(step, {"reward": reward, "eval/gold": -reward})
        written = WrittenWeights(
            model, algo_of("algo.keep=reward"), written.state(), written.tensors()
        )
    written.put()
    assert model.weight.item() == 2.0 and written.kept["kept_step"] == 2  # the first of equals


# --------------------------------------------------------------------------- whole runs


def run(stage: str, out: Path, *more: str) -> list[dict[str, Any]]:
    """Without resume points."""
    return run_stage(stage, out, "hardware.save_every=null", *more)


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_stopped_run_and_the_best_of_a_whole_one_write_what_was_measured(
    stage: str, inside: None, tmp_path: Path
) -> None:
    """No update follows a measurement that ends the run, and the best weights are as measured."""
    whole = run(stage, tmp_path / "whole", "algo.keep=reward")
    best = max(whole, key=lambda each: each["reward"])  # the first of equals
    reached = [f"algo.target_reward={best['reward'] - 1e-5}", "algo.alarm_steps=1"]
    out = tmp_path / "stopped"
    found = run(stage, out, *reached, "algo.stop_on=[reward]")
    assert found[-1]["step"] == best["step"] and found[-1]["reward"] == best["reward"]
    assert found[-1]["alarm/reward"] == 1 and "loss" not in found[-1]
    assert weights(out) == weights(tmp_path / "whole")
    written, again = (
        json.loads((tmp_path / name / "stage.json").read_text())["metrics"]
        for name in ("whole", "stopped")
    )
    assert written["kept_step"] == best["step"]
    assert all(written[name] == again[name] for name in WRITTEN)


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_watching_changes_nothing(stage: str, inside: None, tmp_path: Path) -> None:
    """Evaluations, an average that is looked at and alarms leave the run as it was."""
    plain = run(stage, tmp_path / "plain")
    watched = ["gold=length:2", "algo.eval_every=2", "algo.eval_prompts=3", "algo.max_kl=0.001"]
    found = run(stage, tmp_path / "watched", *watched)
    assert weights(tmp_path / "plain") == weights(tmp_path / "watched")
    for before, after in zip(plain, found, strict=True):
        for name, value in without_times(before).items():
            assert after[name] == value
    assert [each["step"] for each in found if "eval/gold" in each] == [2, 4, 6]
    averaged = run(stage, tmp_path / "averaged", *watched, "algo.ema_decay=0.99")
    assert [each["reward"] for each in averaged] == [each["reward"] for each in plain]
    assert weights(tmp_path / "averaged") != weights(tmp_path / "plain")


def test_an_average_of_little_decay_is_the_last_weights(inside: None, tmp_path: Path) -> None:
    run("ppo", tmp_path / "plain")
    run("ppo", tmp_path / "averaged", "algo.ema_decay=1e-7")
    ours, theirs = (
        load_file(tmp_path / name / "model.safetensors") for name in ("plain", "averaged")
    )
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-4, atol=1e-6)


def test_what_broke_a_limit_is_not_kept_as_the_best(inside: None, tmp_path: Path) -> None:
    """Nor is it where the metric comes from an evaluation; stage.json names what ended the run."""
    whole = run("ppo", tmp_path / "whole", "algo.eval_every=1")
    place = next(i for i in range(2, 6) if whole[i]["kl"] > max(w["kl"] for w in whole[:i]))
    limit = [f"algo.max_kl={whole[place]['kl'] * 0.999}", "algo.alarm_steps=1"]
    words = ["algo.eval_every=1", "algo.keep=eval/reward", *limit, "algo.stop_on=[kl]"]
    run("ppo", tmp_path / "out", *words)
    found = json.loads((tmp_path / "out/stage.json").read_text())
    assert found["stopped"] == {"step": place + 1, "alarms": ["kl"]}
    before = whole[:place]
    best = max(before, key=lambda each: each["eval/reward"])  # the first of equals
    assert found["metrics"]["kept_step"] == best["step"]
    assert found["metrics"]["eval/reward"] == best["eval/reward"]
