"""What the switches of ppo and grpo mean in whole runs: relations between them, single steps."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.online import experience
from rlhf_cli.rollout.native import NativeEngine
from tests.pace import fast, slow
from tests.tiny import run_stage as run

ONCE = ["algo.epochs=1", "algo.minibatch_size=8", "algo.steps=3", "hardware.save_every=null"]
FIXED = ["algo.kl_controller=fixed", "algo.kl_target=null", "algo.kl_horizon=null"]

pytestmark = pytest.mark.usefixtures("inside")


def close(one: Path, other: Path, atol: float) -> None:
    """The same weights up to rounding."""
    ours, theirs = (load_file(out / "model.safetensors") for out in (one, other))
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=0, atol=atol)


def test_ppo_learning_once_from_a_batch_is_a2c(tmp_path: Path) -> None:
    """With one epoch, one minibatch and the same tie the ratio is 1 (2205.09123)."""
    same = [*ONCE, *FIXED, "algo.value_clip=null"]
    run("ppo", tmp_path / "ppo", *same)
    a2c = ["algo=a2c", "algo.clip=null", "algo.kl_in=reward", "algo.kl_estimator=k1"]
    run("ppo", tmp_path / "a2c", *a2c, *same)
    close(tmp_path / "ppo", tmp_path / "a2c", atol=2e-6)


def test_a_clip_out_of_reach_and_a_vanishing_penalty_are_the_same(tmp_path: Path) -> None:
    few = [*FIXED, "algo.steps=3"]
    run("ppo", tmp_path / "clip", *few, "algo.clip=1e9")
    penalty = ["algo=ppo_klpen", "algo.clip=null", "algo.old_kl_coef=1e-12"]
    found = run("ppo", tmp_path / "klpen", *few, *penalty, "algo.old_kl_target=1e-30")
    close(tmp_path / "clip", tmp_path / "klpen", atol=2e-6)
    # far above the target the coefficient doubles in every iteration
    assert [each["old_kl_coef"] for each in found] == pytest.approx([1e-12, 2e-12, 4e-12])
    assert all(each["old_kl_after"] > 1e-6 for each in found)


def test_every_sound_tie_in_the_loss_has_the_same_gradient_at_the_start(tmp_path: Path) -> None:
    """At pi = ref all are 0 with gradient 0: the first update is that of no tie at all."""
    words = [*ONCE, "algo.steps=1", "algo.kl_coef=3"]
    for estimator in ("k2", "k3", "weighted_k3", "full"):
        run("grpo", tmp_path / estimator, *words, f"algo.kl_estimator={estimator}")
    run("grpo", tmp_path / "none", *ONCE, "algo.steps=1", "algo.kl_coef=0")
    for estimator in ("k2", "k3", "weighted_k3", "full"):
        close(tmp_path / "none", tmp_path / estimator, atol=1e-4)


def test_the_exact_tie_is_the_mean_of_its_estimate(tmp_path: Path) -> None:
    """On a batch of many tokens the sampled KL comes near the one over the vocabulary."""
    many = [*ONCE, "algo.batch_size=40", "algo.minibatch_size=40", "algo.group_size=8"]
    same = [*many, "algo.kl_coef=1e-9", "algo.lr=2e-2"]
    full = run("grpo", tmp_path / "full", *same, "algo.kl_estimator=full")[-1]
    weighted = run("grpo", tmp_path / "weighted", *same)[-1]
    assert full["loss/kl"] > 1e-3
    # the estimate has a long tail: of two seeds before and after, 0.07 to 0.32 above
    assert weighted["loss/kl"] == pytest.approx(full["loss/kl"], rel=0.4)


class Passes:
    """Counts the passes that score responses, by whether the reference makes them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of_policy = self.of_reference = 0
        self._within = False
        score, active = logprobs_of, Reference.active

        def scored(*args: Any, **options: Any) -> Any:
            if self._within:
                self.of_reference += 1
            else:
                self.of_policy += 1
            return score(*args, **options)

        @contextlib.contextmanager
        def acting(reference: Reference) -> Iterator[Any]:
            with active(reference) as frozen:
                self._within = True
                yield frozen
                self._within = False

        monkeypatch.setattr(experience, "logprobs_of", scored)
        monkeypatch.setattr(Reference, "active", acting)


