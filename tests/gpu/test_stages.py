"""Every stage with hardware=gpu and bfloat16, and runs that are killed there."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.compose import compose
from tests.contents import contents_of
from tests.faults.killing import STAGES
from tests.tiny import DATA, WORDS, words_of

pytestmark = pytest.mark.gpu
GPU = ["hardware=gpu", "hardware.save_every=2", "model.dtype=bfloat16"]
SAMPLED = ["policy=runs/demo/sft", "reward=runs/demo/reward", "algo.prompts=9", *DATA]
SIZES = ("vocab_size", "hidden_size", "layers", "heads", "context")
RUNS = {
    "sft": [  # on a model, as one from scratch is trained in float32
        *("sft", "model=pretrained", "model.path=runs/demo/sft"),
        *(word for word in words_of("sft") if not any(size in word for size in SIZES)),
    ],
    "reward": ["reward", *words_of("reward")],
    "dpo": ["dpo", *words_of("dpo")],
    "dpo lora": ["dpo", *words_of("dpo"), *WORDS["lora"]],
    "ppo": ["ppo", *words_of("ppo")],
    "ppo lora": ["ppo", *words_of("ppo"), *WORDS["lora"], "reward=runs/demo/reward_adapter"],
    "grpo": ["grpo", *words_of("grpo")],
    "generate": ["generate", *SAMPLED],
    "evaluate": ["evaluate", *SAMPLED, "algo.samples=2", "baselines=[runs/demo/adapter]"],
}


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("name", RUNS)
def test_a_stage_ends_on_the_gpu(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, *words = RUNS[name]
    # what only stages that train save is no key of the others
    gpu = GPU if stage not in ("generate", "evaluate") else [GPU[0], GPU[2]]
    out: Path = STAGES[stage].run(compose(stage, [*words, *gpu, f"out={tmp_path / 'out'}"]))
    assert json.loads((out / "stage.json").read_text())["complete"]
    metrics = out / "metrics.jsonl"
    if not metrics.exists():
        return
    entries = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert len(entries) >= 5 and entries[-1]["skipped"] == 0
    values = [value for entry in entries for value in entry.values() if isinstance(value, float)]
    assert values and all(map(math.isfinite, values))


# --------------------------------------------------------------------------- kills

PLAIN = "import sys; from rlhf_cli.cli import main; sys.exit(main())"
DYING = """
import os, signal, sys
from rlhf_cli.cli import main
from rlhf_cli.reporting.metrics import JsonLines

write = JsonLines.write

def dying(log, number, values):
    write(log, number, values)
    if number == 5 and log.file.name == "metrics.jsonl":
        os.kill(os.getpid(), signal.SIGKILL)

JsonLines.write = dying
sys.exit(main())
"""
SCRATCH = [  # heads that the flash kernels take
    *("model.vocab_size=280", "model.hidden_size=256", "model.layers=2", "model.heads=4"),
    *("model.context=1024", "algo.max_steps=4", "algo.eval_every=4", "algo.lr=1e-3"),
]
LONG = [
    *("data=jsonl", "data.path=rows.jsonl", "data.eval_rows=8", "data.long_responses=cut"),
    *("data.max_prompt_tokens=64", "data.max_response_tokens=900", "hardware=gpu"),
    *("hardware.save_every=2", "algo.batch_size=8"),
]
HALF = "model.dtype=bfloat16"
KILLED = {
    "sft": [
        *("model=pretrained", "model.path=long", "algo.max_steps=8", "algo.epochs=9", HALF),
        *("algo.eval_every=4", "algo.lr=1e-4"),
    ],
    "dpo": ["policy=long", "algo.epochs=1", "algo.eval_every=4", HALF],
    "grpo": [
        *(
            "policy=long",
            HALF,
            "algo.steps=7",
            "algo.group_size=4",
            "algo.epochs=2",
            "reward=regex:a",
        ),
        *("algo.minibatch_size=4", "data.max_response_tokens=120"),
    ],
}


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows of 200 to 850 tokens, on which several blocks of the kernels add up, and a
    policy in `long` that was trained on them.
    """
    place = tmp_path_factory.mktemp("long")
    rows: list[dict[str, Any]] = []
    for i in range(72):
        words = " ".join(str((i * j) % 97) for j in range(1, 80 + 3 * i))
        rows.append({"prompt": f"Count by {i}: ", "chosen": words, "rejected": words[::-1][:400]})
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ended(place, ["sft", *LONG, *SCRATCH, "out=long"]) == 0
    return place


def ended(place: Path, words: list[str], script: str = PLAIN) -> int:
    """The status of a stage in a process of its own, started by a script."""
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=place,
        env={**os.environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )
    if done.returncode > 0:
        pytest.fail(done.stderr[-3000:])
    return done.returncode


@pytest.mark.parametrize("stage", KILLED)
def test_a_killed_run_goes_on_to_the_same_bytes(stage: str, long_rows: Path) -> None:
    """In bfloat16, by the flash kernels, in another process."""
    words = [stage, *LONG, *KILLED[stage]]
    whole, killed = (long_rows / f"{stage}_{how}" for how in ("whole", "killed"))
    ended(long_rows, [*words, f"out={whole.name}"])
    assert ended(long_rows, [*words, f"out={killed.name}"], DYING) == -signal.SIGKILL
    assert (killed / "checkpoints").exists() and not (killed / "stage.json").exists()
    ended(long_rows, [*words, f"out={killed.name}"])
    one, other = contents_of(whole), contents_of(killed)
    config = {name: found.pop("config.yaml") for name, found in (("a", one), ("b", other))}
    assert config["a"] != config["b"]  # they name their folders
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name] and name.endswith("safetensors")] == []
    assert one["metrics.jsonl"] == other["metrics.jsonl"]
