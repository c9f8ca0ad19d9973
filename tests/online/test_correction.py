"""algo.rollout_correction in whole runs: a sampler that differs by a known ratio, and none."""

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rlhf_cli.config.errors import UserError
from rlhf_cli.rollout.native import NativeEngine
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.stages import grpo, ppo
from tests.pace import slow
from tests.ranks import on_ranks
from tests.tiny import run_stage as run

ONCE = [
    *("algo.epochs=1", "algo.minibatch_size=8", "algo.steps=1", "hardware.save_every=null"),
    *("algo.kl_coef=0", "algo.max_sampling_gap=null"),
]
PPO = [
    *("algo.kl_controller=fixed", "algo.kl_target=null", "algo.kl_horizon=null"),
    *("algo.entropy_coef=0", "algo.ptx_coef=0"),
]
OWN = """
def mine(logprobs, advantages):
    return -advantages * logprobs
"""

pytestmark = pytest.mark.usefixtures("inside")


def sample_by_another(patch: pytest.MonkeyPatch) -> None:
    """A sampler that gives each token 2/3 of the probability that training gives it."""
    sample = NativeEngine.sample

    def told(*args: Any, **options: Any) -> list[Rollout]:
        rollouts = sample(*args, **options)
        for each in rollouts:
            each.logprobs = [value - math.log(1.5) for value in each.logprobs]
        return rollouts

    patch.setattr(NativeEngine, "sample", told)
    patch.setattr(NativeEngine, "exact", False)
    patch.setattr(NativeEngine, "foreign", True)
    for stage in (ppo, grpo):
        patch.setattr(stage, "check_first_ratio", lambda *args: None)


@pytest.fixture
def another(monkeypatch: pytest.MonkeyPatch) -> None:
    sample_by_another(monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("another")
@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("grpo", []),
        ("ppo", [*PPO, "algo.value_clip=null"]),
        slow("grpo", ["algo=cispo", "algo.clip=null", "algo.aggregate=token_mean"]),
        slow("grpo", ["algo=rloo", "algo.clip=null"]),
        slow("grpo", ["algo.loss=own.py:mine", "algo.clip=null"]),
        slow("ppo", ["algo=ppo_klpen", "algo.clip=null", *PPO]),
        slow("ppo", ["algo=a2c", "algo.clip=null", *PPO]),
        slow("ppo", ["algo.loss=own.py:mine", "algo.clip=null", *PPO]),
    ],
)
def test_each_token_weighs_what_the_sampler_got_wrong(
    stage: str, words: list[str], tmp_path: Path
) -> None:
    """By default, where another engine sampled; old log-probs of the update or of a pass."""
    Path("own.py").write_text(OWN)
    (plain,) = run(stage, tmp_path / "plain", *ONCE, *words, "algo.rollout_correction=null")
    (weighed,) = run(stage, tmp_path / "weighed", *ONCE, *words)
    held = ["algo.rollout_correction=token", "algo.rollout_correction_cap=1.25"]
    (capped,) = run(stage, tmp_path / "capped", *ONCE, *words, *held)
    norm = plain["grad_norm/policy"]
    assert norm > 1e-4
    assert weighed["grad_norm/policy"] == pytest.approx(1.5 * norm, rel=1e-4)
    assert capped["grad_norm/policy"] == pytest.approx(1.25 * norm, rel=1e-4)
    if stage == "ppo" and "grad_norm/critic" in plain:
        assert weighed["grad_norm/critic"] == pytest.approx(plain["grad_norm/critic"], rel=1e-4)
    assert not any(name.startswith("correction") for name in plain)
    assert weighed["correction_weight"] == pytest.approx(1.5, rel=1e-4)
    assert (weighed["correction_capped"], capped["correction_capped"]) == (0, 1)
    assert capped["correction_weight"] == 1.25
    assert weighed["correction_ess"] == pytest.approx(1, rel=1e-4)
    assert weighed["sampling_gap"] == pytest.approx(math.log(1.5), rel=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("another")
def test_a_whole_response_weighs_the_product_of_its_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default of gspo, as said at the start; several updates see the same weights."""
    words = [*ONCE, "algo=gspo", "algo.rollout_correction=sequence", "algo.minibatch_size=4"]
    words.append("algo.rollout_correction_cap=1e9")
    (line,) = run("grpo", tmp_path / "gspo", *words)
    assert "what is learnt from each response weighs min(p / q, 1e+09)" in capsys.readouterr().err
    # between one token and all eight
    assert 1.5 < line["correction_weight"] < 1.5**8
    assert 0 < line["correction_ess"] < 1
    assert line["correction_capped"] == 0


@pytest.mark.slow
def test_where_this_process_samples_it_is_off_unless_it_is_asked_for(tmp_path: Path) -> None:
    """Asked for, it weighs rounding: in float32 nothing at all, for old log-probs are its own."""
    (plain,) = run("grpo", tmp_path / "plain", *ONCE)
    (asked,) = run("grpo", tmp_path / "asked", *ONCE, "algo.rollout_correction=token")
    assert "correction_weight" not in plain
    assert (asked["correction_weight"], asked["correction_ess"]) == (1, 1)
    ours, theirs = (
        load_file(tmp_path / f"{each}/model.safetensors") for each in ("plain", "asked")
    )
    assert all((ours[name] == theirs[name]).all() for name in ours)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["algo=gspo", "algo.rollout_correction=token"],
            "take algo.rollout_correction=sequence",
        ),
        (
            ["algo.rollout_correction=null", "algo.rollout_correction_cap=3"],
            "rollout_correction_cap is not used by algo.rollout_correction=null; set it to 2.0",
        ),
        (["algo.rollout_correction_cap=3"], "with hardware.rollout=native; set it to 2, or take"),
        (["algo.rollout_correction_cap=0.5"], "algo.rollout_correction_cap must be a number >= 1"),
        (["algo.rollout_correction=tokens"], "did you mean token?"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        run("grpo", tmp_path / "out", *words)
    assert said in str(refused.value)


def weighed(folder: Path, out: Path) -> list[dict[str, Any]]:
    """A run whose weights differ from response to response, one of them capped."""
    words = [*ONCE, "algo.rollout_correction=sequence", "algo.rollout_correction_cap=20"]
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        sample_by_another(patch)
        alone = ["hardware.tokens_per_microbatch=1", "hardware.rollout_tokens=1"]
        return run("grpo", out, *words, *alone)


@pytest.mark.slow
def test_ranks_weigh_as_one_process_does(chain: Path, tmp_path: Path) -> None:
    """By the log-probs of the one update, of which each rank has computed some."""
    (one,) = weighed(chain, tmp_path / "1")
    ((two,), _) = on_ranks(2, weighed, chain, tmp_path / "2")
    assert 0 < one["correction_capped"] < 1
    for name in ("correction_weight", "correction_capped", "correction_ess", "grad_norm/policy"):
        assert two[name] == pytest.approx(one[name], rel=1e-5), name
