"""The demo proves something: every way of aligning the policy beats SFT on the gold score."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

CLI = Path(sys.executable).with_name("rlhf-cli")
CHAIN = (
    "sft",
    "reward",
    "ppo",
    "ppo algo=ppo_ptx out=runs/demo/ppo_ptx",
    "dpo",
    "grpo",
    "generate reward=runs/demo/reward",
    "evaluate algo.prompts=200",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the chain has run; each stage prints its out folder and nothing else."""
    place = tmp_path_factory.mktemp("demo")
    for stage in CHAIN:
        words = stage.split()
        done = subprocess.run([CLI, *words], cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        out = next((word[4:] for word in words if word.startswith("out=")), f"runs/demo/{words[0]}")
        assert done.stdout == f"{out}\n"
    return place


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def test_every_policy_beats_sft_on_gold_by_more_than_four_errors(folder: Path) -> None:
    found = read(folder / "runs/demo/evaluate/report.json")["policies"]
    for stage in ("ppo", "ppo_ptx", "dpo", "grpo"):
        gain = found[f"runs/demo/{stage}"]["gain_over_reference"]
        assert gain["mean"] > 4 * gain["stderr"], stage
        assert found[f"runs/demo/{stage}"]["kl"]["mean"] < 10


def test_ptx_keeps_the_general_text_that_ppo_forgets(folder: Path) -> None:
    found = read(folder / "runs/demo/evaluate/report.json")["policies"]
    sft, ppo, ptx = (
        found[f"runs/demo/{stage}"]["text_loss"] for stage in ("sft", "ppo", "ppo_ptx")
    )
    assert ptx < ppo
    assert ppo > sft


def test_the_reward_model_is_good_and_no_better_than_its_labels_allow(folder: Path) -> None:
    accuracy = read(folder / "runs/demo/reward/stage.json")["metrics"]["eval/accuracy"]
    assert 0.68 < accuracy < 0.85


def test_the_first_checks_hold(folder: Path) -> None:
    dpo, ppo = (read(folder / f"runs/demo/{each}/stage.json")["checks"] for each in ("dpo", "ppo"))
    assert dpo["dpo_loss_at_start"] == pytest.approx(0.693147, abs=1e-5)
    assert ppo["kl_to_reference_at_start"] == pytest.approx(0, abs=1e-5)
    assert ppo["max_abs_log_ratio_at_start"] < 1e-4
    assert ppo["critic_minus_reward_at_start"] < 1e-5


def test_a_finished_chain_is_not_run_again(folder: Path) -> None:
    before = (folder / "runs/demo/ppo/model.safetensors").stat().st_mtime_ns
    done = subprocess.run([CLI, "ppo"], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "runs/demo/ppo\n")
    assert "already finished" in done.stderr
    assert (folder / "runs/demo/ppo/model.safetensors").stat().st_mtime_ns == before
