"""Weights & Biases: online where its own settings and key allow it, or WANDB_MODE=offline."""

import os
from collections.abc import Mapping
from pathlib import Path

import wandb

from rlhf_cli.reporting.trackers.about import COLUMNS, SAMPLES, About, Sample

NOT_IN_PROJECTS = "/\\#?%:"
LONGEST = 128  # characters of the names of projects and runs


def begun(about: About) -> "Wandb":
    """A run of W&B, or the same one again."""
    return Wandb(about)


class Wandb:
    """Figures over `step`, a table of samples, the settings as config."""

    def __init__(self, about: About) -> None:
        """What W&B would collect by itself and may hold secrets is not collected: code, the
        difference to a commit, the address of a repository, what is printed.
        """
        project = "".join("-" if each in NOT_IN_PROJECTS else each for each in about.project)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or project[:LONGEST],
            name=os.environ.get("WANDB_NAME") or about.name[-LONGEST:],
            id=about.id,
            resume="allow",
            job_type=os.environ.get("WANDB_JOB_TYPE") or about.stage,
            config=about.told(),
            allow_val_change=True,
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                save_code=False,
                x_stats_pid=about.process,
            ),
        )
        self._run.define_metric("*", step_metric="step")
        folder = Path(self._run.dir).parent
        self.place = self._run.url or f"offline; wandb sync {folder}"

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Over an axis of our own: steps that a resumed run does again are no error there."""
        self._run.log({**figures, "step": step})

    def show(self, step: int, samples: list[Sample]) -> None:
        """A table."""
        self._run.log({SAMPLES: wandb.Table([*COLUMNS], samples), "step": step})

    def end(self, figures: Mapping[str, float] | None) -> None:
        """The summary; a run without an end is marked as failed."""
        if figures is not None:
            self._run.summary.update(dict(figures))
        self._run.finish(exit_code=0 if figures is not None else 1)
