"""Types of products by device and size, and of weights that are written by where they come from."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlhf_cli.config.errors import RunError
from rlhf_cli.folders.manifest import numbers_by_type
from rlhf_cli.models import dtypes
from rlhf_cli.models.dtypes import (
    name_of,
    product_type,
    round_trained,
    source_type,
    type_to_write,
)
from rlhf_cli.models.masters import held_as
from rlhf_cli.runs.session import Session
from tests.contents import contents_of
from tests.pace import slow
from tests.tiny import WORDS, run_stage
from tests.toys import DEVICE

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("dtype", "parameters", "device", "able", "expected"),
    [
        ("auto", 1e8, CUDA, True, BF16),
        ("auto", 1e8, CUDA, False, F32),
        ("auto", 131_072, CUDA, True, F32),
        ("auto", 1e8, CPU, True, F32),
        ("auto", math.inf, CUDA, True, BF16),
        ("float32", 1e8, CUDA, True, F32),
        ("bfloat16", 10, CPU, False, BF16),
    ],
)
def test_products(
    dtype: str,
    parameters: float,
    device: torch.device,
    able: bool,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return able or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert product_type(dtype, parameters, device) == expected


def test_rounding_is_that_of_writing_and_spares_what_is_not_trained() -> None:
    layer = torch.nn.Linear(2, 1)
    layer.bias.requires_grad_(False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0 + 2**-8, 1.0 + 3 * 2**-8]]))  # halfway: to even
        layer.bias.fill_(1.0 + 2**-12)
    round_trained(layer, BF16)
    assert layer.weight.tolist() == [[1.0, 1.0 + 2**-6]] and layer.weight.dtype == F32
    assert layer.bias.item() == 1.0 + 2**-12
    places = [weight.data_ptr() for weight in layer.parameters()]
    with held_as(BF16, layer.parameters(), lasting=False):
        assert {weight.dtype for weight in layer.parameters()} == {BF16}
    assert [weight.data_ptr() for weight in layer.parameters()] == places
    assert layer.bias.item() == 1.0 + 2**-12 and layer.bias.dtype == F32
    with held_as(BF16, layer.parameters()):
        assert {weight.dtype for weight in layer.parameters()} == {BF16}
    assert layer.bias.item() == 1.0 and layer.bias.dtype == F32


def test_the_type_of_a_folder_is_that_of_most_weights(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(8, dtype=BF16), "norm": torch.ones(3), "mask": torch.ones(99) > 0}
    save_file(tensors, tmp_path / "model.safetensors")
    assert numbers_by_type(tmp_path) == {"BF16": 8, "F32": 3, "BOOL": 99}
    assert source_type(str(tmp_path)) == BF16
    model = torch.nn.Linear(1, 1)
    assert type_to_write(model, "source", merge=True) == F32
    assert type_to_write(model, "float16", merge=True) == torch.float16


# --------------------------------------------------------------------------- stages

HEADERS = {"BF16": BF16, "F32": F32, "F16": torch.float16}


def types_in(folder: Path) -> set[str]:
    return {dtype for file in [folder] for dtype in numbers_by_type(file)}


@pytest.fixture(scope="module")
def halved(chain: Path) -> Path:
    """A pretrained model as the hub has them: in bfloat16, of no stage of ours."""
    folder = chain / "halved"
    model = AutoModelForCausalLM.from_pretrained(chain / "runs/demo/sft", dtype=BF16)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((chain / "runs/demo/sft" / name).read_bytes())
    return folder


@pytest.fixture
def from_halved(halved: Path, inside: Any) -> Iterator[str]:
    yield str(halved)


SFT = [
    *("model=pretrained", "algo.text_mix=0.5", "algo.batch_size=8", "algo.epochs=2"),
    *("algo.max_steps=6", "algo.eval_every=2", "algo.keep=best"),
]


def sft(path: str, out: Path, *more: str) -> Path:
    """`run_stage` of sft without the words of a model from scratch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WORDS, "sft", [*SFT, f"model.path={path}"])
        run_stage("sft", out, *more)
    return out


def stage_json(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "stage.json").read_text())
    return found


