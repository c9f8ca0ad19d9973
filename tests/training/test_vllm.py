"""Whole stages whose responses come from a server with vLLM's routes."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.rollout import server_process
from rlhf_cli.rollout.server_nccl import NcclSync
from rlhf_cli.rollout.server_process import end_others
from rlhf_cli.runs.plan_lines import sampler_lines
from rlhf_cli.runs.preflight import preflight
from rlhf_cli.stages import evaluate, generate
from tests.conftest import Cli
from tests.ranks import on_ranks
from tests.rollout.test_server_sync import Gloo
from tests.tiny import DATA, WORDS, run_stage, words_of
from tests.vllm_stub import Stub, install, listening

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


@pytest.mark.slow
def test_iterations_whose_adapter_alone_is_sent(
    stub: Stub, server: list[str], tmp_path: Path
) -> None:
    """What is sampled is what whole weights would have sampled."""
    rewards = []
    for way in ("files", "adapter"):
        words = [*SHORT, *WORDS["lora"], *server, f"hardware.rollout_sync={way}"]
        metrics = run_stage("grpo", tmp_path / way, *words)
        rewards.append([line["reward"] for line in metrics if "reward" in line])
        assert all(line["sampling_gap"] < 1e-4 for line in metrics if "sampling_gap" in line)
    assert rewards[0] == rewards[1] and len(rewards[0]) == 2
    assert len({body["model"] for body in stub.requests}) >= 4, "policy, and each adapter"
    assert not (tmp_path / "adapter" / "checkpoints").exists()


def by_gloo_on_a_rank(chain: Path, out: Path, words: list[str]) -> list[float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NcclSync, "group_of", Gloo)
        patch.setattr(server_process, "check_installed", lambda: None)
        return on_a_rank(chain, out, words, {})


@pytest.mark.slow
def test_sharded_weights_are_broadcast_to_two_servers(stub: Stub, tmp_path: Path) -> None:
    other = Stub(Path(POLICY).resolve(), longest=64)
    with listening(stub) as first, listening(other) as second:
        words = [*SHORT, "hardware.rollout=vllm", f"hardware.rollout_server=[{first},{second}]"]
        expected = on_a_rank(Path.cwd(), tmp_path / "1", words, {})
        words += ["hardware.rollout_sync=nccl", "hardware.shard=full"]
        found = on_ranks(2, by_gloo_on_a_rank, Path.cwd(), tmp_path / "2", words)
    assert found == [expected, expected] and len(expected) == 2
    assert stub.requests and other.requests and stub.received == other.received


@pytest.mark.slow
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


def test_a_check_tells_who_samples(
    server: list[str], stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks nobody."""
    cfg = compose("grpo", [*words_of("grpo"), *server, f"out={tmp_path / 'out'}"])
    said = f"responses: of the vLLM server {cfg.hardware.rollout_server}, which gets the weights"
    lines = preflight(cfg, check_only=True).lines()
    assert any(line.startswith(said) for line in lines) and not stub.asked
    assert not any("sampled tokens" in line for line in lines)
    cfg.hardware.rollout_server = ["http://a", "http://b"]
    assert sampler_lines(cfg) == [
        "responses: of the vLLM servers http://a, http://b, which get the weights of each update"
    ]
    cfg.hardware.rollout_server, cfg.hardware.rollout_devices = None, [1, 2]
    assert sampler_lines(cfg) == ["responses: of a vLLM server that is started on GPU 1, 2"]
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    with pytest.raises(UserError, match=r"hardware\.rollout_devices needs vllm>=0\.30"):
        preflight(cfg, check_only=True)


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


