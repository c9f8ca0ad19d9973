"""Which of several processes this one is, as the environment says it.

torchrun and our own agent say RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
MASTER_PORT; what srun says becomes the same. This module is read before torch is imported.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

from rlhf_cli.config.errors import UserError
from rlhf_cli.ranks.world import world

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

PORTS = 20000, 40000  # a job of SLURM gets one of them by its number


class Place(NamedTuple):
    """Where a process stands among all of a run, and among those of its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """That of this process; None where it is the only one.

    Raises:
        UserError: the environment says what cannot be.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    local_rank = _number(environment, "LOCAL_RANK", rank)
    local_size = _number(environment, "LOCAL_WORLD_SIZE", size)
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise UserError(
            f"RANK={rank} of WORLD_SIZE={size}, LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE="
            f"{local_size} cannot be; torchrun sets them, and else they are to be unset"
        )
    return Place(rank, size, local_rank, local_size)


def is_first() -> bool:
    """Whether this process is rank 0 or alone; it need not have met the others."""
    own = place()
    return world().is_main if own is None else own.rank == 0


def has_keeper(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the process that started this one keeps it: an elastic agent, ours or torchrun's."""
    return "TORCHELASTIC_RUN_ID" in environment


def map_scheduler(environment: MutableMapping[str, str] = os.environ) -> None:
    """Say as torchrun does what srun says to each of several tasks; what is said already stays.

    The batch script itself and a step of one task are no ranks.
    """
    if "RANK" in environment or "SLURM_STEP_ID" not in environment:
        return
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    if not tasks.isdecimal() or int(tasks) < 2:
        return
    node = int(environment.get("SLURM_NODEID", "0"))
    spread = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE"))
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    lowest, highest = PORTS
    job = 100 * int(environment.get("SLURM_JOB_ID", "0"))  # steps beside each other differ
    step = environment["SLURM_STEP_ID"]
    port = lowest + (job + (int(step) if step.isdecimal() else 0)) % (highest - lowest)
    told = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(tasks_of(node, spread)) if spread else tasks,
        "MASTER_ADDR": first_host(nodes) or "localhost",
        "MASTER_PORT": str(port),
    }
    for name, value in told.items():
        environment.setdefault(name, value)


def tasks_of(node: int, spread: str) -> int:
    """The tasks of a node, counted from 0, as SLURM writes those of all: 4(x2),3."""
    counts: list[int] = []
    for part in spread.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[min(node, len(counts) - 1)]


def first_host(nodes: str) -> str:
    """The first of a list of SLURM's: gpu[003-006,9],login is gpu003."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).partition(",")[0]


def _number(environment: Mapping[str, str], name: str, other: int | None = None) -> int:
    text = environment.get(name)
    if text is None and other is not None:
        return other
    try:
        return int(text or "")
    except ValueError:
        raise UserError(f"{name}={text} is no number; torchrun sets it, or unset it") from None
