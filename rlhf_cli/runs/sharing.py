"""How many ranks share a run, and what devices there are: told without torch."""

import ctypes
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.config.schema.keys import AUTO
from rlhf_cli.ranks.environment import place
from rlhf_cli.ranks.world import world

DEVICES = "nvidia[0-9]*"  # in /dev, one for each GPU


@dataclass(frozen=True)
class Ranks:
    """The processes that share a run: all of them, and those of one machine."""

    size: int = 1
    local: int = 1

    def parts(self, shard: str) -> int:
        """Into how many parts weights are cut, of which each rank holds one."""
        return {"none": 1, "hybrid": self.local, "full": self.size}[shard]

    def share(self, items: int) -> int:
        """The most that one of them has of some items."""
        return math.ceil(items / self.size)

    def __str__(self) -> str:
        machines = math.ceil(self.size / self.local)
        place = "this machine" if machines == 1 else f"{machines} machines, {self.local} each"
        return f"{self.size} on {place}"


ALONE = Ranks()


def ranks_of(cfg: Any) -> Ranks:
    """Those that have met, that the environment says, or that the command will start."""
    if world().size > 1:
        return Ranks(world().size, world().local_size)
    if (here := place()) is not None:
        return Ranks(here.size, here.local_size)
    wanted = cfg.hardware.processes
    if wanted == AUTO:
        wanted = 1 if cfg.hardware.device == "cpu" else max(1, gpus())
    return Ranks(wanted, wanted)


def expects_gpu(cfg: Any) -> bool:
    """Whether a run will find a GPU."""
    device: str = cfg.hardware.device
    return device == "cuda" or (device == AUTO and any(Path("/dev").glob(DEVICES)))


def gpus() -> int:
    """The GPUs that this process may use."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        return len(list(Path("/dev").glob(DEVICES)))
    named = [each.strip() for each in shown.split(",")]
    return next((i for i, name in enumerate(named) if name in ("", "-1")), len(named))


def gpu_memory() -> int | None:
    """Bytes of the first GPU, as its driver says; None where there is no driver to ask."""

    class Memory(ctypes.Structure):
        _fields_ = (
            ("total", ctypes.c_ulonglong),
            ("free", ctypes.c_ulonglong),
            ("used", ctypes.c_ulonglong),
        )

    with suppress(OSError, AttributeError):
        driver = ctypes.CDLL("libnvidia-ml.so.1")
        if driver.nvmlInit_v2() != 0:
            return None
        device, memory = ctypes.c_void_p(), Memory()
        found = (
            driver.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)) == 0
            and driver.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) == 0
        )
        driver.nvmlShutdown()
        return int(memory.total) if found else None
    return None


def host_memory() -> int | None:
    """Bytes of this machine that are free; None where it does not say."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 2**10
    return None
