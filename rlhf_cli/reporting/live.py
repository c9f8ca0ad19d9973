"""What a live view shows of a run: how far it is and what it takes, the course of three figures,
and a response beside the first one to the same prompt.

Lines of a given width, drawn from what is heard of the run: by the run itself (console.py), and by
`rlhf-cli watch`, which reads the same in its folder.
"""

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from rlhf_cli.config.secrets import redacted
from rlhf_cli.reporting.grid import GAP, show, with_error, wrapped
from rlhf_cli.reporting.terminal import on_one_line, printable

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"

MATTER: dict[str, tuple[str, ...]] = {
    "sft": ("eval/loss", "loss", "eval/reward", "grad_norm/policy"),
    "reward": ("eval/accuracy", "eval/loss", "loss", "grad_norm/reward"),
    "dpo": ("eval/rewards/accuracy", "eval/loss", "loss", "rewards/margin"),
    "ppo": ("reward", "eval/gold", "kl", "entropy", "length"),
    "grpo": ("reward", "eval/gold", "kl", "entropy", "length"),
}
"""The metrics of each stage that are shown, as far as a run has them: the first three."""

SHOWN = 3  # metrics
MOST_POINTS = 512  # of a course that are kept; of longer ones each is a mean
MOST_FIRSTS = 2000  # prompts whose first response is kept
MOST_TEXT = 2000  # characters that are kept of a text
WIDEST_COURSE, LEAST_COURSE = 48, 4  # columns
WIDEST_BAR, LEAST_BAR = 32, 6  # columns
BESIDE = 100  # columns from which on two responses stand side by side
MOST_LINES = 6  # of a text
FEWEST_ROWS = 5  # of a terminal: below it only bars are shown

BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=*#"


@dataclass
class Progress:
    """How far an activity is.

    total: may be a guess.
    before: how much of `done` was there when it began, and took none of its `seconds`.
    """

    activity: str
    total: int
    done: int = 0
    before: int = 0
    seconds: float = 0.0
    note: str = ""

    def rate(self) -> str:
        """3.1/s, or 2.4 s each; nothing while there is none yet."""
        rate = (self.done - self.before) / max(self.seconds, 1e-9)
        if rate <= 0:  # of a batch that takes long
            return ""
        return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"

    def left(self) -> float | None:
        """Seconds that are left at this rate; None while there is none yet."""
        if self.done <= self.before:
            return None
        return self.seconds / (self.done - self.before) * max(self.total - self.done, 0)


class Series:
    """The course of a figure in bounded memory.

    first, last: its values; stderr: the standard error of the last one, where it has one.
    """

    def __init__(self) -> None:
        self.first: float | None = None
        self.last = math.nan
        self.stderr: float | None = None
        self._means: list[float] = []
        self._rest: list[float] = []  # of the mean that is not full yet
        self._each = 1  # values of a mean

    def add(self, value: float, stderr: float | None) -> None:
        """One more value."""
        self.first = value if self.first is None else self.first
        self.last, self.stderr = value, stderr
        self._rest.append(value)
        if len(self._rest) == self._each:
            self._means.append(_mean(self._rest))
            self._rest = []
        if len(self._means) == 2 * MOST_POINTS:
            self._means = _means(self._means, MOST_POINTS)
            self._each *= 2

    def points(self, most: int) -> list[float]:
        """Its values, or means of as many neighbours as leave at most so many points."""
        points = [*self._means, *([_mean(self._rest)] if self._rest else [])]
        return points if len(points) <= most else _means(points, most)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _means(values: Sequence[float], count: int) -> list[float]:
    """Means of `count` runs of neighbours of nearly the same length."""
    ends = [round(i * len(values) / count) for i in range(count + 1)]
    return [_mean(values[ends[i] : ends[i + 1]]) for i in range(count)]


def sparkline(points: Sequence[float], plain: bool = False) -> str:
    """A block for each point, from the lowest to the highest of them."""
    blocks = PLAIN_BLOCKS if plain else BLOCKS
    low, high = min(points), max(points)
    if high == low:
        return blocks[0] * len(points)
    scale = (len(blocks) - 1) / (high - low)
    return "".join(blocks[round((point - low) * scale)] for point in points)


class Sample(NamedTuple):
    """A response of samples.jsonl."""

    step: int
    prompt: str
    response: str
    reward: float | None

    def head(self) -> str:
        """Of which step it is, and its reward."""
        reward = "" if self.reward is None else f", reward {show(self.reward)}"
        return f"step {self.step}{reward}"


