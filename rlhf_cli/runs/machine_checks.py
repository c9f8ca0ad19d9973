"""Checks of what else a run needs on this machine: servers, packages, files of questions."""

import os
from importlib.util import find_spec
from pathlib import Path

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.stages import LabelConfig, Run
from rlhf_cli.config.selection_rules import REWARD, choosers
from rlhf_cli.data.files import is_there
from rlhf_cli.folders.manifest import kind_of
from rlhf_cli.ranks.environment import is_first
from rlhf_cli.rewards.specs import response_models
from rlhf_cli.runs.model_checks import check_judges_steps


def check_sampler(cfg: Run) -> None:
    """What of vLLM must be on this machine is there: a server to start, what NCCL goes by."""
    hardware = cfg.hardware
    starts, sends = hardware.rollout_devices is not None, hardware.rollout_sync == "nccl"
    if (starts or sends) and is_first():
        from rlhf_cli.rollout import server_process  # HTTP takes long to import

        if starts:
            server_process.program()
        if sends:
            server_process.check_installed()


def check_labelling(cfg: Run) -> None:
    """Where responses are labelled, the files that are named are there, and what serves a page."""
    if not isinstance(cfg, LabelConfig):
        return
    keys = ("samples", "instructions", "known", "anchors")
    named = [*((key, getattr(cfg, key)) for key in keys), *(("asked", each) for each in cfg.asked)]
    for key, place in named:
        if place is not None and not is_there(place):
            raise UserError(f"{key}={place} does not exist")
    if cfg.anchors is not None and kind_of(Path(cfg.anchors)) != "labels":
        raise UserError(f"anchors={cfg.anchors} is no finished output of label")
    if cfg.algo.protocol == "steps" and cfg.reward is not None:
        check_judges_steps(cfg.reward, "algo.protocol=steps")
    try:
        Path(cfg.instructions or os.devnull).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"instructions={cfg.instructions} cannot be read: {error}") from None
    if cfg.algo.select == "fisher":
        (chooser,) = choosers(cfg)
        spec = str(cfg.reward) if chooser == REWARD else chooser
        if not response_models(spec):
            raise UserError(
                f"algo.select=fisher reads the last layer of a reward model of whole responses, "
                f"which {spec} is not; give one that `rlhf-cli reward` wrote"
            )
    needed = ("starlette", "uvicorn") if cfg.source == "page" or cfg.review else ()
    if missing := [name for name in needed if find_spec(name) is None]:
        raise UserError(
            f"a page needs {' and '.join(missing)}: pip install 'rlhf-cli[label]', or label "
            "in this terminal: source=terminal"
        )


def check_questions(cfg: Run) -> None:
    """The files that say what a judge or a reviser is asked are there; a stage reads them as it
    starts.
    """
    for key in ("judge_prompt", "principles", "critique_prompt", "revision_prompt"):
        place = getattr(cfg, key, None)
        if place is not None and not Path(place).is_file():
            raise UserError(f"{key}={place} does not exist, or is no file")
