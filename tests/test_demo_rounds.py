"""Rounds of online RLHF on the demo, labelled by a rule that errs in a quarter of its rankings.

Each round asks for other facts, so that a reward model of the newest labels alone can forget those
of the first round.
"""

import contextlib
import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.catalog import shipped
from rlhf_cli.config.compose import compose
from rlhf_cli.demo.make_rows import NAMES, with_article
from rlhf_cli.runs.rounds import read_rounds

pytestmark = pytest.mark.slow

CLI = Path(sys.executable).with_name("rlhf-cli")
ASKED = (
    (("legs", "spider"), ("wheels", "bicycle"), ("sides", "pentagon")),
    (("legs", "ant"), ("wheels", "tricycle"), ("sides", "octagon")),
    (("legs", "crab"), ("wheels", "car"), ("sides", "triangle")),
)
FORMS = (
    "How many {part} does {thing} have?",
    "Tell me how many {part} there are on {thing}.",
    "What is the number of {part} of {thing}?",
)
SIZE = 216  # prompts of a round
SEED = 1
RECIPE = {
    "POLICY": "runs/demo/sft",
    "DATA": "data=rows data.path=prompts.jsonl",
    "COMMON": f"seed={SEED} hardware.threads=1",
    "LABEL": f"source=reward reward=demo_gold flip=0.25 algo.prompts={SIZE}",
    "PPO": "algo.steps=20",
    "EVALUATE": "gold=demo_gold algo.prompts=null",
}
ROUND = "runs/online/round{}"


def prompts_of_rounds() -> list[list[dict[str, str]]]:
    """The prompts of each round, in an order that is drawn."""
    draw, rounds = random.Random(0), []
    for things in ASKED:
        rows = [
            {"prompt": f"{name} asks: {form.format(part=part, thing=with_article(thing))}"}
            for part, thing in things
            for name in NAMES
            for form in FORMS
        ]
        draw.shuffle(rows)
        rounds.append(rows)
    return rounds


def write(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(stage: str, out: str, *words: str) -> Path:
    """Run a stage in the current folder."""
    cfg: Any = compose(stage, [*words, "hardware.threads=1", f"out={out}"])
    made: Path = importlib.import_module(f"rlhf_cli.stages.{stage}").run(cfg)
    return made


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def run_rounds(place: Path) -> None:
    """Run the recipe in a folder."""
    asked = prompts_of_rounds()
    write(place / "prompts.jsonl", [row for rows in asked for row in rows])
    write(place / "first.jsonl", asked[0])
    with contextlib.chdir(place):
        run("sft", "runs/demo/sft")
    path = os.pathsep.join([str(CLI.parent), os.environ["PATH"]])
    recipe = ["bash", str(shipped("recipes") / "online.sh")]
    env = {**os.environ, **RECIPE, "PATH": path}
    done = subprocess.run(recipe, cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check_prompts(rounds: Path) -> None:
    """Each round asks new ones, of the best policy before it."""
    seen: set[str] = set()
    best = ["runs/demo/sft"]
    with contextlib.chdir(rounds):
        reports = [Path(ROUND.format(number)) / "evaluate" for number in (1, 2)]
        best += [each.best for each in read_rounds(reports)]
    for number in (1, 2, 3):
        folder = rounds / ROUND.format(number) / "label"
        lines = (folder / "tasks.jsonl").read_text(encoding="utf-8").splitlines()
        prompts = {json.loads(line)["prompt"] for line in lines}
        assert len(prompts) > 0.9 * SIZE and not prompts & seen
        seen |= prompts
        parents = read(folder / "stage.json")["parents"]
        assert parents["policy"]["path"] == best[number - 1]
        sampled = {name.partition(" ")[2] for name in parents if name.startswith("baseline ")}
        assert sampled == {"runs/demo/sft"} - {best[number - 1]}


def check_gold(rounds: Path) -> None:
    """It rises from round to round, of each policy on prompts from which nothing was learnt."""
    last = read(rounds / ROUND.format(3) / "evaluate/report.json")["policies"]
    gain = last[f"{ROUND.format(3)}/ppo"]["gain_over_reference"]
    assert gain["mean"] > 4 * gain["stderr"]
    gains = [last[f"{ROUND.format(i)}/ppo"]["gain_over_reference"] for i in (1, 2, 3)]
    for before, after in zip(gains, gains[1:], strict=False):
        error = (before["stderr"] ** 2 + after["stderr"] ** 2) ** 0.5
        assert after["mean"] > before["mean"] - 2 * error
    assert gains[2]["mean"] > gains[0]["mean"]


def check_replay(rounds: Path) -> None:
    """It keeps what the newest labels forget: on held-out prompts of the first round, labelled
    without errors, the third round's reward model is beside one of that round's labels alone.
    """
    with contextlib.chdir(rounds):
        prompts = ["data=rows", "data.path=first.jsonl", "policy=runs/demo/sft"]
        rule = ["source=reward", "reward=demo_gold", "algo.prompts=null", "algo.samples=8"]
        clean = run("label", "clean", *prompts, *rule, "algo.responses=8", "algo.repeat=0")
        third = f"data.path={ROUND.format(3)}/label/rankings.jsonl"
        held_out, same = "data.eval_share=0.2", ["policy=runs/demo/sft", f"seed={SEED}"]
        run("reward", "newest", "algo=kwise", "data=rows", third, held_out, *same)
        accuracy = {}
        for name, reward in (("replay", f"{ROUND.format(3)}/reward"), ("newest", "newest")):
            words = ["policy=runs/demo/sft", "baselines=[]", "reference=null", f"reward={reward}"]
            rows = ["data=rows", f"data.path={clean / 'rankings.jsonl'}", held_out]
            few = ["algo.prompts=2", "algo.samples=1", "gold=null"]
            report = run("evaluate", f"judged/{name}", *words, *rows, *few) / "report.json"
            accuracy[name] = read(report)["reward_model"]
    replay, newest = accuracy["replay"], accuracy["newest"]
    assert replay["accuracy_low"] > newest["accuracy_high"]


def test_rounds_ask_anew_raise_gold_and_keep_what_was_learnt(tmp_path: Path) -> None:
    run_rounds(tmp_path)  # which takes minutes, so that it is not done for each of these
    check_prompts(tmp_path)
    check_gold(tmp_path)
    check_replay(tmp_path)