def test_a_chain_keeps_the_type_and_its_checks(from_halved: str, tmp_path: Path) -> None:
    policy = sft(from_halved, tmp_path / "sft")
    assert types_in(policy) == {"BF16"}
    assert json.loads((policy / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(policy, dtype="auto")
    assert loaded.dtype == BF16

    reward, dpo, ppo = (tmp_path / name for name in ("reward", "dpo", "ppo"))
    run_stage("reward", reward, f"policy={policy}")
    run_stage("dpo", dpo, f"policy={policy}")
    run_stage("ppo", ppo, f"policy={policy}", f"reward={reward}")
    for out in (reward, dpo, ppo):
        assert types_in(out) == {"BF16"}, out
    for out in (dpo, ppo):
        assert stage_json(out)["checks"]["max_abs_log_ratio_at_start"] < 1e-4
        assert stage_json(out)["checks"]["reference_unchanged"] == 1


def test_what_is_measured_is_what_is_written(from_halved: str, tmp_path: Path) -> None:
    """The held-out loss of the weights on disk, to the digits of stage.json."""
    policy = sft(from_halved, tmp_path / "sft", "algo.keep=last")
    again = sft(str(policy), tmp_path / "again", "algo.lr=1e-30", "algo.keep=last")
    first, second = (stage_json(out)["metrics"]["eval/loss"] for out in (policy, again))
    assert first == second


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_type_is_written_where_it_is_asked_for(
    dtype: str, from_halved: str, tmp_path: Path
) -> None:
    out = sft(from_halved, tmp_path / "out", f"model.save_dtype={dtype}")
    assert types_in(out) == {{"float32": "F32", "float16": "F16"}[dtype]}
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype


def test_adapters(from_halved: str, tmp_path: Path) -> None:
    """A fresh one has the type of its base, one that goes on its own; merged, that of the base."""
    lora = [f"policy={from_halved}", *WORDS["lora"]]
    fresh, wide, on, merged = (tmp_path / name for name in ("fresh", "wide", "on", "merged"))
    run_stage("dpo", fresh, *lora)
    run_stage("dpo", wide, *lora, "model.save_dtype=float32")
    assert types_in(fresh) == {"BF16"} and types_in(wide) == {"F32"}
    run_stage("dpo", on, f"policy={wide}", *WORDS["lora"])
    run_stage("dpo", merged, f"policy={wide}", *WORDS["lora"], "model.merge_lora=true")
    assert types_in(on) == {"F32"} and types_in(merged) == {"BF16"}
    assert stage_json(on)["checks"]["max_abs_log_ratio_at_start"] < 1e-4


@pytest.mark.parametrize(
    ("reference", "dtype"),
    [
        ("null", "float32"),
        ("bootstrap", "float32"),
        slow("bootstrap", "bfloat16"),
    ],
)
def test_a_resumed_run_writes_the_same_bytes(
    reference: str, dtype: str, from_halved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resume points are float32, whatever is computed in and written at the end."""
    words = [f"policy={from_halved}", f"reference={reference}", "hardware.save_every=5"]
    words += [f"model.dtype={dtype}"]
    run_stage("dpo", tmp_path / "whole", *words)
    finish = Session.finish_model
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Session, "finish_model", lambda *args, **kwargs: 1 / 0)
        run_stage("dpo", tmp_path / "out", *words)
    (point,) = (tmp_path / "out/checkpoints").glob("step-*5/*.safetensors")
    assert load_file(point)["policy/model.norm.weight"].dtype == F32
    assert Session.finish_model is finish
    run_stage("dpo", tmp_path / "out", *words)
    whole, out = contents_of(tmp_path / "whole"), contents_of(tmp_path / "out")
    weights = [name for name in whole if name.endswith(".safetensors")]
    assert len(weights) == 1 + (reference == "bootstrap")
    assert all(whole[name] == out[name] for name in weights)


def test_a_weight_that_does_not_fit_is_named_and_the_run_goes_on(
    from_halved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_cli.training.best import Best

    def spoil(best: Best) -> None:
        with torch.no_grad():
            best._model.model.norm.weight[0] = 1e6  # type: ignore[union-attr, operator]

    with monkeypatch.context() as patch, pytest.raises(RunError) as stop:
        patch.setattr(Best, "put", spoil)
        sft(from_halved, tmp_path / "out", "model.save_dtype=float16")
    assert "model.norm.weight is too large for float16" in str(stop.value)
    out = sft(from_halved, tmp_path / "out", "model.save_dtype=bfloat16")
    assert types_in(out) == {"BF16"}


def test_another_type_of_products_is_told_on_resume(
    from_halved: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [f"policy={from_halved}"]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Session, "finish_model", lambda *args, **kwargs: 1 / 0)
        patch.setattr("rlhf_cli.runs.session.products_of", lambda model: "bfloat16 on cuda")
        run_stage("dpo", tmp_path / "out", *words)
    capsys.readouterr()
    run_stage("dpo", tmp_path / "out", *words)
    told = " ".join(capsys.readouterr().err.split())
    assert f"bfloat16 on cuda up to there and are float32 on {DEVICE.type}" in told


def test_the_choice_of_products_is_shown(
    from_halved: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where the model is larger than the demo's; here every model is made to seem so."""
    monkeypatch.setattr("rlhf_cli.runs.begin.DEMO_SIZE", 10)
    monkeypatch.setattr(dtypes, "DEMO_SIZE", 10)
    run_stage("dpo", tmp_path / "out", f"policy={from_halved}")
    chosen = name_of(product_type("auto", 1e9, DEVICE))
    assert f"model.dtype: {chosen} (auto, on {DEVICE.type})" in capsys.readouterr().err


# --------------------------------------------------------------------------- bfloat16


LORA = WORDS["lora"]
IN_BFLOAT16 = {
    "sft": ("sft", []),
    "dpo": ("dpo", ["policy=runs/demo/sft"]),
    "dpo lora": ("dpo", ["policy=runs/demo/sft", *LORA]),
    "dpo stacked": ("dpo", ["policy=runs/demo/adapter", "model.adapter=stack", *LORA]),
    "reward": ("reward", ["policy=runs/demo/sft"]),
    "ppo": ("ppo", ["policy=runs/demo/sft", "reward=runs/demo/reward"]),
    "ppo lora": ("ppo", ["policy=runs/demo/sft", "reward=runs/demo/reward_adapter", *LORA]),
    "ppo averaged": (
        "ppo",
        ["policy=runs/demo/sft", "reward=runs/demo/reward", "algo.ema_decay=0.9"],
    ),
    "grpo": ("grpo", ["policy=runs/demo/sft"]),
    "grpo refreshed": (
        "grpo",
        [
            *("policy=runs/demo/sft", "reward=runs/demo/reward", "judge=regex:H"),
            *("algo.refresh_reward=2", "algo.refresh_lr=1e-3", "algo.refresh_batch_size=4"),
            *("algo.refresh_replay=0.25", "algo.refresh_reference=2"),
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_a_stage_in_bfloat16_goes_as_in_float32(name: str, inside: None, tmp_path: Path) -> None:
    """Its checks hold, its first gradient is nearly the same, and it writes float32 masters."""
    stage, words = IN_BFLOAT16[name]
    first: list[dict[str, Any]] = []
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        if stage == "sft":
            log = metrics_of(sft("runs/demo/sft", out, f"model.dtype={dtype}"))
        else:
            log = run_stage(stage, out, *words, f"model.dtype={dtype}")
        first.append(next(each for each in log if "loss" in each))
        assert types_in(out) == {"F32"}
    exact, half = (math.hypot(*norms_of(each)) for each in first)
    sampled = stage in ("ppo", "grpo")  # a few draws fall the other way
    assert half == pytest.approx(exact, rel=0.5 if sampled else 0.1)
    (weights,) = (tmp_path / "bfloat16").glob("*.safetensors")
    moved = [value for value in load_file(weights).values() if value.numel() > 9]
    assert any(not torch.equal(value, value.bfloat16().float()) for value in moved)


def metrics_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def norms_of(figures: dict[str, Any]) -> list[float]:
    return [value for name, value in figures.items() if name.startswith("grad_norm/")]
