"""The elastic agent of torch, as one command needs it: it starts workers and waits for them.

What is not torch's own way: signals are passed on, and all ranks may finish the step and save; why
a run ended is taken from what ranks say themselves; and only what may go better is started again.
"""

import logging
import os
import signal
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from rlhf_cli.config.errors import EXIT_TRY_AGAIN
from rlhf_cli.ranks.causes import Cause, cause_of, first_cause
from rlhf_cli.reporting.console import say
from rlhf_cli.runs import interrupts
from rlhf_cli.runs.out_files import what_is_kept

LOOKS = 0.2  # seconds between two looks at the workers
HERE = "localhost"  # names of machines need not resolve


class _Agent(LocalElasticAgent):
    """cause: why the workers ended that were started last; None while none has failed."""

    cause: Cause | None = None
    out: Path

    def pass_on(self, number: int) -> None:
        """Send a signal to each worker."""
        pids = self._pcontext.pids() if self._pcontext is not None else {}
        for pid in pids.values():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, object]:
        started = super()._start_workers(worker_group)
        if interrupts.asked() is not None:  # while there was none to hear it
            self.pass_on(signal.SIGTERM)
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if interrupts.asked() is not None and self._any_is_left():
            return RunResult(state=WorkerState.HEALTHY)  # torch would kill after half a minute
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            causes = [
                cause_of(rank, each.exitcode, each.error_file_data, each.timestamp)
                for rank, each in result.failures.items()
            ]
            self.cause = first_cause(causes, interrupts.asked() is not None)
            if interrupts.asked() is not None or not self.cause.again:
                self._remaining_restarts = 0
            elif self._remaining_restarts:
                self._tell_restart()
        return result

    def _any_is_left(self) -> bool:
        started = self._pcontext
        assert isinstance(started, SubprocessContext)
        return any(each.proc.poll() is None for each in started.subprocess_handlers.values())

    def _tell_restart(self) -> None:
        assert self.cause is not None
        kept = what_is_kept(self.out)
        most = self._worker_group.spec.max_restarts
        number = most - self._remaining_restarts + 1
        say(
            f"{self.cause.line}; all ranks are started again ({number} of {most}), "
            + (f"from {kept}" if kept else "from the start")
        )


def run_workers(
    command: Sequence[str], processes: int, restarts: int, out: Path, folder: Path
) -> Cause | None:
    """Start a command as so many ranks of this machine, and wait for all of them.

    Args:
        restarts: how often they are started again where one died.
        out: where the run keeps its resume points.
        folder: for what ranks say of their end.

    Returns:
        Why they ended, in a line; None where all is well.
    """
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are ours
    rendezvous = RendezvousParameters(
        "c10d", f"{HERE}:0", uuid.uuid4().hex, 1, 1, local_addr=HERE, is_host=True
    )
    spec = WorkerSpec(
        role="rank",
        local_world_size=processes,
        entrypoint=command[0],
        # torch puts the rank in the place of ${local_rank}
        args=tuple(word.replace("$", "$$") for word in command[1:]),
        rdzv_handler=get_rendezvous_handler(rendezvous),
        max_restarts=restarts,
        monitor_interval=LOOKS,
        local_addr=HERE,
    )
    agent = _Agent(spec, DefaultLogsSpecs(log_dir=str(folder)))
    agent.out = out
    interrupts.pass_on(agent.pass_on)
    try:
        result = agent.run()
    except SignalException as error:
        return Cause(0, 128 + error.sigval, f"ended by {error.sigval.name}", time.time())
    finally:
        interrupts.pass_on(None)
    cause, asked = agent.cause, interrupts.asked()
    if not result.is_failed() or cause is None:
        return None
    if asked is not None and cause.echo:  # it came before a rank could hear of it
        line = f"interrupted by {asked}; run the same command again"
        return Cause(0, EXIT_TRY_AGAIN, line, cause.at)
    return cause
