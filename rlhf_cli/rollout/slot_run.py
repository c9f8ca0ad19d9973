"""Responses from slots: begun as slots are free, looked at every few steps, taken as they end."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf_cli.models.row_attention import laid_out
from rlhf_cli.rollout.decode import Completion, no_logits
from rlhf_cli.rollout.slots import SlotTable

AHEAD = 2  # steps that a GPU has to do while the host looks at what was drawn before them
LEAST = 8  # slots on a GPU, where a step in fewer is no faster
IDLE = 16  # slots move together when one in so many is not in use: each that moves takes time
BEGUN = 8  # prompts are read when one slot in so many is free: all others wait for them


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
        most: int | None = None,
    ) -> None:
        """The first so many slots of a table, none of them in use.

        Args:
            step: a step of the first so many of them.
            every: steps between two looks at what they have drawn.
            most: slots that take part in a step, whatever a table has that was made for more: 16
                bits round by how many they are, and a run that goes on makes its tables anew.
        """
        self._model, self._table, self._ends = model, table, ends
        self._step, self._every = step, every
        self._held: list[int | None] = [None] * slots  # the job of each slot
        self._told = [0] * slots  # tokens of each that stop strings were looked for in
        self._reach = [0] * slots  # tokens that each may hold by now
        self._most = most or table.slots
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
        idle = self._rows(used[-1] + 1) - rows
        if not beyond or idle * IDLE < rows:
            return
        free = [slot for slot in range(rows) if self._held[slot] is None][: len(beyond)]
        self._table.move(beyond, free)
        for source, target in zip(beyond, free, strict=True):
            self._held[target], self._held[source] = self._held[source], None
            self._told[target], self._reach[target] = self._told[source], self._reach[source]

    def _rows(self, count: int) -> int:
        """How many slots take part in a step for so many; a graph is kept for few numbers only."""
        return min(rounded(max(count, LEAST)), self._most) if self._on_gpu else count

    def _until_some_end(self) -> list[tuple[int, Completion]]:
        """Steps of all slots in use, until some have ended."""
        used = [slot for slot, job in enumerate(self._held) if job is not None]
        rows = self._rows(used[-1] + 1)
        with laid_out(self._model, self._table.layout(rows)):
            while True:
                self._advance(self._every, rows, used)
                noted = self._note(used)
                if self._on_gpu:
                    self._advance(AHEAD, rows, used)
                if ended := self._look(used, noted()):
                    return ended

    def _advance(self, steps: int, rows: int, used: list[int]) -> None:
        """So many steps of the first slots."""
        for _ in range(steps):
            for slot in used:
                self._reach[slot] += 1
            self._table.reach(max(self._reach[slot] for slot in used))
            self._step(rows)

    def _note(self, used: list[int]) -> Callable[[], list[list[int]]]:
        """What waits for the present state of some slots: drawn, ended, bad of each."""
        table = self._table
        at = torch.tensor(used, device=table.device)
        report = torch.stack([table.drawn[at], table.ended[at], table.bad[at]])
        if not self._on_gpu or not report.is_cuda:
            return report.tolist
        copy, done = report.to("cpu", non_blocking=True), torch.cuda.Event()
        done.record()

        def read() -> list[list[int]]:
            done.synchronize()
            values: list[list[int]] = copy.tolist()
            return values

        return read

    def _look(self, used: list[int], report: list[list[int]]) -> list[tuple[int, Completion]]:
        """The responses of slots that had ended by a report, which are free now."""
        table = self._table
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
        told, self._told[slot] = self._told[slot], len(response)
        if self._without_stop(response):  # nor has it one a few tokens before
            return None
        for end in range(told + 1, len(response) + 1):
            if response[end - 1] in self._ends.ids:
                break  # an end of its own comes first
            if not self._without_stop(response[:end]):
                return end
        return None

    def _without_stop(self, response: list[int]) -> bool:
        strings = self._ends.strings
        if not strings:
            return True
        text = self._ends.text_of(response)
        return not any(string in text for string in strings)


def rounded(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()
