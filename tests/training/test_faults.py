"""Bad numbers planted into whole runs, and memory that runs out under them."""

import gc
import json
import math
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaModel

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.models.scorers import load_scorer
from rlhf_cli.models.tokenizers import load_tokenizer
from rlhf_cli.rewards.models import CheckpointReward
from rlhf_cli.training.loss_term import LossTerm
from rlhf_cli.training.optimize import Optimizer
from tests.contents import MEASURED
from tests.tiny import run_stage
from tests.toys import FROZEN, bpe, llama

pytestmark = pytest.mark.usefixtures("inside")

CPU = torch.device("cpu")
Plant = Callable[[Optimizer, list[LossTerm]], Any]
"""A context in which a step is bad."""


def finite_files(out: Path) -> None:
    """No file of a run holds a NaN or an infinity, in weights or in JSON.

    But -Infinity, by which a resume point says that nothing is the best so far.
    """

    def refuse(word: str) -> None:
        assert word == "-Infinity", f"{word} in a file of {out}"

    files = [file for file in out.rglob("*") if file.is_file()]
    assert files
    for file in files:
        if file.suffix == ".safetensors":
            for name, tensor in load_file(file).items():
                assert tensor.isfinite().all(), (file, name)
        elif file.suffix == ".jsonl":
            for line in file.read_text().splitlines():
                json.loads(line, parse_constant=refuse)
        elif file.suffix == ".json":
            json.loads(file.read_text(), parse_constant=refuse)


def planted(monkeypatch: pytest.MonkeyPatch, first: int, last: int, plant: Plant) -> None:
    """`plant` meddles with the optimizer steps from `first` to `last`, counted from 1."""
    number = 0
    real = Optimizer.step

    def step(
        self: Optimizer, parts: list[LossTerm], planned: int | None = None
    ) -> dict[str, float]:
        nonlocal number
        number += 1
        if not first <= number <= last:
            return real(self, parts, planned)
        with plant(self, parts):
            return real(self, parts, planned)

    monkeypatch.setattr(Optimizer, "step", step)


def in_tensor(name: str) -> Plant:
    """The first number of one tensor of the first item."""

    @contextmanager
    def plant(optimizer: Optimizer, parts: list[LossTerm]) -> Iterator[None]:
        item = parts[0].batches[0][0]
        good = getattr(item, name)
        bad = good.clone()
        bad[0] = math.nan
        setattr(item, name, bad)
        yield
        setattr(item, name, good)

    return plant


@contextmanager
def in_loss(optimizer: Optimizer, parts: list[LossTerm]) -> Iterator[None]:
    """The loss of one row, in whatever micro-batch it is."""
    part = parts[0]
    row, real = part.batches[0][0].source, part.loss

    def loss(items: Any) -> Any:
        found, metrics = real(items)
        return found * (math.nan if any(item.source == row for item in items) else 1.0), metrics

    part.loss = loss
    yield
    part.loss = real


@contextmanager
def in_gradient(optimizer: Optimizer, parts: list[LossTerm]) -> Iterator[None]:
    """The gradient of one weight, whichever rows it is of."""
    weight = next(iter(optimizer._parameters.values()))[3]
    handle = weight.register_hook(lambda gradient: gradient * math.inf)
    yield
    handle.remove()


@contextmanager
def in_weight(optimizer: Optimizer, parts: list[LossTerm]) -> Iterator[None]:
    """One number of one weight, for good."""
    with torch.no_grad():
        next(iter(optimizer._parameters.values()))[3].view(-1)[0] = math.nan
    yield


