"""The end of a run as Markdown, for the page of a CI job that names a file for it.

GitHub shows what a step appends to the file in GITHUB_STEP_SUMMARY; others have taken that over.
"""

import os
import re
from collections.abc import Sequence
from contextlib import suppress

from rlhf_cli.config.schema.stages import Run
from rlhf_cli.config.secrets import redacted
from rlhf_cli.config.stages import stage_name
from rlhf_cli.reporting.grid import show, with_error
from rlhf_cli.reporting.live import METRICS, Course, finite, sparkline
from rlhf_cli.reporting.terminal import on_one_line
from rlhf_cli.runs.summary import NUMBERS, Metrics, Rows

VARIABLE = "GITHUB_STEP_SUMMARY"
JUDGED = ("gold", "reward", "kl")  # estimates of a policy; the KL last
POINTS = 24  # of a course
MARKUP = re.compile(r"([\\`*_\[\]<>#|~])")


def append_summary(cfg: Run, lines: Sequence[str], metrics: Metrics, rows: Rows) -> None:
    """Append how a run went; where that cannot be written, the run has ended well all the same.

    Args:
        lines: that the run ends with.
        metrics: of what was written.
        rows: of its log, oldest first.
    """
    if not (file := os.environ.get(VARIABLE)):
        return
    text = markdown(cfg, lines, metrics, rows)
    with suppress(OSError), open(file, "a", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(text)


def markdown(cfg: Run, lines: Sequence[str], metrics: Metrics, rows: Rows) -> str:
    """A heading, the lines, and a table of the figures that the stage is known by."""
    stage = stage_name(cfg)
    heads, body = _policies(metrics) if "policies" in metrics else _figures(stage, metrics, rows)
    table = [heads, ["---"] * len(heads), *body] if body else []
    return "\n".join(
        [
            *("", f"### {escaped(f'{stage}: {cfg.out}')}", ""),
            *(line for each in lines for line in (escaped(each), "")),
            *(f"| {' | '.join(row)} |" for row in table),
            "",
        ]
    )


def _figures(stage: str, metrics: Metrics, rows: Rows) -> tuple[list[str], list[list[str]]]:
    """What a stage wrote, and how the metrics that matter got there."""
    course = Course(stage)
    for row in rows:
        course.hear(METRICS, row)
    courses = dict(course.figures())
    names = [name for name in NUMBERS[stage] if finite(metrics.get(name)) is not None]
    body = []
    for name in dict.fromkeys([*courses, *names]):
        series, value = courses.get(name), finite(metrics.get(name))
        last = "" if value is None else with_error(value, metrics.get(f"{name}_stderr"))
        went = (show(series.first), sparkline(series.points(POINTS))) if series else ("", "")
        body.append([escaped(name), *went, last])
    return ["metric", "first", "course", "written"], body


def _policies(metrics: Metrics) -> tuple[list[str], list[list[str]]]:
    """The policies of an evaluation, with their estimates."""
    body = []
    for path, figures in metrics["policies"].items():
        cells = [_estimate(figures.get(name)) for name in JUDGED]
        if not figures.get("kl") and (bound := _estimate(figures.get("kl_bound"))):
            cells[-1] = f"at most {bound}"  # of the best of several
        rating = finite(metrics.get("ratings", {}).get(path, {}).get("rating"))
        body.append([escaped(path), *cells, "" if rating is None else f"{rating:.0f}"])
    return ["policy", *JUDGED, "rating"], body


def _estimate(figure: Metrics | None) -> str:
    return with_error(figure["mean"], figure.get("stderr")) if figure else ""


def escaped(text: str) -> str:
    """A text of others as Markdown shows it, on one line: nothing in it is markup."""
    return MARKUP.sub(r"\\\1", on_one_line(redacted(text)))
