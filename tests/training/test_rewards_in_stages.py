"""Stages with rewards of several terms, some of which give nothing to some responses."""

import contextlib
import importlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.evaluation.contest import scored_alike
from rlhf_cli.evaluation.figures import mean_of_known
from rlhf_cli.stages.evaluate import check_tokens
from tests.tiny import DATA, words_of

SOURCE = """
from pathlib import Path
up = Path(__file__).with_name("up")

def picky(prompts, responses):
    return [None if "A" in prompt else float(len(text)) for prompt, text in zip(prompts, responses)]

def never(prompts, responses):
    raise ValueError("broken")

def flaky(responses):
    if not up.exists():
        raise OSError("the service is down")
    return [1.0] * len(responses)
"""


@pytest.fixture(autouse=True)
def inside(chain: Path, tmp_path: Path) -> Iterator[None]:
    """Work in the chain's folder, as a user would, with functions in own.py."""
    (tmp_path / "own.py").write_text(SOURCE)
    with contextlib.chdir(chain):
        yield


def run(stage: str, out: Path, *more: str) -> Path:
    """A stage on tiny models."""
    words = DATA if stage in ("generate", "evaluate") else words_of(stage)
    cfg = compose(stage, [*words, f"out={out}", *more])
    found: Path = importlib.import_module(f"rlhf_cli.stages.{stage}").run(cfg)
    return found


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def manifest(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "stage.json").read_text())
    return found


def test_generate_tells_the_parts(tmp_path: Path) -> None:
    picky = f"{tmp_path}/own.py:picky"
    reward = f"reward=0*length:2 + 2*{picky}"
    out = run("generate", tmp_path / "out", "policy=runs/demo/sft", "algo.max_tokens=6", reward)
    samples = lines(out / "samples.jsonl")
    without = [sample for sample in samples if "A" in sample["prompt"]]
    assert 0 < len(without) < len(samples)
    for sample in samples:
        own = None if "A" in sample["prompt"] else float(len(sample["response"]))
        assert sample["parts"][picky] == own
        assert sample["parts"]["length:2"] == max(
            0, 1 - abs(len(sample["response"].split()) - 2) / 2
        )
        assert sample["reward"] == (None if own is None else 2 * own)
    known = [sample["reward"] for sample in samples if sample["reward"] is not None]
    metrics = manifest(out)["metrics"]
    assert metrics["reward"] == pytest.approx(sum(known) / len(known), rel=1e-5)
    assert metrics["reward_none"] == pytest.approx(len(without) / len(samples), rel=1e-5)


def test_generate_of_one_term_has_no_parts(tmp_path: Path) -> None:
    words = ["policy=runs/demo/sft", "algo.max_tokens=6", "reward=length:2"]
    out = run("generate", tmp_path / "out", *words)
    assert all("parts" not in sample for sample in lines(out / "samples.jsonl"))
    assert "reward_none" not in manifest(out)["metrics"]


def test_evaluate_leaves_out_what_has_no_reward(tmp_path: Path) -> None:
    words = ["policy=runs/demo/sft", "baselines=[runs/demo/adapter]", "algo.max_tokens=6"]
    judged = [f"reward=runs/demo/reward + {tmp_path}/own.py:picky", "algo.samples=2"]
    gold = f"gold={tmp_path}/own.py:picky"
    out = run("evaluate", tmp_path / "out", *words, *judged, gold)
    report = json.loads((out / "report.json").read_text())
    for found in report["policies"].values():
        assert math.isfinite(found["gold"]["mean"]) and 0 < found["gold_none"] < 1
        assert math.isfinite(found["reward"]["mean"]) and "reward_none" not in found
    (won,) = report["win_rates"].values()
    assert won["win"] + won["tie"] + won["loss"] == pytest.approx(1)
    assert report["reward_model"]["pairs"] > 0  # the model among the terms is judged
    parents = manifest(out)["parents"]
    assert parents["reward"]["path"] == "runs/demo/reward"


@pytest.mark.parametrize("stage", ["evaluate", "generate"])
def test_nothing_scored_is_no_success(stage: str, tmp_path: Path) -> None:
    """Once the function works the same command goes on from the samples that it has."""
    words = ["policy=runs/demo/sft", "algo.max_tokens=6", "algo.prompts=4"]
    if stage == "evaluate":
        words += ["baselines=[runs/demo/adapter]", "gold=length:2"]
    words += [f"reward={tmp_path}/own.py:flaky"]
    with pytest.raises(
        RunError, match=r"none of \d+ responses got a score from reward=.*:flaky; see"
    ):
        run(stage, tmp_path / "out", *words)
    assert not (tmp_path / "out" / "stage.json").exists()
    (tmp_path / "up").touch()
    out = run(stage, tmp_path / "out", *words)
    assert all(sample["reward"] == 1 for sample in lines(out / "samples.jsonl"))


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_no_training_goes_by_no_reward(stage: str, steps: int, tmp_path: Path) -> None:
    words = [f"reward={tmp_path}/own.py:never", f"algo.steps={steps}"]
    last = "the first iteration" if steps == 1 else f"the last {min(steps, 3)} iterations"
    with pytest.raises(RunError, match=f"no response of {last} got a reward; see the messages"):
        run(stage, tmp_path / "out", *words)


