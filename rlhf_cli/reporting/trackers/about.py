"""What a tracker is told of a run, and what it must be able to do."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

from rlhf_cli.config.errors import UserError

PACKAGES = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}
"""The package that each value of `tracker` needs, of the extra of that name."""

FINAL = "final/"  # before the names of what a run ended with, as stage.json has it
SAMPLES = "samples"
COLUMNS = ("prompt", "response", "reward")  # of a sample

Sample = list[Any]
"""A value for each of COLUMNS; None where there is none."""


@dataclass(frozen=True)
class About:
    """A run, as a tracker is told of it.

    id: of the folder `out` as long as the run is not begun afresh; a tracker goes on with it.
    resumed: whether trackers have been told of it before.
    project: the name of the chain.
    config: as config.yaml has it.
    lineage: `parents` and `inputs`, by role, each with `path` and the `hash` of its content.
    command: as it was typed.
    process: that trains, whose use of the machine is of interest.
    taken: variables of the environment that the config took values from; they reach no tracker.
    """

    tracker: str
    id: str
    resumed: bool
    project: str
    name: str
    stage: str
    out: str
    config: dict[str, Any]
    lineage: dict[str, dict[str, dict[str, str]]]
    command: str
    process: int
    taken: list[str]

    def told(self) -> dict[str, Any]:
        """What belongs to a run beside its figures: its command, what it was made from, its
        settings.
        """
        return {"stage": self.stage, "command": self.command, **self.lineage, **self.config}


class Tracker(Protocol):
    """A run in one tracker; what its methods raise is said once, and the run goes on."""

    place: str
    """Where people look at it: an address, or a command."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a step, under the names of metrics.jsonl."""

    def show(self, step: int, samples: list[Sample]) -> None:
        """Take the samples of a step."""

    def end(self, figures: Mapping[str, float] | None) -> None:
        """Take the figures of the end, by FINAL + name; None of a run that did not come to it."""


def check_packages(trackers: list[str]) -> None:
    """Stop where a tracker is not installed.

    Raises:
        UserError: naming the extra that brings it.
    """
    for name in trackers:
        if find_spec(PACKAGES[name]) is None:
            raise UserError(
                f"tracker={name} needs {PACKAGES[name]}: pip install 'rlhf-cli[{name}]'"
            )


def leaves(tree: Mapping[str, Any], join: str, within: str = "") -> Iterator[tuple[str, Any]]:
    """What a tree holds that is no tree itself, each by the names that lead to it."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, join, f"{within}{name}{join}")
        else:
            yield f"{within}{name}", value


def numbers(tree: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in figures within figures, by path: `policies/runs/demo/ppo/reward/mean`.

    Lists, texts and what is not finite make no curve.
    """
    return {
        name: float(value)
        for name, value in leaves(tree, "/")
        if isinstance(value, int | float) and math.isfinite(value)
    }
