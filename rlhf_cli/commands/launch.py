"""One command becomes several processes, as hardware.processes says.

A worker is `python -m rlhf_cli STAGE words...` with its rank in the environment, which is what
torchrun starts, too. The process that the user started has checked all that it can before the first
of them begins; it ends as a run of one process does, with the same exit status and one line.
"""

import os
import shutil
import site
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import rlhf_cli
from rlhf_cli.config.errors import EXIT_TRY_AGAIN, Interrupted, RunError, UserError
from rlhf_cli.config.schema.keys import AUTO
from rlhf_cli.config.schema.stages import Run
from rlhf_cli.config.stages import DEMO_SIZE
from rlhf_cli.data.raw import ESCAPED
from rlhf_cli.data.stdin import STDIN, stdin_lines
from rlhf_cli.ranks import worker
from rlhf_cli.ranks.causes import Cause
from rlhf_cli.ranks.environment import place
from rlhf_cli.reporting.console import board
from rlhf_cli.runs import interrupts
from rlhf_cli.runs.preflight import Plan


def processes_of(cfg: Run) -> int:
    """How many processes are to be started; 1 where this one is the run, or a rank of it.

    Raises:
        UserError: another number was started already, or there are fewer devices.
    """
    wanted = cfg.hardware.processes
    if (here := place()) is not None:
        if wanted not in (AUTO, 1, here.size, here.local_size):
            raise UserError(
                f"hardware.processes={wanted}, but torchrun or srun started {here.size}; they say "
                "how many there are, so leave hardware.processes out"
            )
        return 1
    if wanted == 1:
        return 1
    import torch

    devices = 0 if cfg.hardware.device == "cpu" else torch.cuda.device_count()
    if wanted == AUTO:
        return max(1, devices)
    if devices and wanted > devices:
        raise UserError(
            f"hardware.processes={wanted}, but torch finds {devices} GPU{'s' * (devices > 1)}, and "
            "each process takes one: give hardware.processes=auto, or hardware.device=cpu"
        )
    return int(wanted)


def launch(cfg: Run, plan: Plan, words: Sequence[str], processes: int) -> None:
    """Run a checked command in several processes of this machine, and wait for them.

    Args:
        words: the stage and all that follows.

    Raises:
        UserError, RunError, Interrupted, SystemExit: as a run of one process ends, with the line
            of the rank that was the first to fail.
    """
    from rlhf_cli.commands.agent import run_workers

    folder = Path(tempfile.mkdtemp(prefix="rlhf-cli-"))

    def clear() -> None:
        shutil.rmtree(folder, ignore_errors=True)

    interrupts.before_the_end(clear)
    # rank 0 has the terminal, and shows what a signal does: a line of ours would be drawn over
    interrupts.shown_by(lambda line, status: status is None and board.is_live())
    command = [sys.executable, "-P", "-m", "rlhf_cli", *words]
    before = dict(os.environ)
    os.environ.update(_environment(cfg, plan, processes, folder))
    try:
        cause = run_workers(command, processes, cfg.hardware.max_restarts, Path(cfg.out), folder)
    finally:
        os.environ.clear()
        os.environ.update(before)
    if cause is None or not cause.shows_log():
        clear()
    if cause is not None:
        raise_as_alone(cause)


def raise_as_alone(cause: Cause) -> None:
    """Raise what a run of one process would have."""
    line = cause.named()
    if cause.status == EXIT_TRY_AGAIN:
        raise Interrupted(line)
    if cause.status == 2:
        raise UserError(line)
    if cause.status == 1:
        raise RunError(line)
    print(f"rlhf-cli: error: {line}", file=sys.stderr, flush=True)
    raise SystemExit(cause.status)


def _environment(cfg: Run, plan: Plan, processes: int, folder: Path) -> dict[str, str]:
    """What workers find in theirs beside ranks."""
    told = {
        worker.AGENT: str(os.getpid()),
        worker.LOGS: str(folder),
        # else the store of the ranks that died is used again, with their addresses in it
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    if cfg.data.path == STDIN:
        rows = folder / "stdin"
        rows.write_text("".join(stdin_lines()), encoding="utf-8", errors=ESCAPED)
        told[worker.STDIN] = str(rows)
    root = str(Path(rlhf_cli.__file__).parents[1])
    if root not in [*site.getsitepackages(), site.getusersitepackages()]:
        told["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    if "OMP_NUM_THREADS" not in os.environ and cfg.hardware.threads is None:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        threads = 1 if plan.parameters <= DEMO_SIZE else max(1, cores // processes)
        told["OMP_NUM_THREADS"] = str(threads)
    return told
