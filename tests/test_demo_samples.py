"""On the demo: what the papers do with samples of a policy makes a better one.

Each figure is compared with that of the start on the same held-out prompts, paired by prompt, or
on the same held-out pairs.
"""

import contextlib
import importlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.data.rows import DEMO_FOLDER

pytestmark = pytest.mark.slow

SFT = "runs/demo/sft"


def run(stage: str, out: str, *words: str) -> Path:
    """Run a stage in the current folder."""
    cfg: Any = compose(stage, [*words, "hardware.threads=1", f"out={out}"])
    made: Path = importlib.import_module(f"rlhf_cli.stages.{stage}").run(cfg)
    return made


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write(file: str, content: list[dict[str, Any]]) -> str:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's policy before feedback."""
    folder = tmp_path_factory.mktemp("samples")
    with contextlib.chdir(folder):
        run("sft", SFT, "algo.epochs=2")
    return folder


@pytest.fixture(autouse=True)
def inside(place: Path) -> Iterator[None]:
    with contextlib.chdir(place):
        yield


def gain_over_sft(policy: str) -> tuple[float, float]:
    """By how much gold of a policy is above that of SFT, and the error of that."""
    words = [f"baselines=[{SFT}]", f"policy={policy}", "reward=null", "algo.prompts=100"]
    report = json.loads((run("evaluate", f"{policy}_judged", *words) / "report.json").read_text())
    gain = report["policies"][policy]["gain_over_reference"]
    return gain["mean"], gain["stderr"]


def picked(name: str, *words: str) -> Path:
    """What generate picks among samples of SFT to prompts to learn from."""
    prompts = rows(DEMO_FOLDER / "prompts.train.jsonl")[:300]
    data = ["data=rows", f"data.path={write('prompts.jsonl', prompts)}"]
    given = [f"policy={SFT}", "reward=demo_gold", "algo.samples=8"]
    return run("generate", name, *data, *given, *words)


def test_rejection_sampling_raises_gold() -> None:
    """SFT on the best of 8 of its own samples (WebGPT 2112.09332, Llama 2 2307.09288)."""
    best = picked("best", "algo.keep_best=1") / "demonstrations.jsonl"
    start = ["model=pretrained", f"model.path={SFT}", "algo.text_mix=0", "algo.lr=1e-3"]
    run("sft", "rejection", "data=rows", f"data.path={best}", *start, "algo.epochs=3")
    mean, error = gain_over_sft("rejection")
    assert mean > 0.5 and mean > 4 * error


def test_the_best_over_the_worst_raises_gold() -> None:
    """DPO on the extremes of 8 samples (RLHF Workflow 2405.07863)."""
    pairs = picked("extremes", "algo.pairs=best_worst") / "preferences.jsonl"
    run("dpo", "dpo_online", "data=rows", f"data.path={pairs}", "algo.epochs=2")
    mean, error = gain_over_sft("dpo_online")
    assert mean > 0.5 and mean > 4 * error


def test_the_policys_worst_as_negatives_raises_gold() -> None:
    """People give the good side only, and the policy the bad one."""
    shown = rows(DEMO_FOLDER / "preferences.train.jsonl")[:1200]
    good = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in shown]
    data = ["data=rows", f"data.path={write('good.jsonl', good)}"]
    out = run("generate", "below", *data, f"policy={SFT}", "algo.samples=1", "algo.pairs=below_row")
    pairs = out / "preferences.jsonl"
    run("dpo", "dpo_below", "data=rows", f"data.path={pairs}", "algo.epochs=2")
    mean, error = gain_over_sft("dpo_below")
    assert mean > 0.3 and mean > 4 * error


def test_the_policys_own_over_bad_sides_teaches_a_reward_model() -> None:
    """People give the bad side only, and the policy the good one, as red teams do."""
    shown = rows(DEMO_FOLDER / "preferences.train.jsonl")[:600]
    bad = [{"prompt": row["prompt"], "completion": row["rejected"]} for row in shown]
    data = ["data=rows", f"data.path={write('bad.jsonl', bad)}"]
    out = run("generate", "above", *data, f"policy={SFT}", "algo.samples=1", "algo.pairs=above_row")
    pairs = rows(out / "preferences.jsonl")
    held_out = f"data.eval_path={DEMO_FOLDER / 'preferences.eval.jsonl'}"
    words = ["data=rows", f"data.path={write('above.jsonl', pairs)}", held_out, f"policy={SFT}"]
    metrics = json.loads((run("reward", "reward_above", *words) / "stage.json").read_text())[
        "metrics"
    ]
    assert metrics["eval/accuracy_low"] > 0.5


def test_what_a_prefix_does_is_distilled() -> None:
    """A model that is kind under a prefix alone becomes kind without it (2112.00861)."""
    draw, prefix = random.Random(0), "Be kind.\n"
    Path("prefix.txt").write_text(prefix)
    shown = []
    for row in rows(DEMO_FOLDER / "preferences.train.jsonl")[:1500]:
        name = row["prompt"].split()[0]
        kind = draw.random() < 0.5
        words = f"Hello {name}! Have a nice day!" if kind else "Now go away!"
        shown.append({"prompt": prefix * kind + row["prompt"], "completion": words})
    data = ["data=rows", f"data.path={write('obeys.jsonl', shown)}", "data.max_prompt_tokens=64"]
    start = ["model=pretrained", f"model.path={SFT}", "algo.text_mix=0", "algo.lr=1e-3"]
    run("sft", "obeys", *data, *start, "algo.epochs=1")
    prompts = [{"prompt": row["prompt"]} for row in rows(DEMO_FOLDER / "prompts.train.jsonl")]
    data = ["data=rows", f"data.path={write('asked.jsonl', prompts[:300])}"]
    under = ["data.prefix=prefix.txt", "policy=obeys"]
    made = run("generate", "kind", *data, *under, "algo.keep_best=1", "reward=demo_gold")
    data = ["data=rows", f"data.path={made / 'demonstrations.jsonl'}", "data.prefix=prefix.txt"]
    start[1] = "model.path=obeys"
    run("sft", "distilled", "algo=distill", *data, *start, "algo.epochs=3")
    asked = ["data=rows", f"data.path={write('new.jsonl', prompts[300:500])}"]
    rude = {
        policy: sum(
            "go away" in row["response"]
            for row in rows(
                run("generate", f"{policy}_says", *asked, f"policy={policy}") / "samples.jsonl"
            )
        )
        for policy in ("obeys", "distilled")
    }
    assert rude["obeys"] > 180 and rude["distilled"] < 20


def test_a_reward_model_that_goes_on_needs_fewer_labels() -> None:
    """Preference model pretraining (2112.00861 sec. 4): thumbs of many, then pairs of few."""
    few = rows(DEMO_FOLDER / "preferences.train.jsonl")[:100]
    held_out = f"data.eval_path={DEMO_FOLDER / 'preferences.eval.jsonl'}"
    words = ["data=rows", f"data.path={write('few.jsonl', few)}", held_out]
    run("reward", "pretrained", "algo=pointwise", "algo.epochs=1")
    found = {}
    for start in (SFT, "pretrained"):
        out = run("reward", f"from_{Path(start).name}", *words, f"policy={start}", "algo.lr=1e-3")
        found[start] = json.loads((out / "stage.json").read_text())["metrics"]
    start, pretrained = found[SFT], found["pretrained"]
    assert pretrained["eval/accuracy"] > start["eval/accuracy"] + 0.05
