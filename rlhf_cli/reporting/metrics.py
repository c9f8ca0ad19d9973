"""metrics.jsonl and samples.jsonl: a line a step, in the order of the steps."""

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class JsonLines:
    """An append-only file of objects, each with its `step`."""

    def __init__(self, file: Path, resume_from: int = 0) -> None:
        """Lines of steps after `resume_from` are dropped: the resumed run writes them again."""
        kept = []
        if resume_from and file.is_file():
            kept = list(_up_to(resume_from, file.read_text(encoding="utf-8").splitlines()))
        part = file.with_name(file.name + ".part")
        part.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        part.replace(file)
        self._file = file

    def rows(self) -> list[dict[str, Any]]:
        """All lines so far."""
        return [json.loads(line) for line in self._file.read_text(encoding="utf-8").splitlines()]

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append {"step": step, **values}."""
        self.append({"step": step, **values})

    def append(self, row: dict[str, Any]) -> None:
        """Append a row; floats keep six digits."""
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(round_figures(row)) + "\n")

    def flush(self) -> None:
        """Wait until all lines are on disk."""
        with self._file.open("rb") as stream:
            os.fsync(stream.fileno())


def _up_to(step: int, lines: list[str]) -> Iterator[str]:
    """The lines up to a step; a run that was killed may have left its last one unfinished."""
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            return
        if row["step"] <= step:
            yield line


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


def round_figures(value: Any) -> Any:
    """Floats to six significant digits, inside lists and dicts too; all else as it is.

    What is not finite becomes None: JSON has no word for it.
    """
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: round_figures(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [round_figures(entry) for entry in value]
    return value
