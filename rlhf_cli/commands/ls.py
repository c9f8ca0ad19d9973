"""`rlhf-cli ls`: what is shipped, which stages an option belongs to, and what runs were made."""

import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.commands.help import columns, shown
from rlhf_cli.config import catalog
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.hints import nearest
from rlhf_cli.config.stages import STAGES
from rlhf_cli.reporting.terminal import obeyed, on_one_line

if TYPE_CHECKING:
    from rlhf_cli.runs.lineage import Node

USAGE = """\
rlhf-cli ls: what there is to choose from, and what was made.

Usage: rlhf-cli ls [GROUP]
       rlhf-cli ls runs [--json] [FOLDER ...]

  GROUP   algo, model, data, hardware: its options, their stages and what sets them apart; recipes
  runs    what was made from what: a tree of the runs in and below FOLDER (runs), with state, time,
          end, main metric and seed, and notes on sources that have changed or are gone
  --json  the same for programs: a list of runs, each with the folder that it hangs under"""
RUNS = "runs"  # the folder that stages write to by default, and the word for what is in it
RECIPES = "recipes"
NAMES = (*catalog.GROUPS, RECIPES, RUNS)
COLUMNS = ("run", "stage", "algo", "state", "time", "ended", "metric", "seed")
MIN_NOTES = 24  # characters
UNBOUNDED = 100_000  # characters: elsewhere than in a terminal no line is cut

Branch = tuple[str, str, "Node"]  # what leads to its line, and to the lines below it


def run(words: list[str]) -> None:
    """Print the groups, or the options of one group, or the recipes, or the tree of runs, or help.

    Raises:
        UserError: no such group, or no such folder of runs.
    """
    if {"--help", "-h"} & set(words):
        print(USAGE)
        return
    if words[:1] == [RUNS]:
        folders = [word for word in words[1:] if word != "--json"]
        _show_runs(folders or [RUNS], as_json="--json" in words)
        return
    if len(words) > 1 or (words and words[0] not in NAMES):
        hint = nearest(words[0], NAMES)
        raise UserError(f"unknown group {' '.join(words)}{hint or ';'} ls takes {', '.join(NAMES)}")
    recipes = sorted(file.name for file in catalog.shipped(RECIPES).glob("*.sh"))
    if not words:
        dirs = catalog.config_dirs()
        rows = [(group, " ".join(catalog.options(group, dirs))) for group in catalog.GROUPS]
        print(columns([*rows, (RECIPES, " ".join(recipes))]))
    elif words[0] == RECIPES:
        print("\n".join(f"  {name}" for name in recipes))
    else:
        print(columns([_row(words[0], option) for option in _options(words[0])]))


def _options(group: str) -> list[str]:
    return catalog.options(group, catalog.config_dirs())


def _row(group: str, option: str) -> tuple[str, str, str]:
    """An option, its stages, and what sets it apart from the option that it builds on.

    Of `data` the rows that it reads, of `model` a family: the first line of its file says it.
    """
    dirs = catalog.config_dirs()
    stages = catalog.stages_of(group, option, dirs)
    file = catalog.option_file(group, option, dirs)
    assert file is not None
    defaults, own = catalog.read(file)
    bases = [str(base) for base in defaults if base != "_self_"]
    changes = ", ".join(f"{key}={shown(value)}" for key, value in own.items())
    about = " with ".join([" + ".join(bases), *([changes] if changes else [])]) if bases else ""
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    if group in ("data", "model") and first.startswith("# "):  # what no value says
        about = first.removeprefix("# ")
    return option, "all stages" if len(stages) == len(STAGES) else " ".join(stages), about


# --------------------------------------------------------------------------- runs


def _show_runs(words: list[str], as_json: bool) -> None:
    """What was made from what, in and below these folders."""
    for word in words:
        if word.startswith("-"):
            raise UserError(f"ls runs: unknown flag {word}; see rlhf-cli ls --help")
        if not Path(word).is_dir():
            raise UserError(f"ls runs: no folder {word}; give the folders that hold your runs")
    from rlhf_cli.runs.lineage import trees

    runs = trees([Path(word) for word in words])
    if as_json:
        print(json.dumps(list(_as_json(runs)), indent=2))
        return
    if not runs:
        print(f"no runs in {', '.join(words)}", file=sys.stderr)
        return
    _print_trees(runs)


