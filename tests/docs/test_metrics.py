"""docs/metrics.md describes every metric that short runs of the stages write, and no other."""

import contextlib
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.compose import compose
from tests.docs.pages import DOCS, ROOT, prose
from tests.tiny import DATA, words_of

SHORT = ["data.max_rows=24", "hardware.save_every=null"]
TRAINED_ON_ROWS = ["algo.epochs=1", "algo.eval_every=9"]  # evaluated at the end only
ONLINE = [
    *("algo.steps=2", "algo.eval_every=1", "algo.eval_prompts=2", "gold=length:2"),
    *("algo.overoptimised=1", "algo.max_kl=9", "algo.target_reward=9", "algo.min_entropy=0.1"),
    *("algo.max_length_drift=9", "algo.max_repetition=0.9", "algo.max_truncated=0.99"),
]
WITHIN = ["algo.kl_in=loss", "algo.kl_estimator=full", "algo.entropy_coef=0.01"]
GIVES = '\ndef some(prompts, responses):\n    return [None if "A" in p else 1.0 for p in prompts]\n'

RUNS: dict[str, list[str]] = {
    "sft": ["algo.max_steps=2", "select_by=reward", "reward=OWN"],
    "reward": TRAINED_ON_ROWS,
    "reward algo=kwise": [*TRAINED_ON_ROWS, "data.path=rankings.jsonl"],
    "reward algo=pointwise": [*TRAINED_ON_ROWS, "data.path=feedback.jsonl"],
    "reward algo=pointwise algo.target=score": [*TRAINED_ON_ROWS, "data.path=feedback.jsonl"],
    "dpo": TRAINED_ON_ROWS,
    "dpo algo=kto": [*TRAINED_ON_ROWS, "data.path=feedback.jsonl"],
    "ppo algo=ppo_klpen": [
        *("reward=runs/demo/reward + 0.1*length:2", "algo.clip=null", "algo.keep=eval/reward"),
        *("algo.kl_controller=fixed", "algo.kl_target=null", "algo.kl_horizon=null", *ONLINE),
        *(*WITHIN, "algo.ptx_coef=0.1"),
    ],
    "ppo": [*ONLINE, "policy=runs/demo/sft"],
    "grpo": [*ONLINE, *WITHIN, "algo.dynamic_sampling=1"],
    "grpo algo=grpo_iterative": [
        *("reward=runs/demo/reward", "judge=runs/demo/adapter", "algo.refresh_reward=1"),
        *("algo.refresh_reference=1", "algo.kl_estimator=weighted_k3", "algo.steps=1"),
    ],
    "generate": ["policy=runs/demo/sft", "reward=OWN", "algo.prompts=12"],
    "label": [
        *("policy=runs/demo/sft", "source=reward", "reward=length:2", "algo.prompts=4"),
        *("algo.overlap=1", "annotators=[one,two]", "flip=0.1", "algo.repeat=0.5"),
    ],
    "evaluate": [
        *("policy=runs/demo/sft", "baselines=[runs/demo/adapter]", "algo.prompts=4"),
        *("reward=0.1*OWN + runs/demo/reward", "gold=OWN", "algo.samples=1"),
        *("best_of=runs/demo/adapter", "best_of_n=2", "scorers=['length:2',OWN]"),
    ],
}


def described() -> set[str]:
    """The names in the first column of the tables of metrics.md."""
    rows = [line for line in prose(DOCS / "metrics.md") if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])}


def pattern(name: str) -> str:
    """A regular expression for a name, in which words in capitals stand for any text."""
    return re.sub(r"TERM|\bN\b", ".+", re.escape(name))


def names_in(out: Path) -> Iterator[str]:
    """Every metric that a stage has left."""
    if (out / "metrics.jsonl").is_file():
        for line in (out / "metrics.jsonl").read_text().splitlines():
            yield from json.loads(line)
    manifest = json.loads((out / "stage.json").read_text())
    yield from manifest["checks"]
    if "policies" not in manifest["metrics"]:
        yield from manifest["metrics"]
    if (out / "report.json").is_file():
        report = json.loads((out / "report.json").read_text())
        yield from report
        for figures in report.get("policies", {}).values():
            yield from figures
        yield from report.get("reward_model") or {}


@pytest.fixture(scope="module")
def written(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The metrics of all runs."""
    folder = tmp_path_factory.mktemp("metrics")
    own = folder / "own.py"
    own.write_text(GIVES)
    found: set[str] = set()
    with contextlib.chdir(chain):
        for number, (start, more) in enumerate(RUNS.items()):
            stage, *options = start.split()
            samples = stage in ("generate", "label", "evaluate")
            words = DATA if samples else [*words_of(stage), *SHORT]
            more = [word.replace("OWN", f"{own}:some") for word in more]
            out = folder / str(number)
            cfg: Any = compose(stage, [*options, *words, *more, f"out={out}"])
            importlib.import_module(f"rlhf_cli.stages.{stage}").run(cfg)
            found |= set(names_in(out))
    return found


@pytest.mark.slow
def test_every_metric_is_described(written: set[str]) -> None:
    patterns = [re.compile(pattern(name)) for name in described()]
    unknown = {
        name
        for name in written
        if not any(p.fullmatch(name) or p.fullmatch(f"eval/{name}") for p in patterns)
    }
    assert not unknown


@pytest.mark.slow
def test_what_is_described_is_written_somewhere(written: set[str]) -> None:
    """By a run, or at least the code has its last word."""
    code = "".join(path.read_text() for path in (ROOT / "rlhf_cli").rglob("*.py"))
    for name in described() - written:
        last = re.split(r"[/_]", name)[-1]
        assert last == "TERM" or re.search(rf"(?<![A-Za-z]){last}\b", code), name


def test_each_name_stands_once_in_a_section() -> None:
    for section in "\n".join(prose(DOCS / "metrics.md")).split("\n#"):
        rows = [line for line in section.splitlines() if line.startswith("| `")]
        names = [name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
        assert len(names) == len(set(names))
        assert all(len(re.split(r"(?<!\\) \|", row)) == 5 for row in rows), "four columns each"
