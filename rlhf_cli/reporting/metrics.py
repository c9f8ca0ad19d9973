"""metrics.jsonl and samples.jsonl: a line a step, in the order of the steps."""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_cli.ranks.agreement import by_main
from rlhf_cli.ranks.world import world


class JsonLines:
    """An append-only file of objects, each with its `step`; of several ranks rank 0 writes it."""

    def __init__(
        self, file: Path, size: int = 0, before_write: Callable[[], None] = lambda: None
    ) -> None:
        """The first `size` bytes stay, of the steps that a resumed run does not do again.

        Args:
            before_write: raises where the file is no longer this run's to write.
        """
        self.file = file
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
        """All lines so far."""
        return by_main(
            lambda: [
                json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()
            ]
        )

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append {"step": step, **values}."""
        self.append({"step": step, **values})

    def append(self, row: dict[str, Any], digits: int | None = 6) -> None:
        """Append a row, of whose floats so many digits are kept; None keeps them all."""
        if not self._writes:
            return
        line = (json.dumps(round_figures(row, digits), default=str) + "\n").encode()
        self._before_write()
        with self.file.open("ab") as stream:
            stream.write(line)
        self._size += len(line)
        self._digest.update(line)

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
