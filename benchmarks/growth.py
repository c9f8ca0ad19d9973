"""How time and memory of our jobs grow with the work, as a table and pictures.

    python benchmarks/growth.py [AXIS ...] [--folder DIR] [--repeat N] [key=value ...]

Each point is a process of its own (benchmarks/speed_jobs.py); axes: tokens of a step, length of
responses, group size, vocabulary, rows of the data. Points are taken in turns, `--repeat` times,
and a point is the median. On a CPU the time is the processor's, which other work on the machine
changes least. The pictures go into benchmarks/growth/. Other words are overrides.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speed import HERE, Line, jobs_of, measured, run
from speed_inputs import SHAPES, Shape, prepare, rows_of, write

from rlhf_cli.reporting.plots import Curve, curves_picture

PICTURES = HERE / "growth"
LIMIT = 600.0  # seconds of a point


@dataclass(frozen=True)
class Axis:
    """What grows, in which job, and what should come of it."""

    job: str
    label: str
    points: tuple[int, ...]
    changes: Callable[[int], dict[str, Any]]
    time: str = "step"  # or start: of the process to the first step


AXES = {
    "tokens": Axis("sft", "rows of a step", (8, 16, 32, 64), lambda n: {"batch": n}),
    "length": Axis(
        "gen", "tokens of a response", (16, 32, 64, 128), lambda n: {"sampling": (8, 4, n)}
    ),
    "group": Axis(
        "grpo", "responses of a group", (2, 4, 8, 16), lambda n: {"sampling": (4, n, 32)}
    ),
    "vocabulary": Axis("sft", "entries of the vocabulary", (2000, 8000, 32000), lambda n: {}),
    "rows": Axis("sft", "rows of the data", (1000, 4000, 16000), lambda n: {}, time="start"),
}


def folder_of(base: Path, axis: str, point: int, gpu: bool) -> Path:
    """The folder with model and rows for a point, made once."""
    shape: Shape = SHAPES["qwen2.5-0.5b" if gpu else "3m"]
    folder = base / "grown"
    if axis == "vocabulary":
        shape, folder = replace(shape, vocabulary=point), base / f"vocabulary{point}"
    prepare(folder, shape)
    if axis != "rows":
        return folder
    longer = base / f"rows{point}"
    if not longer.exists():
        longer.mkdir()
        for name in ("model", "shape.json"):
            (longer / name).symlink_to(folder / name)
        rows = rows_of(folder / "demonstrations.jsonl")
        copies = [  # numbered, so that none is a duplicate
            {**rows[i % len(rows)], "prompt": f"{i} {rows[i % len(rows)]['prompt']}"}
            for i in range(point)
        ]
        write(longer / "demonstrations.jsonl", copies)
    return longer


def points(base: Path, name: str, words: list[str], repeat: int, ceiling: Line) -> Iterator[Line]:
    """Every run of an axis."""
    axis, gpu = AXES[name], ceiling["device"] != "cpu"
    job = jobs_of(gpu)[axis.job]
    for _ in range(repeat):
        for point in axis.points:
            folder = folder_of(base, name, point, gpu)
            sized = vars(replace(job, steps=4, warm_up=1, **axis.changes(point)))
            spec = {**sized, "job": job.stage, "side": "ours", "folder": str(folder)}
            del spec["stage"]
            line = measured(run({**spec, "overrides": words}, LIMIT), ceiling)
            yield {"axis": name, "point": point, **line}


def time_of(axis: Axis, line: Line) -> float:
    """Seconds of a run that its axis shows."""
    if axis.time == "start":
        return float(line["first_step_s"])
    return float(line["step_s"] if line["device"] != "cpu" else line["processor_s"])


def summary(name: str, lines: list[Line]) -> list[tuple[int, float, float]]:
    """(point, seconds, GiB) of each point that ran."""
    axis = AXES[name]
    known = [line for line in lines if line["axis"] == name and "failed" not in line]
    each = ((n, [line for line in known if line["point"] == n]) for n in axis.points)
    return [
        (
            point,
            statistics.median(time_of(axis, line) for line in own),
            statistics.median(line["peak_gib"] for line in own),
        )
        for point, own in each
        if own
    ]


def draw(name: str, rows: list[tuple[int, float, float]], device: str) -> None:
    """Time and memory over the work; the dashed line is proportional to the work."""
    axis = AXES[name]
    works, seconds, sizes = (list(column) for column in zip(*rows, strict=True))
    steepest = [seconds[-1] * work / works[-1] for work in works]
    what = "to the first step" if axis.time == "start" else "of a step"
    kind = "processor time" if device == "cpu" and axis.time == "step" else "time"
    panels = {
        f"{kind} {what}, s": [
            Curve("measured", works, seconds),
            Curve("proportional", works, steepest, dashed=True),
        ],
        "peak memory, GiB": [Curve("measured", works, sizes)],
    }
    PICTURES.mkdir(exist_ok=True)
    across = f"{axis.label} ({axis.job})"
    curves_picture(PICTURES / f"{name}.png", "", across, panels, zero=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="AXIS_OR_OVERRIDE")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/rlhf-cli-speed"))
    parser.add_argument("--repeat", type=int, default=1, help="runs of each point")
    arguments = parser.parse_intermixed_args()
    names = [word for word in arguments.words if "=" not in word] or list(AXES)
    if unknown := set(names) - set(AXES):
        parser.error(f"no such axis: {', '.join(sorted(unknown))}")
    words = [word for word in arguments.words if "=" in word]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    ceiling = run({"side": "ceilings", "folder": str(arguments.folder)}, 120)
    if "failed" in ceiling:
        sys.exit(ceiling["failed"])
    for name in names:
        lines = []
        for line in points(arguments.folder, name, words, arguments.repeat, ceiling):
            print(json.dumps(line), flush=True)
            lines.append(line)
        rows = summary(name, lines)
        if rows:
            draw(name, rows, ceiling["device"])
        print(f"\n| {AXES[name].label} | s | peak, GiB |\n|---:|---:|---:|")
        for point, seconds, size in rows:
            print(f"| {point} | {seconds:.3f} | {size:.2f} |")
        print(flush=True)


if __name__ == "__main__":
    main()
