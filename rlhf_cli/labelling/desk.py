"""Where one annotator sits: the turns that are theirs, and what they have answered, on disk.

Every answer is an event that is appended and flushed to disk before the next task is shown; to undo
is an event, too. Where a task stands is found by reading the events again, so that a process that
was killed loses what was not yet answered, and nothing else.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rlhf_cli
from rlhf_cli.config.schema.stages import LabelConfig
from rlhf_cli.data.order import derived_seed
from rlhf_cli.folders.files import flush
from rlhf_cli.folders.journal import Journal
from rlhf_cli.folders.manifest import EVENTS, text_hash
from rlhf_cli.labelling.answers import Answer, fault_of
from rlhf_cli.labelling.tasks import Turn, dealt, read_tasks
from rlhf_cli.runs.lock import check_lock

UNDO = "undo"
Event = dict[str, Any]
"""An answer with task, showing, annotator, source, shown (the order), note, seconds, started,
saved, instructions and version; or an undo with task and showing. What a review puts in the place
of an answer has `reviewed`, and in `supersedes` when that was saved.
"""


def events_file(folder: Path, who: str) -> Path:
    """The file of an annotator's events."""
    return folder / EVENTS.format(who)


@dataclass(frozen=True)
class Terms:
    """Under what is labelled: it stands in each event.

    source: who labels, as the key `source` has it.
    instructions: the hash of their text; None without one.
    """

    protocol: str
    source: str
    instructions: str | None


class Desk:
    """The turns of one annotator."""

    def __init__(
        self,
        folder: Path,
        who: str,
        turns: Sequence[Turn],
        terms: Terms,
        before_write: Callable[[], None] = lambda: None,
    ) -> None:
        """With what its annotator has answered before.

        Args:
            before_write: raises where the folder is no longer this run's to write.
        """
        self.who, self.turns, self.terms = who, turns, terms
        self._journal = Journal(events_file(folder, who), before_write)
        self._places = {(turn.task.id, turn.showing): i for i, turn in enumerate(turns)}
        self._answers: dict[int, Event] = {}  # by the place of the turn, in the order of answering
        self._own: dict[int, Event] = {}  # the same, without what a review put in their place
        for block in self._journal.blocks():
            for event in block:
                self._replay(event)

    def _replay(self, event: Event) -> None:
        place = self._places.get((event.get("task", ""), event.get("showing", 0)))
        if place is None:
            return
        self._answers.pop(place, None)
        task = self.turns[place].task
        if event.get("kind") != UNDO and fault_of(event, self.terms.protocol, task) is None:
            self._answers[place] = event
        if not event.get("reviewed"):
            self._own.pop(place, None)
            if place in self._answers:
                self._own[place] = event

    @property
    def own(self) -> list[tuple[Turn, Event]]:
        """What the annotator answered, whatever a review put in its place."""
        return [(self.turns[place], self._own[place]) for place in sorted(self._own)]

    @property
    def answered(self) -> list[tuple[Turn, Event]]:
        """What was answered, in the order of the turns."""
        return [(self.turns[place], self._answers[place]) for place in sorted(self._answers)]

    @property
    def left(self) -> int:
        """How many turns are to be answered."""
        return len(self.turns) - len(self._answers)

    @property
    def current(self) -> Turn | None:
        """The first turn that has no answer; None where all have one."""
        place = next((i for i in range(len(self.turns)) if i not in self._answers), None)
        return None if place is None else self.turns[place]

    def answer(self, turn: Turn, answer: Answer, note: str = "", seconds: float = 0.0) -> None:
        """Keep an answer; one that was given before is replaced.

        Args:
            seconds: that the turn was before the annotator's eyes.
        """
        now = time.time()
        event = {
            **self._about(turn),
            **answer,
            "source": self.terms.source,
            "shown": turn.order,
            **({"note": note} if note else {}),
            "seconds": round(seconds, 2),
            "started": _utc(now - seconds),
            "saved": _utc(now),
            "instructions": self.terms.instructions,
            "version": rlhf_cli.__version__,
        }
        self._write(event)

    def review(self, turn: Turn, answer: Answer) -> None:
        """Put another answer in the place of the annotator's, which stays in the file."""
        before = self._answers[self._places[turn.task.id, turn.showing]]
        event = {
            **{name: before[name] for name in ("task", "showing", "annotator", "source", "shown")},
            **answer,
            "reviewed": True,
            "supersedes": before["saved"],
            "saved": _utc(time.time()),
            "instructions": self.terms.instructions,
            "version": rlhf_cli.__version__,
        }
        self._write(event)

    def undo(self) -> Turn | None:
        """Take the newest answer back; returns its turn, None where nothing is answered."""
        if not self._answers:
            return None
        turn = self.turns[next(reversed(self._answers))]
        self._write({**self._about(turn), "kind": UNDO, "saved": _utc(time.time())})
        return turn

    def _about(self, turn: Turn) -> Event:
        return {"task": turn.task.id, "showing": turn.showing, "annotator": self.who}

    def _write(self, event: Event) -> None:
        self._journal.append([event])
        flush(self._journal.file)
        self._replay(event)


def desks_of(cfg: LabelConfig) -> dict[str, Desk]:
    """The desk of each annotator, with what was answered before."""
    out = Path(cfg.out)
    seed = derived_seed(cfg.seed, "deal")
    repeat = 0.0 if cfg.source == "judge" else cfg.algo.repeat  # a judge would say the same again
    turns = dealt(read_tasks(out), cfg.annotators, cfg.algo.overlap, repeat, seed)
    told = instructions_of(cfg)
    terms = Terms(cfg.algo.protocol, cfg.source, None if told is None else text_hash(told)[:16])
    return {who: Desk(out, who, own, terms, lambda: check_lock(out)) for who, own in turns.items()}


def instructions_of(cfg: LabelConfig) -> str | None:
    """The text that annotators judge by."""
    return None if cfg.instructions is None else Path(cfg.instructions).read_text(encoding="utf-8")


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
