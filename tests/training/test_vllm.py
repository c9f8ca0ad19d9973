"""Whole stages whose responses come from a server with vLLM's routes."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import RunError
from rlhf_cli.stages import evaluate, generate
from tests.tiny import DATA, run_stage
from tests.vllm_stub import Stub, listening

SHORT = ["algo.steps=2", "algo.show_every=2", "hardware.save_every=1", "hardware.packing=false"]
POLICY = "runs/demo/sft"


@pytest.fixture
def stub(inside: None) -> Stub:
    return Stub(Path(POLICY).resolve(), longest=64)


@pytest.fixture
def server(stub: Stub) -> Iterator[list[str]]:
    """Words that name it."""
    with listening(stub) as url:
        yield ["hardware.rollout=vllm", f"hardware.rollout_server={url}"]


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_iterations(stage: str, stub: Stub, server: list[str], tmp_path: Path) -> None:
    """Each starts with the weights of the one before, and says how far the two programs are."""
    metrics = run_stage(stage, tmp_path / "out", *SHORT, *server)
    steps = [line for line in metrics if "sampling_gap" in line]
    assert len(steps) == 2 and all(line["sampling_gap"] < 1e-4 for line in steps)
    assert all(line["correction_weight"] == pytest.approx(1, abs=1e-3) for line in steps)
    labels = {body["cache_salt"] for body in stub.requests}
    assert len(labels) >= 3, "two iterations, and a last look at what is written"
    assert stub.routes.count("/collective_rpc") == len(labels)
    said = json.loads((tmp_path / "out" / "stage.json").read_text())
    assert said["checks"]["mean_abs_log_ratio_at_start"] < 1e-4
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_run_that_goes_on_gives_its_weights_first(
    stub: Stub, server: list[str], tmp_path: Path
) -> None:
    """The server meanwhile has those of the end of the part before, or was started anew."""
    out = tmp_path / "out"
    whole = run_stage("grpo", tmp_path / "whole", *SHORT, *server)
    stub.faults = {"/v1/completions": [*[None] * 30, 400]}  # within the second iteration
    with pytest.raises(RunError, match="fault 400"):
        run_stage("grpo", out, *SHORT, *server)
    stub.restart()
    assert [line["loss/policy"] for line in run_stage("grpo", out, *SHORT, *server)] == [
        pytest.approx(line["loss/policy"], abs=1e-5) for line in whole
    ]


def test_generate_writes_what_it_writes_itself(
    stub: Stub, server: list[str], tmp_path: Path
) -> None:
    """Greedy, from a plain server of the policy's folder."""
    stub.dev = False
    words = [*DATA, f"policy={POLICY}", "algo.temperature=0", "algo.max_tokens=8"]
    for name, more in (("native", []), ("vllm", server)):
        generate.run(compose("generate", [*words, *more, f"out={tmp_path / name}"]))
    rows = [lines_of(tmp_path / name / "samples.jsonl") for name in ("native", "vllm")]
    assert [row["response"] for row in rows[0]] == [row["response"] for row in rows[1]]
    assert len({row["response"] for row in rows[0]}) > 3
    assert [row["finish_reason"] for row in rows[0]] == [row["finish_reason"] for row in rows[1]]


def test_stop_strings_cut_the_same_text(stub: Stub, server: list[str], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    stub.text_of = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    words = [*DATA, f"policy={POLICY}", "algo.temperature=0", "algo.max_tokens=8", "algo.stop=[i]"]
    for name, more in (("native", []), ("vllm", server)):
        generate.run(compose("generate", [*words, *more, f"out={tmp_path / name}"]))
    rows = [lines_of(tmp_path / name / "samples.jsonl") for name in ("native", "vllm")]
    assert [row["response"] for row in rows[0]] == [row["response"] for row in rows[1]]
    assert "stop" in {row["finish_reason"] for row in rows[1]}


def test_evaluate_asks_one_policy_of_a_server(
    stub: Stub, server: list[str], tmp_path: Path
) -> None:
    words = [*DATA, f"policy={POLICY}", "reward=regex:a", "algo.max_tokens=8", "algo.samples=2"]
    words += ["baselines=[]", "reference=null", *server]
    evaluate.run(compose("evaluate", [*words, f"out={tmp_path / 'one'}"]))
    assert json.loads((tmp_path / "one" / "report.json").read_text())["policies"][POLICY]["reward"]
    other = ["policy=runs/demo/adapter", f"out={tmp_path / 'other'}"]
    with contextlib.chdir("."), pytest.raises(RunError, match="does not serve this policy"):
        evaluate.run(compose("evaluate", [*words, *other]))
