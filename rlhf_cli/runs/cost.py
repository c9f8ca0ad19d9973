"""What the steps of a run take: time for their tokens, and memory."""

import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from rlhf_cli.data.items import Judged, tokens_in
from rlhf_cli.ranks.world import world

STATUS = Path("/proc/self/status")


def cost_of(items: Sequence[Judged], seconds: float, device: torch.device) -> dict[str, float]:
    """What a step is logged with; every rank calls it.

    Args:
        items: all that the step learnt from, on whichever rank.
        seconds: that it took.

    Returns:
        tokens_per_second: of all sequences of the items, each with its prompt.
        peak_memory: GiB that a rank has held at once since it started, of the one with most.
    """
    peak = max(world().from_all(peak_bytes(device)))
    return {"tokens_per_second": tokens_in(items) / seconds, "peak_memory": peak / 2**30}


def peak_bytes(device: torch.device) -> int:
    """What this process has held at once: of a GPU in tensors, elsewhere all that was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # where there is no such file; a process begins with what the one that started it has had
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