@pytest.mark.parametrize(
    ("stage", "words", "more"),
    [
        ("grpo", [], 0),
        pytest.param(  # charged before the update
            *("grpo", ["algo.kl_in=reward", "algo.kl_estimator=k1"], 2), marks=pytest.mark.slow
        ),
        slow("ppo", ["algo.kl_in=loss", "algo.kl_estimator=k2"], 0),
    ],
)
def test_a_single_update_has_old_log_probs_itself(
    stage: str, words: list[str], more: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where sampling computes otherwise than training, as in bfloat16: no pass of the policy."""
    same = [*ONCE, "algo.steps=2", *words]
    exact = run(stage, tmp_path / "exact", *same)
    monkeypatch.setattr(NativeEngine, "exact", False)
    passes = Passes(monkeypatch)
    found = run(stage, tmp_path / "own", *same)
    # at the start, and of what was written; where they are needed, of each batch, the first's once
    assert (passes.of_policy, passes.of_reference) == (max(2, 1 + more), 3)
    close(tmp_path / "exact", tmp_path / "own", atol=2e-6)
    for ours, theirs in zip(found, exact, strict=True):
        for name in ("kl", "rlhf_reward", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5)
        assert 0 < ours["sampling_gap"] <= ours["sampling_gap_max"] < 1e-5
        assert ours["old_kl"] == 0 or more


@pytest.mark.parametrize("stage", fast(["grpo"], ["ppo", "grpo"]))
def test_without_a_tie_the_reference_makes_no_pass(
    stage: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    passes, said = Passes(monkeypatch), "no KL to the reference is computed"
    words = [*ONCE, "algo.steps=1", "algo.kl_coef=0"] + FIXED * (stage == "ppo")
    (line,) = run(stage, tmp_path / "out", *words)
    assert passes.of_reference == 1  # of what was written
    assert capsys.readouterr().err.count(said) == 1
    assert "kl" not in line and line["rlhf_reward"] == line["reward"]
    assert "kl" not in json.loads((tmp_path / "out/samples.jsonl").read_text().splitlines()[0])
    (limited,) = run(stage, tmp_path / "limited", *words, "algo.max_kl=9")
    assert passes.of_reference == 3 and said not in capsys.readouterr().err
    assert "kl" in limited
    close(tmp_path / "out", tmp_path / "limited", atol=0)


def test_what_sampling_kept_is_what_training_computes(tmp_path: Path) -> None:
    """The mean gap of log-probs, before each iteration's first update, is rounding."""
    for stage in ("ppo", "grpo"):
        found = run(stage, tmp_path / stage)
        assert all(0 < each["sampling_gap"] < 2e-6 for each in found)
        assert all(each["sampling_gap_max"] < 2e-5 for each in found)
        assert all(each["sampling_far"] == each["alarm/sampling_gap"] == 0 for each in found)
        assert found[-1]["old_kl"] > 1e-6  # later updates are off policy


def test_schedules_are_linear_and_rollouts_follow_the_temperature(tmp_path: Path) -> None:
    words = [*FIXED, "algo.steps=5", "algo.kl_coef=0.5", "algo.kl_coef_end=0.1"]
    cooled = ["algo.temperature=1.2", "algo.temperature_end=0.2", "algo.lr=1e-9"]
    found = run("ppo", tmp_path / "out", *words, *cooled)
    assert [each["kl_coef"] for each in found] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    entropies = [each["entropy"] for each in found]
    assert entropies[0] > 2 * entropies[-1]
    # the tie is measured at the temperature of the samples: both policies are the same still
    assert all(abs(each["kl"]) < 1e-4 for each in found)


def test_groups_of_equal_rewards_are_sampled_anew_within_the_budget(tmp_path: Path) -> None:
    words = [*ONCE, "algo.group_size=2", "reward=regex:e"]
    plain = run("grpo", tmp_path / "plain", *words)
    dapo = run("grpo", tmp_path / "dapo", *words, "algo.dynamic_sampling=2")
    assert any(0 < each["equal_groups"] < 1 for each in plain)
    assert dapo[0]["equal_groups"] == plain[0]["equal_groups"]  # the first round is the same
    for each in dapo:
        kept = 8 * (1 - each["equal_groups"])
        assert kept <= each["learnt_groups"] <= 8 <= each["sampled_groups"] <= 24
        assert each["learnt_groups"] == 8 or each["sampled_groups"] > 8
    assert any(each["learnt_groups"] > 8 * (1 - each["equal_groups"]) for each in dapo)


def test_equal_groups_alone_teach_nothing(tmp_path: Path) -> None:
    """No tie and no difference: without refills the gradient is 0, with them there is no update."""
    words = [*ONCE, "algo.kl_coef=0", 'reward="regex:^"']
    found = run("grpo", tmp_path / "plain", *words)
    assert all(each["equal_groups"] == 1 and each["grad_norm/policy"] == 0 for each in found)
    again = run("grpo", tmp_path / "refilled", *words, "algo.dynamic_sampling=1")
    assert all(each["sampled_groups"] == 16 and "loss" not in each for each in again)


def test_truncated_responses_are_masked(tmp_path: Path) -> None:
    """A response that was cut teaches nothing: with all of them cut there is no update."""
    for stage in ("ppo", "grpo"):
        words = [*ONCE, "algo.mask_truncated=true", "algo.missing_eos_reward=null"]
        short = run(stage, tmp_path / f"{stage} short", *words, "algo.max_tokens=1")
        assert all(each["ended"] > 0 or "loss" not in each for each in short)
        assert any(each["ended"] == 0 for each in short)
        found = run(stage, tmp_path / stage, *words)
        assert any(0 < each["ended"] < 1 for each in found)


def test_one_step_that_ends_with_the_response_is_outcome_supervision(tmp_path: Path) -> None:
    """Of GRPO (ALGORITHMS truth 40) and of PPO: the step's reward stands at the last token."""
    Path("outcome.py").write_text(
        "def whole(prompts, responses):\n    return [float('e' in text) for text in responses]\n"
        "def last(prompts, steps):\n    return [[float('e' in one[0])] for one in steps]\n"
    )
    never = ["data.step_end='(?!)'", "algo.missing_eos_reward=null"]
    for stage in ("ppo", "grpo"):
        out = tmp_path / stage
        run(stage, out, *ONCE, *never, "reward=outcome.py:whole")
        by_step = ["reward=outcome.py:last", "algo.supervision=process"]
        run(stage, tmp_path / f"{stage} steps", *ONCE, *never, *by_step)
        close(out, tmp_path / f"{stage} steps", atol=1e-6)


def test_responses_without_a_reward_are_left_out(tmp_path: Path) -> None:
    Path("some.py").write_text(
        "def some(prompts, responses):\n"
        "    return [None if 'o' in text else float('e' in text) for text in responses]\n"
        "def none(prompts, responses):\n    return [None for text in responses]\n"
    )
    for stage in ("ppo", "grpo"):
        words = [*ONCE, "algo.missing_eos_reward=null"]
        found = run(stage, tmp_path / stage, *words, "reward=some.py:some")
        assert any(0 < each["unscored"] < 1 for each in found)
        assert all(each["reward/some.py:some/none"] == each["unscored"] for each in found)
        two = ["algo.steps=2", "reward=some.py:none"]
        with pytest.raises(RunError, match="no response of the last 2 iterations got a reward"):
            run(stage, tmp_path / f"{stage} none", *words, *two)
        (line,) = (tmp_path / f"{stage} none/metrics.jsonl").read_text().splitlines()
        assert json.loads(line)["unscored"] == 1 and "loss" not in json.loads(line)
        with pytest.raises(RunError, match="no response of the last 3 iterations got a reward"):
            run(stage, tmp_path / f"{stage} never", *words, "reward=some.py:none")


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_the_manifest_is_of_the_weights_that_are_written(stage: str, tmp_path: Path) -> None:
    """The log's last line is of the samples that its updates learnt from: their KL is still 0."""
    (line,) = run(
        stage, tmp_path / "out", *ONCE, "algo.steps=1", "algo.lr=2e-2", "algo.warmup_steps=0"
    )
    said = json.loads((tmp_path / "out" / "stage.json").read_text())["metrics"]
    assert abs(line["kl"]) < 1e-5 < 1e-2 < said["kl"]
    assert {"reward", "kl", "entropy", "length", "ended"} <= set(said)


def test_a_shared_critic_learns_on_the_trunk_of_the_policy(tmp_path: Path) -> None:
    words = ["algo.critic=shared", "algo.value_clip=null", *FIXED]
    found = run("ppo", tmp_path / "out", *words, "algo.steps=12", "reward=length:1")
    assert found[0]["value"] == 0  # its head starts at 0
    assert abs(found[-1]["value"] - found[-1]["return"]) < abs(found[0]["return"])
    still = run("ppo", tmp_path / "still", *words, *ONCE, "algo.vf_coef=0")
    assert all(each["value"] == 0 for each in still)


def test_a_response_without_steps_known_is_no_rival(tmp_path: Path) -> None:
    """Right steps beside responses that nothing judges are equal rewards: nothing to learn."""
    Path("judge.py").write_text(
        "def right(prompts, steps):\n"
        "    return [[None if 'o' in ''.join(own) else 1.0 for one in own] for own in steps]\n"
    )
    words = [*ONCE, "algo=grpo_process", "reward=judge.py:right", "algo.kl_coef=0"]
    found = run("grpo", tmp_path / "out", *words)
    assert any(0 < each["unscored"] < 1 for each in found)
    assert all(each["equal_groups"] == 1 for each in found)
    assert all(each.get("grad_norm/policy", 0) == 0 for each in found)


def test_a_critic_starts_on_the_scale_of_a_weighted_reward(tmp_path: Path) -> None:
    same = ["algo.steps=1", "algo.missing_eos_reward=null", *FIXED, "hardware.save_every=null"]
    one = run("ppo", tmp_path / "one", *same)[0]
    ten = run("ppo", tmp_path / "ten", *same, "reward=10*runs/demo/reward")[0]
    assert ten["reward"] == pytest.approx(10 * one["reward"], rel=1e-4)
    assert ten["value"] == pytest.approx(10 * one["value"], rel=1e-4)
    lowered = run("ppo", tmp_path / "low", *same, "reward=-1*runs/demo/reward")[0]
    assert lowered["value"] == 0


def test_a_function_that_always_fails_ends_the_run(tmp_path: Path) -> None:
    """Though responses that never ended have their reward all the same."""
    Path("fails.py").write_text("def f(prompts, responses):\n    raise SystemExit('no judge')\n")
    words = [*ONCE, "algo.steps=6", "algo.missing_eos_reward=-1", "reward=fails.py:f"]
    with pytest.raises(RunError, match="no response of the last 3 iterations got a reward"):
        run("ppo", tmp_path / "out", *words)
    found = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [each["unscored"] for each in found] == [1, 1] and found[0]["reward"] == -1


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_held_out_row_that_cannot_be_judged_leaves_no_folder(stage: str, tmp_path: Path) -> None:
    words = ["gold=exact_answer", "algo.eval_every=2"]
    with pytest.raises(UserError, match="needs a column 'answer'"):
        run(stage, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_without_evaluations_no_held_out_prompt_is_read(tmp_path: Path) -> None:
    """One that is too long stops those runs only that would sample from it."""
    rows = Path("rows.jsonl").read_text().splitlines()
    Path("long.jsonl").write_text(json.dumps({"prompt": "Greet " * 60, "answer": "x"}) + "\n")
    Path("short.jsonl").write_text("\n".join(rows[:20]) + "\n")
    words = ["data.path=short.jsonl", "data.eval_path=long.jsonl", *ONCE, "reward=regex:a"]
    run("grpo", tmp_path / "plain", *words)
    with pytest.raises(UserError, match="long.jsonl"):
        run("grpo", tmp_path / "watched", *words, "algo.eval_every=1")
    assert not (tmp_path / "watched").exists()
