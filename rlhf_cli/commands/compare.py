"""`rlhf-cli compare RUN RUN...`: settings that differ and final metrics, side by side."""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.secrets import redacted
from rlhf_cli.config.switches import written
from rlhf_cli.reporting.terminal import on_one_line, width

if TYPE_CHECKING:
    from rlhf_cli.runs.comparison import Compared

USAGE = """\
rlhf-cli compare: runs side by side: the settings that differ, and the metrics that they ended with.

Usage: rlhf-cli compare RUN RUN ... [--csv | --json]
       rlhf-cli compare SWEEP [--csv | --json]

  RUN     the folder of a stage; of one that has not ended the newest metrics are shown
  SWEEP   a folder that holds runs, as `-m` leaves them: a line for each
  --csv   all settings that differ and all metrics with their standard errors, a line for each run
  --json  the same for programs

Errors are standard errors, as the stages measured them; metrics without one have none."""
FLAGS = ("--csv", "--json")
BESIDE = 4  # runs that stand side by side; of more, each has a line


def run(words: list[str]) -> None:
    """Print tables, CSV or JSON.

    Raises:
        UserError: a flag or folder is wrong, or there is only one run.
    """
    if {"--help", "-h"} & set(words):
        print(USAGE)
        return
    places, flag = parse(words)
    from rlhf_cli.runs.comparison import compared

    runs = compared(places)
    if flag == "--json":
        print(json.dumps([_as_json(each, runs) for each in runs], indent=2))
    elif flag == "--csv":
        _print_csv(runs)
    else:
        _print_tables(runs)


def parse(words: list[str]) -> tuple[list[Path], str | None]:
    """The folders, and the flag where there is one.

    Raises:
        UserError: there is no folder, or no such flag.
    """
    flags = [word for word in words if word.startswith("-")]
    places = [Path(word) for word in words if not word.startswith("-")]
    if wrong := [flag for flag in flags if flag not in FLAGS]:
        raise UserError(f"compare: unknown flag {wrong[0]}; see rlhf-cli compare --help")
    if len(set(flags)) > 1:
        raise UserError("compare: take one of --csv and --json")
    if not places:
        raise UserError(
            "compare takes folders of runs: rlhf-cli compare RUN RUN, or one of a sweep"
        )
    return places, flags[0] if flags else None


def _print_tables(runs: Sequence["Compared"]) -> None:
    """Few runs beside each other; of many each in a line, in a table for each stage."""
    if len(runs) <= BESIDE:
        _print_beside(runs)
        return
    for number, stage in enumerate(dict.fromkeys(run.stage for run in runs)):
        if number:
            print()
        _print_lines([run for run in runs if run.stage == stage])


def _print_beside(runs: Sequence["Compared"]) -> None:
    """Settings, then metrics, a line for each."""
    from rlhf_cli.runs.comparison import ENDS, figure_names

    names = [name for name in figure_names(runs) if not name.endswith(ENDS)]
    (_, heads), *settings = _columns(runs)
    if settings:
        print("settings that differ")
        _print_grid([("", heads), *settings], turned=True)
        print()
    print("final metrics, ± standard error" if settings else "final metrics; no setting differs")
    _print_grid([("", heads), *_figures(runs, names)], turned=True)


def _print_lines(runs: Sequence["Compared"]) -> None:
    """Runs of one stage, a line for each: what differs, and what they are judged by."""
    from rlhf_cli.runs.comparison import ENDS, figure_names, judged_by

    shown = [*judged_by(runs), "seconds"]
    left = [name for name in figure_names(runs) if not name.endswith(ENDS) and name not in shown]
    more = f"; {len(left)} more metrics: --csv" if left else ""
    print(f"{runs[0].stage}, ± standard error{more}")
    _print_grid([*_columns(runs), *_figures(runs, shown)], turned=False)


Columns = list[tuple[str, list[str]]]


def _columns(runs: Sequence["Compared"]) -> Columns:
    """The names of runs, then their states and settings where these differ."""
    from rlhf_cli.runs.comparison import differing

    states = [run.state for run in runs]
    return [
        ("run", [run.name for run in runs]),
        *([("state", states)] if len(set(states)) > 1 else []),
        *((key, [_setting(run, key) for run in runs]) for key in differing(runs)),
    ]


def _figures(runs: Sequence["Compared"], names: Sequence[str]) -> Columns:
    from rlhf_cli.reporting.grid import with_error

    return [
        (name, [with_error(*run.figures[name]) if name in run.figures else "-" for run in runs])
        for name in names
    ]


def _print_grid(columns: Columns, turned: bool) -> None:
    """Columns of a head and its cells; turned, each is a row, and the first one the head."""
    from rlhf_cli.reporting.grid import laid_out

    fit = [[on_one_line(redacted(cell)) for cell in (head, *cells)] for head, cells in columns]
    table = fit if turned else [list(row) for row in zip(*fit, strict=True)]
    print("\n".join(laid_out(table[0], table[1:], width())))


def _print_csv(runs: Sequence["Compared"]) -> None:
    from rlhf_cli.runs.comparison import STDERR, differing, figure_names

    keys, names = differing(runs), figure_names(runs)
    erring = {name for run in runs for name, each in run.figures.items() if each.stderr is not None}
    heads = [part for name in names for part in (name, *([f"{name}{STDERR}"] * (name in erring)))]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["run", "state", *map(redacted, keys), *map(redacted, heads)])
    for run in runs:
        cells: list[float | None] = []
        for name in names:
            figure = run.figures.get(name)
            cells.append(figure.value if figure else None)
            if name in erring:
                cells.append(figure.stderr if figure else None)
        said = [redacted(_setting(run, key, missing="")) for key in keys]
        writer.writerow([str(run.folder), run.state, *said, *cells])


def _as_json(run: "Compared", runs: Sequence["Compared"]) -> dict[str, Any]:
    from rlhf_cli.runs.comparison import differing

    return {
        "run": str(run.folder),
        "stage": run.stage,
        "state": run.state,
        "settings": {
            key: redacted(value) if isinstance(value := run.settings[key], str) else value
            for key in differing(runs)
            if key in run.settings
        },
        "metrics": {
            name: {"value": figure.value, "stderr": figure.stderr}
            for name, figure in run.figures.items()
        },
    }


def _setting(run: "Compared", key: str, missing: str = "-") -> str:
    return written(run.settings[key]) if key in run.settings else missing