def _as_json(nodes: Sequence["Node"], under: str | None = None) -> Iterator[dict[str, object]]:
    """Every run for programs, those that were made from it after it; null is what is not known."""
    for node in nodes:
        ended = node.ended and datetime.fromtimestamp(node.ended, UTC)
        yield {
            "folder": str(node.folder),
            "under": under,
            "stage": node.stage,
            "algo": node.made_with,
            "state": node.state,
            "seed": node.seed,
            "seconds": node.seconds,
            "ended": ended.isoformat(timespec="seconds") if ended else None,
            "metrics": node.figures,
            "sources": [
                {"kind": each.kind, "role": each.role, "path": each.path, "fault": each.fault}
                for each in node.sources
            ],
        }
        yield from _as_json(node.children, str(node.folder))


def _print_trees(nodes: Sequence["Node"]) -> None:
    """A table, or two lines for each run where the terminal is too narrow for one."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=obeyed(sys.stdout), highlight=False)
    if not console.is_terminal:
        console.width = UNBOUNDED
    grid = Table(box=None, padding=(0, 2, 0, 0))
    for name in COLUMNS:
        grid.add_column(name, no_wrap=True, justify="right" if name == "time" else "left")
    grid.add_column("notes", min_width=MIN_NOTES)
    rows = list(_branches(nodes))
    for guide, _, node in rows:
        run = Text.assemble((guide, "dim"), on_one_line(str(node.folder)))
        cells = [Text(cell or "-") for cell in _cells(node)]
        grid.add_row(run, *cells, Text("; ".join(_notes(node))))
    unbounded = console.options.update(max_width=UNBOUNDED)
    if console.measure(grid, options=unbounded).minimum <= console.width:
        with console.capture() as capture:
            console.print(grid)
        lines = (line.rstrip() for line in capture.get().splitlines())
        print("\n".join(lines), file=obeyed(sys.stdout))
        return
    for guide, below, node in rows:
        print(guide + on_one_line(str(node.folder)))
        *said, seed = _cells(node)
        line = ", ".join(cell for cell in [*said, seed and f"seed {seed}"] if cell)
        text = "; ".join([line, *_notes(node)])
        for line in textwrap.wrap(text, max(console.width - len(below), MIN_NOTES)):
            print(below + line)


def _branches(nodes: Sequence["Node"], guide: str | None = None) -> Iterator[Branch]:
    """Every node under those that it was made from, with the lines that lead to it."""
    fork, end, line = _guides()
    for node in nodes:
        last = node is nodes[-1]
        ours, below = ("", "") if guide is None else (guide + fork, guide + line)
        if guide is not None and last:
            ours, below = guide + end, guide + "   "
        yield ours, below + (line if node.children else "   "), node
        yield from _branches(node.children, below)


def _guides() -> tuple[str, str, str]:
    """What leads to a run with others after it, to the last one, and past a run."""
    drawn = ("├─ ", "└─ ", "│  ")
    try:
        "".join(drawn).encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "|- ", "`- ", "|  "
    return drawn


def _cells(node: "Node") -> tuple[str, ...]:
    """What is said of a run in columns, beside its folder; nothing where it is not known."""
    ended = datetime.fromtimestamp(node.ended) if node.ended is not None else None
    cells = (
        node.stage or "",
        node.made_with or "",
        node.state,
        "" if node.seconds is None else _duration(node.seconds),
        f"{ended:%Y-%m-%d %H:%M}" if ended else "",
        ", ".join(f"{name} {value:.4g}" for name, value in node.figures.items()),
        "" if node.seed is None else str(node.seed),
    )
    return tuple(map(on_one_line, cells))  # what stage.json and config.yaml say


def _notes(node: "Node") -> list[str]:
    """What is wrong with the sources of a run, and what else it was made from."""
    from rlhf_cli.runs.lineage import PARENTS

    faults = [f"{each.role} {each.path} {each.fault}" for each in node.sources if each.fault]
    models = [source for source in node.sources if source.kind == PARENTS]
    under = node.under or node.main
    # a policy among its own baselines says nothing
    others = [source for source in models if under is None or source.place != under.place]
    notes = [*faults, *(f"{each.role}: {each.path}" for each in others)]
    return [on_one_line(note) for note in notes]


def _duration(seconds: float) -> str:
    """8.2 s, 14 min, 3 h 05 min."""
    if seconds < 99.5:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
