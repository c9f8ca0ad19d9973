"""When training passes are compiled, and what happens where they cannot be.

It takes time before it makes steps faster, so hardware.compile=auto waits for the times
of the first steps.
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from rlhf_cli.config.schema.hardware import Hardware
from rlhf_cli.config.schema.keys import AUTO
from rlhf_cli.models.compiled import compile_blocks, run_plainly
from rlhf_cli.models.out_of_memory import ran_out
from rlhf_cli.ranks.world import world
from rlhf_cli.reporting.console import say

Result = TypeVar("Result")

FIRST = 4  # steps; the very first is left out of their mean, as much happens once in it
LONG = 180.0  # seconds that the steps that are left must take


class Compiling:
    """Compiles the blocks of networks, at once, after the first steps, or never.

    compiled: whether they are, or will be at the next pass.
    """

    def __init__(self, networks: Mapping[str, nn.Module], hardware: Hardware) -> None:
        """Networks that an earlier optimizer has compiled run plainly at first: a run that goes on
        finds them so.
        """
        self._networks = list(networks.values())
        for network in self._networks:
            run_plainly(network)
        on_gpu = any(each.is_cuda for one in self._networks for each in one.parameters())
        self._waits = hardware.compile == AUTO and on_gpu
        self._seen, self._seconds = 0, list[float]()
        self.compiled = False
        self._failed = False  # since `gave_up` was asked
        if hardware.compile is True:
            self._compile()

    def _compile(self) -> None:
        self._waits = False
        self.compiled = sum(map(compile_blocks, self._networks)) > 0

    def after_step(self, seconds: float, left: int) -> None:
        """Compile if the first steps show that it pays.

        Args:
            seconds: that a step took.
            left: steps.
        """
        if not self._waits:
            return
        self._seen += 1
        self._seconds += [world().from_main(seconds)] if self._seen > 1 else []
        if self._seen < FIRST or not self._seconds:
            return
        self._waits = False
        expected = left * sum(self._seconds) / len(self._seconds)
        if expected > LONG:
            self._compile()
        if self.compiled:
            say(
                f"{left} steps would take {expected / 60:.0f} minutes: training passes are "
                "compiled, and the next step is slow (hardware.compile=auto)"
            )

    def guarded(self, work: Callable[[], Result], again: Callable[[], object]) -> Result | None:
        """What `work` gives, without compiled passes where they cannot be made.

        None where the weights are sharded, and so other ranks wait within the work.

        Args:
            again: what to do before `work` is done once more.
        """
        try:
            return work()
        except TorchDynamoException as error:
            if not self.compiled or ran_out(error):
                raise
            why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        self._run_plainly()
        self._failed = True
        say(f"note: training passes cannot be compiled here, and run as they are ({why})")
        if world().mesh is not None:
            return None
        again()
        return work()

    def gave_up(self) -> bool:
        """Whether passes could not be compiled on some rank, so that none has them compiled now."""
        gave_up = world().any(self._failed)
        self._failed = False
        if gave_up and self.compiled:
            self._run_plainly()
        return gave_up

    def _run_plainly(self) -> None:
        for network in self._networks:
            run_plainly(network)
        torch._dynamo.reset()
        self.compiled = False

    def state(self) -> dict[str, int]:
        """What goes into a resume point."""
        return {"compiled": int(self.compiled), "steps_timed": self._seen}

    def load(self, state: Mapping[str, int]) -> None:
        """Go on from what `state` returned, or an older resume point, which has none of it."""
        self._seen = state.get("steps_timed", 0)
        if self._waits and state.get("compiled"):
            self._compile()
        self._waits = self._waits and self._seen < FIRST
