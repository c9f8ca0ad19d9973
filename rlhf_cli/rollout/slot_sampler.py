"""Draws in slots as many as memory holds, which a GPU keeps with the graphs of their steps."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from rlhf_cli.models.decoder import matmul_in_float32
from rlhf_cli.models.out_of_memory import SPARE, if_it_fits, oom_error, ran_out
from rlhf_cli.reporting.console import say
from rlhf_cli.rollout.decode import Completion, evaluation_mode
from rlhf_cli.rollout.graphs import StepGraphs, addresses
from rlhf_cli.rollout.pieces import Pieces
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.rollout.slot_probe import table_for
from rlhf_cli.rollout.slot_run import Ends, Job, SlotRun, rounded
from rlhf_cli.rollout.slots import SlotTable

EVERY = 16  # steps of a GPU between two looks at what was drawn
SIZES = [part * 2**power // 2 for power in range(6, 26) for part in (2, 3)]  # of slots on a GPU
SPREAD = 2  # the shortest response of a run may need a slot so much shorter than the longest
PATIENCE = 3  # times that slots are kept although they were in the way


def size_of(tokens: int) -> int:
    """Tokens of a GPU's slots that are to hold so many: one of few sizes, so of few graphs."""
    return min(size for size in SIZES if size >= tokens)


@dataclass(frozen=True)
class Room:
    """How many slots are used at once, how many are made where they are kept, and their tokens."""

    slots: int
    rounded: int
    capacity: int


class SlotSampler:
    """Draws jobs in slots, as many as memory holds.

    On a GPU slots and the graphs of their steps are kept for the next time, until they are in the
    way of other work.
    """

    def __init__(
        self,
        stop_ids: Sequence[int],
        text_of: Callable[[list[int]], str],
        compiles: bool = False,
    ) -> None:
        """Nothing is kept yet.

        Args:
            text_of: ids to text, for stop strings.
            compiles: whether pieces of a GPU's steps are, in products of 16 bits.
        """
        self._stop_ids, self._text_of = stop_ids, text_of
        self._kept: _Kept | None = None
        self._released = 0  # times that other work needed the memory
        self._graphs = True  # until one fails
        self._compiles = compiles
        SPARE.add(self)

    def release(self) -> bool:
        """Let go of what is kept, and in the end keep nothing; whether anything was."""
        kept, self._kept = self._kept, None
        self._released += kept is not None
        return kept is not None

    def draw(
        self, model: nn.Module, jobs: Sequence[Job], sampling: Sampling, budget: int
    ) -> Iterator[list[tuple[int, Completion]]]:
        """All responses with the places of their jobs, as they end.

        Args:
            budget: tokens that all slots may hold together, but for a single one.

        Raises:
            RunError: memory is too small for one slot, or logits are not finite.
        """
        needs = [len(job.prompt) + sampling.max_tokens for job in jobs]
        left = sorted(range(len(jobs)), key=lambda place: needs[place], reverse=True)
        most = budget  # slots that are tried
        while left:
            longest = needs[left[0]]
            on_gpu = next(model.parameters()).is_cuda
            capacity = size_of(longest) if on_gpu else longest
            limit = max(1, min(most, budget // capacity))
            run = left
            if not on_gpu or len(left) > limit:  # on a GPU long slots take room and no time
                run = [place for place in left if needs[place] * SPREAD > longest]
            slots = min(limit, len(run))
            room = Room(slots, min(rounded(slots), limit), capacity)
            done: set[int] = set()
            for found in self._run(model, [jobs[place] for place in run], sampling, room):
                if found is None:
                    if slots > 1:
                        most = slots // 2
                    elif not self._without_graphs(model, "there is no memory for them"):
                        raise oom_error("sampling", 1, longest)
                    break
                made = [(run[place], completion) for place, completion in found]
                done |= {place for place, _ in made}
                yield made
            left = [place for place in left if place not in done]

    def _run(
        self, model: nn.Module, jobs: Sequence[Job], sampling: Sampling, room: Room
    ) -> Iterator[list[tuple[int, Completion]] | None]:
        """The responses to some jobs as they end; None and no more where memory ran out."""
        stream: Iterator[list[tuple[int, Completion]]] | None = None

        def following() -> list[tuple[int, Completion]]:
            nonlocal stream
            stream = stream or self._begun(model, sampling, room).completions(jobs)
            return next(stream, [])

        while True:
            with evaluation_mode(model), torch.no_grad():
                found = if_it_fits(following)
            if found == []:
                return
            yield found
            if found is None:
                return

    def _begun(self, model: nn.Module, sampling: Sampling, room: Room) -> SlotRun:
        """Slots that are free: those that are kept, where they will do."""
        ends = Ends(self._stop_ids, sampling.stop, self._text_of)
        if not next(model.parameters()).is_cuda:
            size = room.slots, room.capacity
            table = table_for(model)(model, sampling, self._stop_ids, *size)
            return SlotRun(model, table, room.slots, ends, table.step, every=1)
        kept, self._kept = self._kept, None
        compiles = self._compiles and not matmul_in_float32(model)
        key = (*addresses(model), str(sampling), room.capacity, compiles)
        if kept is None or kept.key != key or kept.table.slots < room.slots:
            del kept  # before others are made
            table = SlotTable(model, sampling, self._stop_ids, room.rounded, room.capacity)
            kept = _Kept(key, table, StepGraphs(table, Pieces(model) if compiles else None))
        kept.table.ended.fill_(True)
        if self._released < PATIENCE:
            self._kept = kept
        step = partial(self._step, model, kept)
        return SlotRun(model, kept.table, room.slots, ends, step, EVERY, room.rounded)

    def _step(self, model: nn.Module, kept: "_Kept", rows: int) -> None:
        """A step by its graph, of compiled pieces; without what fails, which is said once."""
        while self._graphs:
            try:
                kept.graphs.step(rows)
                return
            except Exception as error:
                if ran_out(error):
                    raise
                said = (str(error).strip().splitlines() or [type(error).__name__])[0]
                if kept.graphs.pieces is None:
                    self._without_graphs(model, said)
                    break
                self._compiles = False
                kept.graphs = StepGraphs(kept.table, None)
                say(f"note: sampling is not compiled, but goes on as it was: {said}")
        kept.table.step(rows)

    def _without_graphs(self, model: nn.Module, why: str) -> bool:
        """Make none any more; whether any were made before."""
        if not self._graphs or not next(model.parameters()).is_cuda:
            return False
        self._graphs = False
        say(f"note: sampling goes on without CUDA graphs, more slowly: {why}")
        return True


@dataclass
class _Kept:
    """Slots, and the graphs of their steps, which hold good for what the key tells."""

    key: tuple[object, ...]
    table: SlotTable
    graphs: StepGraphs