@pytest.mark.slow
def test_stop_strings_cut_the_same_text(stub: Stub, server: list[str], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    stub.text_of = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    words = [*DATA, f"policy={POLICY}", "algo.temperature=0", "algo.max_tokens=8", "algo.stop=[i]"]
    for name, more in (("native", []), ("vllm", server)):
        generate.run(compose("generate", [*words, *more, f"out={tmp_path / name}"]))
    rows = [lines_of(tmp_path / name / "samples.jsonl") for name in ("native", "vllm")]
    assert [row["response"] for row in rows[0]] == [row["response"] for row in rows[1]]
    assert "stop" in {row["finish_reason"] for row in rows[1]}


@pytest.mark.slow
def test_evaluate_asks_one_policy_of_a_server(
    stub: Stub, server: list[str], tmp_path: Path
) -> None:
    words = [*DATA, f"policy={POLICY}", "reward=regex:a", "algo.max_tokens=8", "algo.samples=2"]
    words += ["baselines=[]", "reference=null", *server]
    evaluate.run(compose("evaluate", [*words, f"out={tmp_path / 'one'}"]))
    assert json.loads((tmp_path / "one" / "report.json").read_text())["policies"][POLICY]["reward"]
    other = ["policy=runs/demo/adapter", f"out={tmp_path / 'other'}"]
    with pytest.raises(RunError, match="does not serve this policy"):
        evaluate.run(compose("evaluate", [*words, *other]))


# --------------------------------------------------------------------------- servers of its own


@pytest.fixture
def own(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Words with which a stage starts a program `vllm`, behind which is the stub."""
    install(tmp_path / "bin", sys.executable)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with listening(stub) as url:
        monkeypatch.setenv("STUB_URL", url)
        yield ["hardware.rollout=vllm", "hardware.rollout_devices=[0]"]


@pytest.mark.slow
def test_each_policy_has_a_server_in_its_turn(
    own: list[str], stub: Stub, cli: Cli, tmp_path: Path
) -> None:
    """An adapter is merged for its own; greedy, both say what they say here."""
    words = [*DATA, f"policy={POLICY}", "baselines=[runs/demo/adapter]", "reference=null"]
    words += ["reward=regex:a", "algo.max_tokens=8", "algo.samples=1", "algo.temperature=0"]
    rows = []
    for name, more in (("native", []), ("vllm", own)):
        done = cli("evaluate", *words, *more, f"out={tmp_path / name}", cwd=Path.cwd())
        assert done.returncode == 0, done.stderr
        rows.append(lines_of(tmp_path / name / "samples.jsonl"))
    assert [row["response"] for row in rows[0]] == [row["response"] for row in rows[1]]
    assert done.stderr.count("vllm serve starts on GPU 0") == 2
    assert not running(tmp_path)


def on_a_rank(chain: Path, out: Path, words: list[str], variables: dict[str, str]) -> list[float]:
    os.environ.update(
        variables
    )  # ranks are forked off a process that another test may have started
    with contextlib.chdir(chain):
        return [line["reward"] for line in run_stage("grpo", out, *words) if "reward" in line]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], WORDS["lora"]], ids=["full", "lora"])
def test_several_processes_share_one_server(
    more: list[str], own: list[str], stub: Stub, tmp_path: Path
) -> None:
    """Rank 0 asks, and puts sharded weights together for it; responses are those of one process."""
    words = [*SHORT, *more, "hardware.device=cpu", *own]
    variables = {name: os.environ[name] for name in ("PATH", "STUB_URL")}
    expected = on_a_rank(Path.cwd(), tmp_path / "1", words, variables)
    for way in ("none", "full"):
        given = [*words, f"hardware.shard={way}"]
        found = on_ranks(2, on_a_rank, Path.cwd(), tmp_path / way, given, variables)
        assert found == [expected, expected] and len(expected) == 2
    end_others()
    until(lambda: not running(tmp_path))


@pytest.mark.slow
def test_a_killed_command_leaves_no_server(own: list[str], stub: Stub, tmp_path: Path) -> None:
    stub.faults = {"/v1/completions": [None, None, *["hang"] * 99]}
    stub.hangs = 60.0
    words = [*DATA, f"policy={POLICY}", f"out={tmp_path / 'out'}", *own]
    script = Path(sys.executable).parent / "rlhf-cli"
    command = subprocess.Popen([script, "generate", *words], stderr=subprocess.DEVNULL)
    until(lambda: stub.requests)
    assert running(tmp_path)
    command.kill()
    command.wait()
    until(lambda: not running(tmp_path))


def running(folder: Path) -> list[str]:
    """The programs of a folder that run."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = file.read_bytes().decode().split("\0")
            found += [word for word in words if word == str(folder / "bin" / "vllm")]
    return found


def until(holds: Callable[[], object], seconds: float = 120.0) -> None:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "too late"
        time.sleep(0.1)
