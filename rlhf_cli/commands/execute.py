"""A composed config is checked, or run: in this process or several, its path told at the end."""

import gc
import importlib
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.config.errors import RunError
from rlhf_cli.config.secrets import redacted
from rlhf_cli.reporting.terminal import print_path, printable

if TYPE_CHECKING:
    from rlhf_cli.runs.preflight import Plan


def execute(stage: str, cfg: Any, check: bool, words: list[str], as_json: bool = False) -> None:
    """Check or run a config.

    Args:
        words: after the stage, they make the config again, for further processes.
        as_json: whether what a check found is told to a program.

    Raises:
        UserError: the config or its input is wrong.
        RunError: the stage failed, or the disk did.
    """
    with _disk_faults(cfg):
        out = _checked_run(stage, cfg, check, words, as_json)
    if out is not None:
        _tell_path(out)


def _checked_run(stage: str, cfg: Any, check: bool, words: list[str], as_json: bool) -> Path | None:
    """The folder that the stage wrote, now or before; None after a check, and where another
    process has told it.
    """
    from rlhf_cli.ranks.environment import place
    from rlhf_cli.runs.out_folder import FINISHED, tidy
    from rlhf_cli.runs.preflight import preflight

    # Importing torch and transformers makes millions of objects that never die. Without the
    # collector walking through them again and again it takes a third less time.
    gc.disable()
    plan = preflight(cfg, check_only=check)
    gc.freeze()  # nor as the process ends
    if as_json:
        print(json.dumps(findings(stage, cfg, plan), indent=2))
        return None
    if check:
        tell(plan.lines())
        return None
    asked_again = getattr(cfg, "review", False)  # what people have labelled is looked at anew
    # known without torch: a chain flies by again
    if plan.state == FINISHED and place() is None and not asked_again:
        tidy(Path(cfg.out))
        tell([f"{cfg.out}: already finished; nothing to do"])
        return Path(cfg.out)
    if cfg.hardware.processes != 1:
        from rlhf_cli.commands.launch import launch, processes_of

        if (processes := processes_of(cfg)) > 1:
            launch(cfg, plan, [stage, *words], processes)
            return None
    tell(plan.at_once())
    from rlhf_cli.reporting.trackers.outlets import leave_all

    module = importlib.import_module(f"rlhf_cli.stages.{stage}")
    gc.freeze()
    gc.enable()
    try:
        out: Path = module.run(cfg, plan)
    finally:  # a job of a sweep may fail, and the next begin
        leave_all()
    return out


def findings(stage: str, cfg: Any, plan: "Plan") -> dict[str, Any]:
    """What a check found, for programs: the facts, then the lines that people are shown.

    Numbers are null where they are not known.
    """
    from rlhf_cli.runs.memory_estimate import predicted_peak
    from rlhf_cli.runs.model_sizes import Unknown
    from rlhf_cli.runs.out_folder import FINISHED

    peak = None
    with suppress(Unknown):
        peak = round(predicted_peak(cfg)) if cfg.trains and plan.state != FINISHED else None
    return {
        "stage": stage,
        "out": cfg.out,
        "state": plan.state,
        "parameters": int(plan.parameters) if 0 < plan.parameters < math.inf else None,
        "peak_bytes": peak,
        "doing": plan.doing,
        "rows": plan.counted,
        "code": plan.code,
        "plan": plan.sums,
        "memory": plan.memory,
    }


def _tell_path(out: Path) -> None:
    """The path on stdout. Where that is closed, full or read by nobody the work is done all the
    same, and a line says where it lies.
    """
    fault = "it is closed"
    try:
        if sys.stdout is not None:
            print_path(out)
            return
    except (OSError, ValueError) as error:
        fault = getattr(error, "strerror", None) or str(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes to it again at exit
    from rlhf_cli.reporting.console import say

    say(f"{out} is written; stdout did not take its path: {fault}")


@contextmanager
def _disk_faults(cfg: Any) -> Iterator[None]:
    """A full, read-only or forbidden disk ends a run in one line."""
    from rlhf_cli.folders.files import disk_fault
    from rlhf_cli.runs.out_files import what_is_kept

    try:
        yield
    except OSError as error:
        fault = disk_fault(error)
        if fault is None:
            raise
        kept = what_is_kept(Path(cfg.out))
        if kept is None:
            kept = "nothing was saved yet"
        elif cfg.trains:
            kept = f"what was saved after {kept} is whole"
        else:
            kept = f"{kept} are kept"
        place = "" if error.filename else f"out={cfg.out}: "
        raise RunError(
            f"{place}{fault}; {kept}; once that is mended the same command goes on"
        ) from error


def tell(lines: list[str]) -> None:
    """Lines on stderr, fit to be seen; nobody need hear them."""
    if not lines:
        return
    try:
        shown = (printable(redacted(line)) for line in lines)
        print(*shown, sep="\n", file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
