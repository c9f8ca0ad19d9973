"""The device that a process computes on, and its threads."""

import os

import torch

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.stages import DEMO_SIZE
from rlhf_cli.models.repeatable import ask_for_repeatable_sums
from rlhf_cli.ranks.environment import place


def device_of(name: str) -> torch.device:
    """The device that hardware.device names, which then sums in the same order each time."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cuda":
        return torch.device(name)
    ask_for_repeatable_sums()
    if (here := place()) is None:
        return torch.device(name)
    count = torch.cuda.device_count()
    if 1 < count <= here.local_rank:
        raise UserError(
            f"{here.local_size} processes were started on this machine, and torch finds {count} "
            "GPUs there: start one for each"
        )
    # a scheduler may show each rank its own device only
    device = torch.device(name, here.local_rank if count > 1 else 0)
    torch.cuda.set_device(device)
    return device


def set_threads(threads: int | None, parameters: float) -> None:
    """Take so many CPU threads; None leaves them to torch, but for models as small as the demo's.

    What those compute is done sooner than a second thread has woken up. OMP_NUM_THREADS holds.
    """
    if threads is None and parameters <= DEMO_SIZE and "OMP_NUM_THREADS" not in os.environ:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)
