"""metrics.jsonl and samples.jsonl: a line a step, in the order of the steps."""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.ranks.agreement import check_alike, together
from rlhf_cli.ranks.world import world

TOKENS, TOKEN_VALUES = "tokens", ("logprobs", "kls", "advantages", "rewards")
"""In a line of samples.jsonl the texts of a response's tokens, and lists of values, one of each."""

Listener = Callable[[str, dict[str, Any]], None]
"""Is told the name of a file and the row that was appended to it."""

NOTHING = "not a number: there was nothing to take it from"
UNDEFINED = {
    "stderr": "all rows have one prompt, so nothing tells how it varies",
    "length_correlation": "scores or lengths do not vary",
    "longer_chosen": "all pairs are of equal length",
    "longer_preferred": "all pairs are of equal length",
    "auc": "all labels are alike",
    "r2": "the targets do not vary",
    "correlation": "scores or targets do not vary",
    "text_loss": "no plain text is held out",
    "demonstration_loss": "no demonstration is held out",
    "gain_over_reference": "no prompt has scores of both",
    "reward": "no response got a score",
    "gold": "no response got a score",
    "seconds": "another tool made it, or it does not say",
}
"""Why a figure may not be a number, by the end of its name."""


class JsonLines:
    """An append-only file of objects, each with its `step`; of several ranks rank 0 writes it."""

    def __init__(
        self,
        file: Path,
        size: int = 0,
        before_write: Callable[[], None] = lambda: None,
        alike: bool = False,
        agreed: bool = False,
        heard_by: Sequence[Listener] = (),
    ) -> None:
        """The first `size` bytes stay, of the steps that a resumed run does not do again.

        Args:
            before_write: raises where the file is no longer this run's to write.
            alike: whether what `write` gets must be the same on all ranks.
            agreed: whether all ranks come to each row, so that a disk which fills ends all alike.
            heard_by: who is told of each row that is appended, on rank 0.
        """
        self.file, self._alike, self._agreed, self._heard_by = file, alike, agreed, heard_by
        self._writes = world().is_main
        self._before_write = before_write
        self._size, self._digest = size, hashlib.sha256()
        if not self._writes:
            return
        before_write()
        if size:
            os.truncate(file, size)
        else:
            file.write_bytes(b"")
        self._digest.update(file.read_bytes())

    def rows(self) -> list[dict[str, Any]]:
        """All lines so far; for rank 0, which has them."""
        return [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append {"step": step, **values}.

        Raises:
            RunError: the numbers of a rank are others, where all must be alike.
        """
        if self._alike:
            check_alike(step, values)
        self.append({"step": step, **values})

    def append(self, row: dict[str, Any], digits: int | None = 6) -> None:
        """Append a row, of whose floats so many digits are kept; None keeps them all."""
        if self._agreed:
            together(lambda: self._append(row, digits))
        else:
            self._append(row, digits)

    def _append(self, row: dict[str, Any], digits: int | None) -> None:
        if not self._writes:
            return
        line = (json.dumps(round_figures(row, digits), default=str) + "\n").encode()
        self._before_write()
        with self.file.open("ab") as stream:
            stream.write(line)
        self._size += len(line)
        self._digest.update(line)
        for hear in self._heard_by:
            hear(self.file.name, row)

    def described(self) -> dict[str, int | str]:
        """Size and SHA-256 of all lines so far, which are on disk then; of use to rank 0."""
        if self._writes:
            with self.file.open("rb") as stream:
                os.fsync(stream.fileno())
        return {"size": self._size, "sha256": self._digest.hexdigest()}


class Clock:
    """Wall time of the parts of an iteration, as `seconds/PART` in metrics.jsonl."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def lap(self, part: str) -> None:
        """Say what the time since the last lap was spent on."""
        now = time.monotonic()
        name = f"seconds/{part}"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def defined(figures: Mapping[str, Any], within: str = "") -> tuple[dict[str, Any], dict[str, str]]:
    """Figures without those that are no finite number, and by name why each of those is none.

    Args:
        within: what leads to the names of figures inside others, as `policies/runs/demo/ppo/`.
    """
    known: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            known[name], inside = defined(value, f"{within}{name}/")
            reasons |= inside
        elif value is None or (isinstance(value, float) and not math.isfinite(value)):
            infinite = isinstance(value, float) and math.isinf(value)
            reasons[within + name] = "infinite" if infinite else _why(name)
        else:
            known[name] = value
    return known, reasons


def _why(name: str) -> str:
    last = name.rpartition("/")[2]
    return next((why for end, why in UNDEFINED.items() if last.endswith(end)), NOTHING)


def round_figures(value: Any, digits: int | None = 6) -> Any:
    """Floats to so many significant digits, inside lists and dicts too; all else as it is.

    What is not finite becomes None: JSON has no word for it.

    Args:
        digits: None keeps them all.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {name: round_figures(entry, digits) for name, entry in value.items()}
    if isinstance(value, list):
        return [round_figures(entry, digits) for entry in value]
    return value
