"""A run as trackers hear of it, without a stage, and a tracker of a test's own."""

import json
import os
from pathlib import Path
from typing import Any

from rlhf_cli.reporting.trackers.about import About
from rlhf_cli.reporting.trackers.outlets import Trackers

CONFIG = {"seed": 3, "algo": {"lr": 0.5, "loss": None}}
LINEAGE = {"parents": {"policy": {"path": "runs/demo/sft", "hash": "ab12"}}, "inputs": {}}
TERM = "reward/0.5*length:3 + x.py:f/mean"  # a name that not every tracker takes

# Stands in the place of the package wandb: writes down what it is told, as lines of calls.jsonl.
FAKE = """
import json, os, time
from types import SimpleNamespace

def note(what, **told):
    with open("calls.jsonl", "a") as file:
        file.write(json.dumps({"what": what, **told}) + "\\n")

class Run:
    url = "https://tracker.test/run"
    dir = "."
    summary = SimpleNamespace(update=lambda figures: note("summary", **figures))
    def define_metric(self, *names, **more): ...
    def log(self, row):
        IN_LOG
        note("log", **row)
    def finish(self, exit_code): note("finish", exit_code=exit_code)

def Settings(**more): return more
def Table(columns, data): return [columns, data]
def init(**told):
    IN_INIT
    note("init", **told)
    return Run()
"""


def fake(place: Path, in_init: str = "", in_log: str = "") -> None:
    """Put the fake on the path; the statements are run within its functions."""
    code = FAKE.replace("IN_INIT", in_init or "pass").replace("IN_LOG", in_log or "pass")
    (place / "wandb.py").write_text(code)


def calls(place: Path) -> list[dict[str, Any]]:
    """What the fake was told."""
    return [json.loads(line) for line in (place / "calls.jsonl").read_text().splitlines()]


def begun(name: str, resumed: bool = False, **more: Any) -> Trackers:
    """A run that one tracker is told of."""
    trackers = Trackers([name])
    about: dict[str, Any] = {
        "config": CONFIG,
        "lineage": LINEAGE,
        "command": "rlhf-cli ppo seed=3",
        **more,
    }
    place = "runs/demo/ppo"
    Path(place).mkdir(parents=True, exist_ok=True)
    trackers.start(
        About(
            *("", "0123456789ab", resumed, "demo", place, "ppo", place),
            process=os.getpid(),
            taken=[],
            **about,
        )
    )
    return trackers


def hear(trackers: Trackers, *steps: int) -> None:
    """Rows of metrics, and two samples of each step."""
    for step in steps:
        row = {"step": step, "loss": 1 / step, "skipped": 0, "eval/gold": None, TERM: float(step)}
        trackers.hear("metrics.jsonl", row)
        for text in ("<b>Hi", "No."):
            sample = {"step": step, "prompt": "Greet A", "response": text, "reward": 0.5}
            trackers.hear("samples.jsonl", {**sample, "kl": 0.1})
        trackers.hear("pairs.jsonl", {"step": step})