ROW = r"(rows|text)\.jsonl:\d+"
GRADIENT = rf"gradient of \w+: model\.layers\.0\.\S+, by {ROW}"
CASES: dict[str, tuple[str, Plant, str]] = {
    "sft loss": ("sft", in_loss, f"loss of {ROW}"),
    "reward loss": ("reward", in_loss, f"loss of {ROW}"),
    "reward gradient": ("reward", in_gradient, GRADIENT),
    "dpo reference": ("dpo", in_tensor("reference"), f"reference of {ROW}"),
    "dpo gradient": ("dpo", in_gradient, GRADIENT),
    "ppo advantage": ("ppo", in_tensor("advantages"), f"advantages of {ROW}"),
    "ppo value": ("ppo", in_tensor("values"), f"values of {ROW}"),
    "grpo old log-prob": ("grpo", in_tensor("old"), f"old of {ROW}"),
    "grpo gradient": ("grpo", in_gradient, GRADIENT),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_bad_numbers_is_skipped_counted_and_told(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stage, plant, cause = CASES[name]
    planted(monkeypatch, 2, 3, plant)
    metrics = run_stage(stage, tmp_path / "out")
    assert metrics[-1]["skipped"] == 2
    told = re.findall(
        r"note: step skipped \((\d) in a row, 3 end the run\); not finite: (.*)",
        capsys.readouterr().err,
    )
    assert [times for times, _ in told] == ["1", "2"]
    assert all(re.match(cause, line) for _, line in told), told
    finite_files(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "keep"), [("sft loss", "best"), ("dpo gradient", "last"), ("ppo value", "last")]
)
def test_too_many_in_a_row_end_the_run_and_leave_a_good_resume_point(
    name: str, keep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run again without the fault it goes on, to the same bytes as if there had been none."""
    stage, plant, cause = CASES[name]
    run_stage(stage, tmp_path / "good")
    per_iteration = 4 if stage == "ppo" else 1
    bad = 2 * per_iteration + 1  # the first step after the resume point of step 2
    with monkeypatch.context() as patch:
        planted(patch, bad, bad + 9, plant)
        with pytest.raises(RunError) as stop:
            run_stage(stage, tmp_path / "out", "algo.max_skipped=2")
    line = str(stop.value)
    assert line.startswith("2 steps in a row had a loss or gradient that is not finite (loss ")
    assert re.search(rf"\): {cause}", line) and "\n" not in line
    finite_files(tmp_path / "out")
    run_stage(stage, tmp_path / "out", "algo.max_skipped=2")
    for file in (tmp_path / "good").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("stage", "line"),
    [
        ("sft", r"3 steps in a row .*: weight policy: model\.layers\.0\."),
        ("reward", r"3 steps in a row .*: weight reward: model\.layers\.0\."),
        ("ppo", r"logits are not finite: its weight model\.layers\.0\."),
        ("grpo", r"logits are not finite: its weight model\.layers\.0\."),
    ],
)
def test_a_weight_of_bad_numbers_is_named_and_never_saved(
    stage: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In ppo and grpo the rest of the iteration is skipped; the policy then cannot sample."""
    planted(monkeypatch, 4, 4, in_weight)
    with pytest.raises(RunError, match=line):
        run_stage(stage, tmp_path / "out", "hardware.save_every=null")
    finite_files(tmp_path / "out")


# --------------------------------------------------------------------------- rewards


def test_a_reward_model_that_fails_costs_rewards_and_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The head says NaN of one response of each batch from the second call on."""
    raw = CheckpointReward.raw
    calls = 0

    def spoil(self: CheckpointReward, sequences: Any) -> Tensor:
        nonlocal calls
        calls += 1
        scores = raw(self, sequences)
        scores[3] = math.nan if calls > 1 else scores[3]
        return scores

    monkeypatch.setattr(CheckpointReward, "raw", spoil)
    metrics = run_stage("ppo", tmp_path / "out", "algo.scale_rewards=true")
    assert [row["unscored"] for row in metrics] == [0.0] + [0.125] * 5
    assert [row["reward/runs/demo/reward/none"] for row in metrics[1:]] == [0.125] * 5
    assert metrics[-1]["skipped"] == 0
    assert all(math.isfinite(row["kl_coef"]) for row in metrics)
    err = capsys.readouterr().err
    told = re.findall(r"reward=runs/demo/reward: scores that are not finite.*", err)
    assert len(told) == 1 and re.search(rf"such as {ROW} \(1 of the first 8", told[0])
    finite_files(tmp_path / "out")


def test_a_function_that_gives_nan_costs_rewards_and_no_step(tmp_path: Path) -> None:
    file = tmp_path / "judge.py"
    file.write_text(
        "def judge(prompts, responses):\n"
        "    return [float('nan') if i == 2 else float(len(r)) for i, r in enumerate(responses)]\n"
    )
    metrics = run_stage("grpo", tmp_path / "out", f"reward={file}:judge")
    assert metrics[-1]["skipped"] == 0
    assert all(row["unscored"] == pytest.approx(1 / 24) for row in metrics)
    finite_files(tmp_path / "out")


def test_a_reward_folder_of_bad_numbers_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "reward"
    tokenizer = load_tokenizer("runs/demo/reward", FROZEN)
    model = load_scorer("runs/demo/reward", FROZEN, tokenizer, CPU)
    with torch.no_grad():
        model.get_submodule("score").weight[0, 0] = math.nan  # type: ignore[operator]
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="reward: weight score.weight holds a NaN"):
        run_stage("ppo", tmp_path / "out", f"reward={folder}")
    assert not (tmp_path / "out").exists()


def test_a_reference_that_fails_once_moves_no_coefficient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One response of iteration 3 has no KL: its updates are skipped, nothing is carried on."""
    calls = 0

    def spoil(*args: Any) -> list[Tensor]:
        nonlocal calls
        calls += 1
        found = logprobs_of(*args)
        if calls == 4:  # the first iteration asks for the policy as well
            found[0][0] = math.nan
        return found

    monkeypatch.setattr("rlhf_cli.online.experience.logprobs_of", spoil)
    metrics = run_stage("ppo", tmp_path / "out", "algo.max_skipped=9", "algo.ema_decay=0.8")
    assert metrics[2]["kl"] is None and metrics[2]["skipped"] > 0
    assert metrics[3]["kl_coef"] == metrics[2]["kl_coef"]
    assert all(row["kl"] is not None for row in metrics[3:])
    finite_files(tmp_path / "out")


# --------------------------------------------------------------------------- memory


@pytest.fixture
def frozen_heap() -> Iterator[None]:
    """Collecting garbage is fast, as it is under the console script."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen_heap")
@pytest.mark.parametrize(
    ("stage", "most"), [("sft", 60), ("reward", 60), ("dpo", 60), ("ppo", 50), ("grpo", 60)]
)
def test_a_run_that_does_not_fit_at_once_ends_the_same(
    stage: str,
    most: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Passes of more padded tokens fail, in updates, in scoring and in sampling.

    All are more than the probes of a loaded model read.
    """
    words = ["hardware.share_prompts=false", "model.dropout=0"][: 2 if stage == "sft" else 1]
    expected = run_stage(stage, tmp_path / "whole", *words)
    real, sizes = LlamaModel.forward, []

    @wraps(real)
    def small(decoder: Any, *args: Any, **inputs: Any) -> Any:
        size = (args[0] if args else inputs["input_ids"]).numel()
        if size > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        sizes.append(size)
        return real(decoder, *args, **inputs)

    monkeypatch.setattr(LlamaModel, "forward", small)
    found = run_stage(stage, tmp_path / "small", *words)
    assert max(sizes) <= most
    err = capsys.readouterr().err
    assert err.count("out of memory; the step is done again in smaller micro-batches") == 1
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            if not (MEASURED.match(name) or name.startswith("sampling_gap")):
                assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-4), name
    files = [file.name for file in (tmp_path / "whole").glob("*.safetensors")]
    for name in files:
        weights = load_file(tmp_path / "whole" / name)
        torch.testing.assert_close(
            load_file(tmp_path / "small" / name), weights, rtol=1e-3, atol=1e-4
        )


LIMITS = ["data.eval_rows=8", "data.max_prompt_tokens=24", "data.max_response_tokens=8"]
RLHF = Path(sys.executable).parent / "rlhf-cli"


# A build for CUDA maps more than such a limit as it is imported; tests/gpu limits the device.
limited_addresses = pytest.mark.skipif(
    torch.version.cuda is not None, reason="torch built for CUDA takes more addresses than that"
)


def run_within(gib: float, *words: str) -> "subprocess.CompletedProcess[str]":
    """The console script with an address space of so many GiB."""
    limit = int(gib * 2**30)
    return subprocess.run(
        [str(RLHF), *words],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )


def address_space(*words: str) -> float:
    """The most GiB of addresses that the console script had: machines differ in it."""
    run = subprocess.Popen([str(RLHF), *words], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while run.poll() is None:
        with suppress(OSError):
            found = re.search(r"VmPeak:\s+(\d+)", Path(f"/proc/{run.pid}/status").read_text())
            peak = max(peak, int(found[1]) if found else 0)
        time.sleep(0.02)
    assert run.returncode == 0
    return peak / 2**20


def long_rows(file: Path, count: int, length: int) -> list[str]:
    """Rows of about one token a letter; returns the words of an sft on them, all rows at once."""
    letters = random.Random(0)
    rows = [
        {"prompt": f"p {i}: ", "completion": "".join(letters.choices("abcdefghij", k=length))}
        for i in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("sft", "data=jsonl", f"data.path={file}", "data.eval_rows=2", "data.long_prompts=cut"),
        *(f"data.max_response_tokens={length}", f"model.context={length + 40}"),
        *("model.vocab_size=280", "model.layers=2", "model.heads=2", "data.max_prompt_tokens=32"),
        *("algo.epochs=1", "algo.max_steps=1", "algo.batch_size=16", "algo.eval_every=9"),
        *("hardware.threads=1", "hardware.tokens_per_microbatch=999999"),
        "hardware.gradient_checkpointing=false",
    ]


def one_line(found: "subprocess.CompletedProcess[str]", pattern: str) -> None:
    """Exit status 1, and a last line as told, without a traceback."""
    assert found.returncode == 1 and "Traceback" not in found.stderr
    (line,) = [each for each in found.stderr.splitlines() if "error" in each]
    assert re.search(pattern, line), line


@limited_addresses
def test_a_sequence_that_does_not_fit_ends_a_real_run_in_one_line(tmp_path: Path) -> None:
    words = long_rows(tmp_path / "rows.jsonl", 6, 4000)
    found = run_within(1.35, *words, "model.hidden_size=512", f"out={tmp_path / 'out'}")
    one_line(
        found,
        r"out of memory in the update, .*: 1 sequence x (\d+) = \1 padded tokens; what helps: "
        r"hardware\.logprob_chunk=512, hardware\.gradient_checkpointing=true, ",
    )


@pytest.mark.slow
@limited_addresses
def test_a_batch_that_does_not_fit_is_halved_in_a_real_run(tmp_path: Path) -> None:
    words = [*long_rows(tmp_path / "rows.jsonl", 18, 600), "model.hidden_size=128"]
    words.append("hardware.logprob_chunk=99999")
    whole, small = tmp_path / "whole", tmp_path / "small"
    peak = address_space(*words, f"out={whole}")
    found = run_within(peak - 0.12, *words, f"out={small}")  # the update takes about 0.3 of it
    assert found.returncode == 0, found.stderr
    assert "note: out of memory; the step is done again" in found.stderr
    weights = (load_file(out / "model.safetensors") for out in (small, whole))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@limited_addresses
def test_a_model_that_does_not_fit_ends_a_real_run_in_one_line(tmp_path: Path) -> None:
    """Half a GiB of weights, and nothing but them."""
    size = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2}
    llama(300, **size).save_pretrained(tmp_path / "large")
    bpe().save_pretrained(tmp_path / "large")
    words = ["reward", f"policy={tmp_path / 'large'}", "data=jsonl", "data.path=rows.jsonl"]
    found = run_within(1.2, *words, *LIMITS, f"out={tmp_path / 'out'}")
    one_line(found, r"out of memory while loading \S+/large: \d+ weights x 4 bytes = 0\.\d+ GiB; ")
