"""Responses from slots: begun as slots are free, looked at every few steps, taken as they end."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from rlhf_cli.models.out_of_memory import SPARE, if_it_fits, oom_error, ran_out
from rlhf_cli.models.row_attention import laid_out
from rlhf_cli.reporting.console import say
from rlhf_cli.rollout.decode import Completion, evaluation_mode, no_logits
from rlhf_cli.rollout.graphs import StepGraphs, addresses
from rlhf_cli.rollout.prompt_slots import PromptTable
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.rollout.slots import SlotTable

EVERY = 16  # steps between two looks at a GPU, which waits for the host meanwhile
LEAST = 8  # slots on a GPU, where a step in fewer is no faster
BEGUN = 8  # prompts are read when one slot in so many is free: all others wait for them
SIZES = [part * 2**power // 2 for power in range(6, 26) for part in (2, 3)]  # of slots on a GPU
SPREAD = 2  # the shortest response of a run may need a slot so much shorter than the longest


@dataclass
class Job:
    """A response that is to be drawn.

    prompt: its ids, the same object for all responses to it.
    noise: gives the (max_tokens,) uniform numbers that decide its draws.
    """

    prompt: list[int]
    noise: Callable[[], Tensor]


@dataclass
class Ends:
    """What ends a response before its length does.

    ids: each of them does, as its last token.
    strings: each of them does, where it comes up in the text.
    text_of: ids to text.
    """

    ids: Sequence[int]
    strings: Sequence[str]
    text_of: Callable[[list[int]], str]


@dataclass(frozen=True)
class Room:
    """How many slots are used at once, how many are made where they are kept, and their tokens."""

    slots: int
    rounded: int
    capacity: int


class SlotRun:
    """Jobs in the slots of a table."""

    def __init__(
        self,
        model: nn.Module,
        table: SlotTable,
        slots: int,
        ends: Ends,
        step: Callable[[int], None],
        every: int,
    ) -> None:
        """The first so many slots of a table, none of them in use.

        Args:
            step: a step of the first so many of them.
            every: steps between two looks at what they have drawn.
        """
        self._model, self._table, self._ends = model, table, ends
        self._step, self._every = step, every
        self._held: list[int | None] = [None] * slots  # the job of each slot
        self._told = [0] * slots  # tokens of each that stop strings were looked for in
        self._reach = [0] * slots  # tokens that each may hold by now
        self._on_gpu = table.device.type == "cuda"

    def completions(self, jobs: Sequence[Job]) -> Iterator[list[tuple[int, Completion]]]:
        """All responses with the places of their jobs, as they end."""
        waiting = deque(range(len(jobs)))
        while waiting or any(job is not None for job in self._held):
            free = [slot for slot, job in enumerate(self._held) if job is None]
            if waiting and len(free) * BEGUN >= len(self._held):
                self._begin(jobs, [(slot, waiting.popleft()) for slot in free[: len(waiting)]])
            if not waiting:
                self._close_up()
            yield self._until_some_end()

    def _begin(self, jobs: Sequence[Job], pairs: list[tuple[int, int]]) -> None:
        slots = [slot for slot, _ in pairs]
        begun = [jobs[place] for _, place in pairs]
        noise = torch.stack([job.noise() for job in begun])
        self._table.start(slots, [job.prompt for job in begun], noise)
        for slot, place in pairs:
            self._held[slot], self._told[slot] = place, 0
            self._reach[slot] = len(jobs[place].prompt) - 1

    def _close_up(self) -> None:
        """What is left goes to the first slots, where the others need not take part any more."""
        used = [slot for slot, job in enumerate(self._held) if job is not None]
        rows = self._rows(len(used))
        beyond = [slot for slot in used if slot >= rows]
        if not beyond:
            return
        free = [slot for slot in range(rows) if self._held[slot] is None][: len(beyond)]
        self._table.move(beyond, free)
        for source, target in zip(beyond, free, strict=True):
            self._held[target], self._held[source] = self._held[source], None
            self._told[target], self._reach[target] = self._told[source], self._reach[source]

    def _rows(self, count: int) -> int:
        """How many slots take part in a step for so many; a graph is kept for few numbers only."""
        return min(_rounded(max(count, LEAST)), self._table.slots) if self._on_gpu else count

    def _until_some_end(self) -> list[tuple[int, Completion]]:
        """Steps of all slots in use, until some have ended."""
        used = [slot for slot, job in enumerate(self._held) if job is not None]
        rows = self._rows(used[-1] + 1)
        with laid_out(self._model, self._table.layout(rows)):
            while True:
                for _ in range(self._every):
                    for slot in used:
                        self._reach[slot] += 1
                    self._table.reach(max(self._reach[slot] for slot in used))
                    self._step(rows)
                if ended := self._look(used):
                    return ended

    def _look(self, used: list[int]) -> list[tuple[int, Completion]]:
        """The responses of slots that have ended, which are free now."""
        table = self._table
        at = torch.tensor(used, device=table.device)
        report = torch.stack([table.drawn[at], table.ended[at], table.bad[at]]).tolist()
        if any(report[2]):
            raise no_logits(self._model)
        drawn = dict(zip(used, report[0], strict=True))
        over = {slot for slot, ended in zip(used, report[1], strict=True) if ended}
        told = used if self._ends.strings else [slot for slot in used if slot in over]
        if not told:
            return []
        at = torch.tensor(told, device=table.device)
        ids = dict(zip(told, table.tokens[at].tolist(), strict=True))
        logprobs = dict(zip(told, table.logprobs[at].tolist(), strict=True))
        found, stopped = [], []
        for slot in told:
            response = ids[slot][: drawn[slot]]
            end = self._stop_in(slot, response)
            if end is None and slot not in over:
                continue
            if end is not None:
                reason = "stop"
                stopped.append(slot)
            else:
                reason = "eos" if response[-1] in self._ends.ids else "length"
            place = self._held[slot]
            assert place is not None
            found.append(
                (place, Completion(response[:end], logprobs[slot][: drawn[slot]][:end], reason))
            )
            self._held[slot] = None
        if stopped:
            table.ended[torch.tensor(stopped, device=table.device)] = True
        return found

    def _stop_in(self, slot: int, response: list[int]) -> int | None:
        """How many tokens there are when the first stop string is in the text; None without one."""
        if not self._ends.strings:
            return None
        for end in range(self._told[slot] + 1, len(response) + 1):
            if response[end - 1] in self._ends.ids:
                break  # an end of its own comes first
            text = self._ends.text_of(response[:end])
            if any(string in text for string in self._ends.strings):
                return end
        self._told[slot] = len(response)
        return None


class SlotSampler:
    """Draws jobs in slots, as many as memory holds.

    On a GPU slots and the graphs of their steps are kept for the next time, until they are in the
    way of other work.
    """

    def __init__(self, stop_ids: Sequence[int], text_of: Callable[[list[int]], str]) -> None:
        """Nothing is kept yet."""
        self._stop_ids, self._text_of = stop_ids, text_of
        self._kept: _Kept | None = None
        self._keeps = True
        self._graphs = True  # until one fails
        SPARE.add(self)

    def release(self) -> bool:
        """Keep nothing from now on; whether anything was."""
        kept, self._kept = self._kept, None
        self._keeps = False
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
            run = [place for place in left if needs[place] * SPREAD > longest]
            capacity = longest
            if next(model.parameters()).is_cuda:  # few sizes, so that few graphs are made
                capacity = min(size for size in SIZES if size >= longest)
            limit = max(1, min(most, budget // capacity))
            slots = min(limit, len(run))
            room = Room(slots, min(_rounded(slots), limit), capacity)
            done: set[int] = set()
            for found in self._run(model, [jobs[place] for place in run], sampling, room):
                if found is None:
                    if slots == 1:
                        raise oom_error("sampling", 1, longest)
                    most = slots // 2
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
            own = PromptTable(model, sampling, self._stop_ids, room.slots, room.capacity)
            return SlotRun(model, own, room.slots, ends, own.step, every=1)
        kept, self._kept = self._kept, None
        key = (*addresses(model), str(sampling), room.capacity)
        if kept is None or kept.key != key or kept.table.slots < room.slots:
            del kept  # before others are made
            table = SlotTable(model, sampling, self._stop_ids, room.rounded, room.capacity)
            kept = _Kept(key, table, StepGraphs(table))
        kept.table.ended.fill_(True)
        if self._keeps:
            self._kept = kept
        return SlotRun(model, kept.table, room.slots, ends, partial(self._step, kept), EVERY)

    def _step(self, kept: "_Kept", rows: int) -> None:
        """A step by its graph; plainly where graphs have failed, which is said once."""
        if self._graphs:
            try:
                kept.graphs.step(rows)
                return
            except Exception as error:
                if ran_out(error):
                    raise
                self._graphs = False
                said = (str(error).strip().splitlines() or [type(error).__name__])[0]
                say(f"sampling goes on without CUDA graphs, more slowly: {said}")
        kept.table.step(rows)


def _rounded(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


@dataclass
class _Kept:
    """Slots, and the graphs of their steps, which hold good for what the key tells."""

    key: tuple[object, ...]
    table: SlotTable
    graphs: StepGraphs