def test_no_weights_are_chosen_by_a_judge_that_says_nothing(tmp_path: Path) -> None:
    words = ["reward=length:2", f"gold={tmp_path}/own.py:never", "algo.steps=1"]
    with pytest.raises(RunError, match="algo.keep=eval/gold: no response of any evaluation got"):
        run("grpo", tmp_path / "out", *words, "algo.eval_every=1", "algo.keep=eval/gold")


def with_other_ids(source: str, copy: Path) -> Path:
    """A policy folder whose tokenizer gives two tokens each other's ids."""
    shutil.copytree(source, copy)
    for name in ("stage.json", "config.yaml"):
        shutil.copy(Path(source) / name, copy)
    file = copy / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(tokenizer))
    stage = json.loads((copy / "stage.json").read_text())
    stage["files"] = {}
    (copy / "stage.json").write_text(json.dumps(stage))
    return copy


def test_evaluate_compares_no_ids_of_another_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Named, it is refused; beside the policy it is left out aloud."""
    chain = tmp_path / "runs"
    shutil.copytree("runs/demo/sft", chain / "sft")
    shutil.copytree("runs/demo/adapter", chain / "adapter")
    other = with_other_ids("runs/demo/sft", chain / "other")
    words = [f"policy={chain}/sft", "algo.max_tokens=6", "reward=regex:a", "gold=null"]
    for key in (f"baselines=[{other}]", f"reference={other}"):
        with pytest.raises(UserError, match="another tokenizer"):
            run("evaluate", tmp_path / "out", *words, key)
    out = run("evaluate", tmp_path / "out", *words, f"reference={chain}/sft")
    report = json.loads((out / "report.json").read_text())
    assert set(report["policies"]) == {f"{chain}/sft", f"{chain}/adapter"}
    assert f"{other} has another tokenizer than policy={chain}/sft" in capsys.readouterr().err
    cfg = compose("evaluate", [*DATA, *words, f"baselines=[{other}]", f"out={tmp_path / 'new'}"])
    with pytest.raises(UserError, match="another tokenizer"):  # as of a hub id, once it is loaded
        check_tokens(cfg, [f"{chain}/sft", str(other)])


def test_means_of_what_is_known() -> None:
    """Each prompt by the mean of its known responses; a prompt without any is left out."""
    nan = math.nan
    values = torch.tensor([[1.0, nan], [2.0, 4.0], [nan, nan]])
    found = mean_of_known("gold", values)
    assert found["gold"] == {"mean": 2.0, "stderr": pytest.approx(1.0)}
    assert found["gold_none"] == pytest.approx(0.5)
    assert "gold_none" not in mean_of_known("gold", values[1:2])
    assert mean_of_known("gold", values[2:]) == {"gold": None, "gold_none": 1}
    ours, theirs = scored_alike(values, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    assert ours.tolist() == [[2, 4]] and theirs.tolist() == [[3, 4]]


def test_sft_chooses_by_what_is_known(tmp_path: Path) -> None:
    words = ["select_by=reward", f"reward={tmp_path}/own.py:picky"]
    out = run("sft", tmp_path / "out", *words)
    evaluated = [entry for entry in lines(out / "metrics.jsonl") if "eval/loss" in entry]
    assert all(math.isfinite(entry["eval/reward"]) for entry in evaluated)
    assert all(0 < entry["eval/reward_none"] < 1 for entry in evaluated)
    best = max(entry["eval/reward"] for entry in evaluated)
    assert manifest(out)["metrics"]["eval/reward"] == pytest.approx(best, rel=1e-5)


def test_a_model_from_scratch_may_be_chosen_by_a_reward_of_other_tokens(tmp_path: Path) -> None:
    words = ["model.vocab_size=262", "select_by=reward", "reward=runs/demo/reward"]
    out = run("sft", tmp_path / "out", *words)
    assert math.isfinite(manifest(out)["metrics"]["eval/reward"])
    assert "eval/reward_none" not in manifest(out)["metrics"]


@pytest.mark.parametrize("steps", [2, 6])
def test_sft_chooses_nothing_without_any_reward(steps: int, tmp_path: Path) -> None:
    words = ["select_by=reward", f"reward={tmp_path}/own.py:never", f"algo.max_steps={steps}"]
    with pytest.raises(RunError, match="none of 8 responses got a score from reward="):
        run("sft", tmp_path / "out", *words)
    evaluated = [entry for entry in lines(tmp_path / "out/metrics.jsonl") if "eval/loss" in entry]
    assert all("eval/reward" not in entry and entry["eval/reward_none"] == 1 for entry in evaluated)
