"""The start of a run that is checked: its device, its ranks, and the session that it gets."""

import time
from pathlib import Path

import torch

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.keys import AUTO
from rlhf_cli.config.schema.stages import Run
from rlhf_cli.config.stages import DEMO_SIZE, stage_name
from rlhf_cli.data.order import derived_seed
from rlhf_cli.models.dtypes import name_of, product_type
from rlhf_cli.ranks.agreement import by_main
from rlhf_cli.ranks.environment import place
from rlhf_cli.ranks.worker import join_others
from rlhf_cli.ranks.world import world
from rlhf_cli.reporting.console import board, say
from rlhf_cli.reporting.metrics import Listener
from rlhf_cli.runs import interrupts
from rlhf_cli.runs.budgets import settle
from rlhf_cli.runs.device import device_of, set_threads
from rlhf_cli.runs.out_folder import FINISHED, RESUMABLE, tidy
from rlhf_cli.runs.preflight import Plan, agree, preflight
from rlhf_cli.runs.session import Session


def begin(cfg: Run, plan: Plan | None = None) -> Session | None:
    """Set torch up for a run that is checked; None where `out` is finished already.

    Args:
        plan: from `preflight` of this config, where that was asked before; one of a check is made
            anew.
    """
    began = time.monotonic()
    if cfg.hardware.processes not in (1, AUTO) and place() is None:
        raise UserError(
            f"hardware.processes={cfg.hardware.processes} is for commands: a stage that Python "
            "calls is this process alone, or a rank of torchrun's"
        )
    if plan is None or (plan.provenance is None and plan.state != FINISHED):
        plan = preflight(cfg)
    device = device_of(cfg.hardware.device)
    join_others(device, cfg.hardware.rank_timeout, say)
    agree(cfg, plan)
    if plan.state == FINISHED:
        by_main(lambda: tidy(Path(cfg.out)))
        say(f"{cfg.out}: already finished; nothing to do")
        return None
    for line in [*plan.at_once(), *plan.code]:
        say(line)
    set_threads(cfg.hardware.threads, plan.parameters)
    torch.manual_seed(derived_seed(cfg.seed, "begin"))  # adapters and added tokens start from it
    world().shard(cfg.hardware.shard)
    dtype = product_type(cfg.model.dtype, plan.parameters, device)
    if cfg.model.dtype == AUTO and plan.parameters > DEMO_SIZE:
        plan.sums.append(f"model.dtype: {name_of(dtype)} (auto, on {device.type})")
    budget, lines = settle(cfg, device, dtype.itemsize, plan.state == RESUMABLE)
    plan.sums += lines
    course = board.begin(cfg.out, stage_name(cfg))
    interrupts.shown_by(board.tell_of_signal)
    heard_by: list[Listener] = [] if course is None else [course.hear]
    return Session(
        *(cfg, Path(cfg.out), device, began, plan),
        budget=budget,
        listeners=heard_by,
        course=course,
    )
