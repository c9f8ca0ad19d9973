"""The script that times our jobs beside a peer's runs on what there is, and counts right."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_a_run_of_each_kind_says_how_fast_it_was(tmp_path: Path) -> None:
    words = ["dpo", "grpo", "gen", "--shape=tiny", "--steps=4", "--batch=4", "--sampling=2,2,8"]
    lines = tmp_path / "lines.jsonl"
    command = [sys.executable, str(BENCHMARKS / "speed.py"), "--side=ours", "--side=hf"]
    command += [f"--folder={tmp_path}", f"--lines={lines}", *words]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(line["job"], line.get("side")) for line in found] == [
        ("ceilings", None),
        *(("dpo", "ours"), ("grpo", "ours"), ("gen", "ours"), ("gen", "hf")),
    ]
    for line in found[1:3]:
        assert 0 < line["flop_share"] < 1
    for line in found[3:]:
        assert line["tokens"] == 2 * 2 * 8
        assert 0 < line["bandwidth_share"] < 1
    for line in found[1:]:
        assert line["step_s"] > 0
        assert line["first_step_s"] > line["step_s"]
    assert "| gen | hf |" in shown


def test_operations_are_those_that_torch_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of products with weights and of the head; attention is not counted on every device."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    inputs, jobs = (importlib.import_module(f"speed_{name}") for name in ("inputs", "jobs"))
    shape = inputs.SHAPES["tiny"]
    inputs.prepare(tmp_path, shape)
    aten = torch.ops.aten
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    work = jobs.Work()
    work.add(range(2, 7), [9, 4], 13)
    assert work.tokens == 5 + 9 + 5 + 4
    one = jobs.Work()
    one.add(range(2, 22), [20], 40)
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(2, 42)[None])
    products = sum(counter.get_flop_counts()["Global"][name] for name in (aten.mm, aten.addmm))
    attention = 4 * shape.layers * shape.width * 40**2 / 2  # half of the pairs: earlier tokens
    assert one.forward(shape) == pytest.approx(products + attention, rel=0.01)