class Course:
    """What is heard of a run: the lines of its logs, one after the other.

    Drawn by another thread than hears them.
    """

    def __init__(self, stage: str) -> None:
        self._names = MATTER.get(stage, ())
        self._series: dict[str, Series] = {}
        self._firsts: dict[str, Sample] = {}
        self._newest: Sample | None = None
        self._alarms: list[str] = []
        self._peak: float | None = None
        self._guard = threading.Lock()

    def hear(self, file: str, row: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl or samples.jsonl; what lacks its `step` says nothing."""
        if not isinstance(row.get("step"), int):
            return
        with self._guard:
            if file == METRICS:
                self._hear_figures(row)
            elif file == SAMPLES:
                self._hear_sample(row)

    def _hear_figures(self, row: Mapping[str, Any]) -> None:
        for name in self._names:
            if (value := finite(row.get(name))) is not None:
                series = self._series.setdefault(name, Series())
                series.add(value, finite(row.get(f"{name}_stderr")))
        self._alarms = [name for name, value in row.items() if name[:6] == "alarm/" and value == 1]
        peak = finite(row.get("peak_memory"))
        self._peak = self._peak if peak is None else peak

    def _hear_sample(self, row: Mapping[str, Any]) -> None:
        """The newest is the first one of its step, of the prompts that had a response before."""
        prompt, response = _text(row.get("prompt")), _text(row.get("response"))
        sample = Sample(row["step"], prompt, response, finite(row.get("reward")))
        newest = self._newest
        again = self._had_before(sample)
        if newest is None or newest.step != sample.step or (again and not self._had_before(newest)):
            self._newest = sample
        if len(self._firsts) < MOST_FIRSTS:
            self._firsts.setdefault(prompt, sample)

    def _had_before(self, sample: Sample) -> bool:
        first = self._firsts.get(sample.prompt)
        return first is not None and first.step < sample.step

    def figures(self) -> list[tuple[str, Series]]:
        """The figures that matter, as far as the run has them."""
        with self._guard:
            return [(n, self._series[n]) for n in self._names if n in self._series][:SHOWN]

    def alarms(self) -> list[str]:
        """Limits that the last step broke."""
        with self._guard:
            return list(self._alarms)

    def peak_memory(self) -> float | None:
        """GiB that the run has held at once, as its last step knew; None before the first one."""
        with self._guard:
            return self._peak

    def samples(self) -> list[Sample]:
        """The newest response, after the first one to its prompt where that is another."""
        with self._guard:
            if self._newest is None:
                return []
            first = self._firsts.get(self._newest.prompt)
            earlier = first is not None and first.step < self._newest.step
            return [first, self._newest] if first is not None and earlier else [self._newest]


def finite(value: object) -> float | None:
    """A figure as a number; None where it is none, or not finite."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_one and math.isfinite(value) else None  # type: ignore[arg-type]


def _text(value: object) -> str:
    """The end of a text, or of the last message of a dialogue, fit to be seen."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    text = value if isinstance(value, str) else "" if value is None else str(value)
    return text if len(text) <= MOST_TEXT else "..." + text[-MOST_TEXT:]


# --------------------------------------------------------------------------- lines


@dataclass
class View:
    """What is to be drawn.

    title: the run, and which job of a sweep it is; notes: lines under it.
    bars: the activities that are under way, the outermost first.
    """

    title: str = ""
    notes: list[str] = field(default_factory=list)
    bars: Sequence[Progress] = ()
    course: Course | None = None


def drawn(view: View, width: int, height: int, plain: bool = False) -> list[Text]:
    """The lines of a view, at most `height`, none wider than `width`: what is last goes first.

    Args:
        plain: without characters that ASCII lacks.
    """
    course = view.course
    told = course is not None and bool(course.figures())
    peak = None if course is None else course.peak_memory()
    bars = [
        bar_line(bar, width, plain, note=not told, peak=None if i else peak)
        for i, bar in enumerate(view.bars)
    ]
    for bar in bars:  # even a count may not fit
        bar.truncate(width, overflow="crop" if plain else "ellipsis")
    if height < FEWEST_ROWS:
        return bars[:height]
    title = fit(view.title, width) if view.title else []
    lines = [Text(part, style="bold") for part in title]
    lines += [Text(part, style="yellow") for note in view.notes for part in fit(note, width)]
    lines += bars
    if course is not None:
        lines += figure_lines(course, width, plain)
        lines += sample_lines(course.samples(), width, height - len(lines), plain)
    return lines[:height]


def fit(text: str, width: int) -> list[str]:
    """A text of others in lines, fit to be seen."""
    return wrapped(printable(redacted(text)), width)


def clipped(text: str, width: int, plain: bool = False) -> str:
    """A text of others on one line; where it does not fit its end is left out, with a mark."""
    text = on_one_line(redacted(text))
    mark = "..." if plain else "…"
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - len(mark)).rstrip() + mark if width >= len(mark) else ""


def clock(seconds: float) -> str:
    """0:09, 12:34, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def bar_line(bar: Progress, width: int, plain: bool, note: bool, peak: float | None = None) -> Text:
    """An activity; on a narrow terminal its memory goes first, then its time so far, rate and bar.

    Args:
        peak: GiB that the run has held at once, where the line is to say it.
    """
    share = min(bar.done / bar.total, 1.0) if bar.total > 0 else 0.0
    name, count = on_one_line(redacted(bar.activity)), f"{bar.done}/{bar.total}"
    left = bar.left()
    parts = {  # by what goes last; the bar is as long as there is room
        "left": "" if left is None else f"{clock(left)} left",
        "bar": "━" * LEAST_BAR,
        "rate": bar.rate(),
        "seconds": clock(bar.seconds),
        "peak": "" if peak is None else f"peak {peak:.2f} GiB",
    }
    kept: dict[str, str] = {}
    room = width - cell_len(name) - len(GAP) - len(count)
    for key, part in parts.items():
        if not part or len(GAP) + len(part) > room:
            continue
        kept[key] = part
        room -= len(GAP) + len(part)
    line = Text(clipped(name, max(width - len(count) - len(GAP), 0), plain))
    if "bar" in kept:
        more = min(room, WIDEST_BAR - LEAST_BAR)
        room -= more
        full = round(share * (LEAST_BAR + more))
        line.append(GAP + ("#" if plain else "━") * full, style="green")
        line.append(("." if plain else "─") * (LEAST_BAR + more - full), style="dim")
    line.append(GAP + count)
    for key in ("rate", "seconds", "left", "peak"):
        line.append(f"{GAP}{kept[key]}" if key in kept else "")
    if note and bar.note and room > len(GAP) + LEAST_BAR:
        line.append(GAP + clipped(bar.note, room - len(GAP), plain))
    return line


def figure_lines(course: Course, width: int, plain: bool = False) -> list[Text]:
    """The course of each figure that matters, and the alarms of the last step."""
    arrow = "->" if plain else "→"
    figures = [
        (
            name,
            series,
            f"{show(series.first)} {arrow} {with_error(series.last, series.stderr)}",
        )
        for name, series in course.figures()
    ]
    label = max((len(name) for name, _, _ in figures), default=0)
    values = max((len(text) for _, _, text in figures), default=0)
    room = min(width - label - values - 2 * len(GAP), WIDEST_COURSE)
    lines = []
    for name, series, text in figures:
        line = Text(f"{name:<{label}}{GAP}")
        if room >= LEAST_COURSE:
            points = series.points(room)
            line.append(f"{sparkline(points, plain):<{room}}{GAP}", style="cyan")
        line.append(text)
        line.truncate(width)
        line.rstrip()
        lines.append(line)
    if alarms := course.alarms():
        lines.append(Text(clipped(", ".join(alarms), width, plain), style="bold red"))
    return lines


def sample_lines(
    samples: Sequence[Sample], width: int, room: int, plain: bool = False
) -> list[Text]:
    """A prompt and its responses in at most `room` lines; nothing where they would not fit.

    Args:
        samples: the first and the newest response to a prompt, or one.
    """
    if not samples or room < 1 + 2 * len(samples):
        return []
    prompt = samples[0].prompt
    lines = [Text(clipped(f"prompt: {prompt}", width, plain), style="dim")]
    beside = len(samples) > 1 and width >= BESIDE
    each = (width - 2 * len(GAP)) // 2 if beside else width
    most = min(MOST_LINES, (room - 1 if beside else (room - 1) // len(samples)) - 1)
    blocks = []
    for sample in samples:
        parts = fit(sample.response, each)
        if len(parts) > most:
            parts = [*parts[: most - 1], clipped(" ".join(parts[most - 1 :]), each, plain)]
        blocks.append([sample.head(), *parts])
    if not beside:
        for head, *parts in blocks:
            lines += [Text(clipped(head, width), style="bold"), *map(Text, parts)]
        return lines
    first, newest = blocks
    for i in range(max(map(len, blocks))):
        style = "" if i else "bold"
        left = first[i] if i < len(first) else ""
        line = Text(left + " " * (each + 2 * len(GAP) - cell_len(left)), style=style)
        line.append(newest[i] if i < len(newest) else "")
        line.rstrip()
        lines.append(line)
    return lines
