"""Runs side by side: the settings that differ, and the metrics that they ended with."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.stages import STAGES
from rlhf_cli.folders.manifest import MANIFEST, Manifest, read_manifest
from rlhf_cli.runs.config_diff import as_named_now, flatten
from rlhf_cli.runs.lineage import KINDS, config_of_run, read_node, runs_in
from rlhf_cli.runs.out_files import is_claimed

PLACES = ("out", "overwrite", "reference_cache", "tracker")  # keys that say where, not what
STDERR, ENDS = "_stderr", ("_low", "_high")  # what follows the name of a figure
CONTENT = "content of "
LOG = "metrics.jsonl"


class Figure(NamedTuple):
    """A number, and its standard error where it is known."""

    value: float
    stderr: float | None = None


@dataclass
class Compared:
    """A run among others.

    name: what tells its folder from those of the others.
    state: in words, as `ls runs` has it.
    settings: by key; what it was made from and with, too, where that differs under the same name.
    figures: by name, those that the stage is judged by first; of a run that has not ended, the
        newest ones.
    """

    folder: Path
    name: str
    stage: str | None
    state: str
    settings: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)


def compared(places: Sequence[Path]) -> list[Compared]:
    """The runs that places name: each itself, or those in and below it, as of a sweep.

    Raises:
        UserError: a place holds none, or there is only one.
    """
    folders = list(dict.fromkeys(run for place in places for run in _runs_of(place)))
    if len(folders) == 1:  # a sweep of a stage that has run alone, too
        folders += [run for run in _below(folders[0]) if run != folders[0]]
    if len(folders) < 2:
        raise UserError(
            f"compare: {places[0]} is one run; name another beside it, or the folder of a sweep"
        )
    return [read_run(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]


def differing(runs: Sequence[Compared]) -> list[str]:
    """The settings in which runs differ, in the order of the schema.

    A key is compared among the runs that have it; a content where its path is one and the same.
    """
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    found = [
        key
        for key in keys
        if len({repr(run.settings[key]) for run in runs if key in run.settings}) > 1
    ]
    return [
        key
        for key in found
        if not key.startswith(CONTENT) or key.removeprefix(CONTENT).partition("[")[0] not in found
    ]


def figure_names(runs: Sequence[Compared]) -> list[str]:
    """The names of all figures, those that some run is judged by first."""
    return list(dict.fromkeys(name for run in runs for name in run.figures))


def judged_by(runs: Sequence[Compared]) -> list[str]:
    """The names of the figures that their stages are judged by; the first one where none is."""
    headline = {name for run in runs for name in _headline(run.stage)}
    names = figure_names(runs)
    return [name for name in names if name in headline] or names[:1]


def names_of(folders: Sequence[Path]) -> list[str]:
    """What tells folders apart: their paths without what all have in common."""
    whole = [os.path.abspath(folder) for folder in folders]
    common = os.path.commonpath(whole)
    return [os.path.relpath(each, common) for each in whole]


# --------------------------------------------------------------------------- one run


def _runs_of(place: Path) -> list[Path]:
    if (place / MANIFEST).is_file() or is_claimed(place):
        return [place]
    if not place.is_dir():
        raise UserError(f"compare: no folder {place}")
    found = _below(place)
    if not found:
        raise UserError(f"compare: no runs in {place}; see rlhf-cli ls runs")
    return found


def _below(place: Path) -> list[Path]:
    return sorted(run for run in runs_in([place]) if is_claimed(run))


def read_run(folder: Path, name: str) -> Compared:
    """A run as it stands beside others."""
    node = read_node(folder, lambda kind, path: None)
    said: Manifest = {}
    with suppress(UserError, OSError):  # damaged, as its state says
        said = read_manifest(folder) or {}
    settings = {
        key: value
        for key, value in as_named_now(flatten(config_of_run(folder))).items()
        if key.partition(".")[0] not in PLACES
    }
    figures = dict(_figures(said)) if said.get("complete") else _newest(folder)
    first = [each for each in _headline(node.stage) if each in figures]
    return Compared(
        folder,
        name,
        node.stage,
        node.state,
        {"stage": node.stage, "algo": node.made_with, **settings, **dict(_made_from(said))},
        {each: figures[each] for each in [*first, *figures]},
    )


def _headline(stage: str | None) -> tuple[str, ...]:
    return STAGES[stage].headline if stage in STAGES else ()


def _made_from(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What a run was made from and with, beyond its config: contents by hash, and versions."""
    for kind in KINDS:
        for role, entry in (manifest.get(kind) or {}).items():
            yield f"{CONTENT}{role}", str(entry.get("hash"))
    for package, version in (manifest.get("versions") or {}).items():
        yield f"version of {package}", str(version)


def _figures(manifest: Manifest) -> Iterator[tuple[str, Figure]]:
    """The final metrics of a finished run, and its working time in seconds."""
    metrics = manifest.get("metrics")
    if not isinstance(metrics, dict):
        metrics = {}
    if isinstance(metrics.get("policies"), dict):
        yield from _judged(metrics, manifest)
    else:
        yield from _with_errors(metrics)
    if isinstance(seconds := manifest.get("seconds"), int | float):
        yield "seconds", Figure(float(seconds))


def _judged(metrics: dict[str, Any], manifest: Manifest) -> Iterator[tuple[str, Figure]]:
    """Those of an evaluation: of the judged policy under their own names, of others as `X of Y`."""
    with suppress(TypeError, AttributeError, KeyError):
        judged = str(Path(manifest["parents"]["policy"]["path"]))
        policies = metrics["policies"]
        for path, figures in sorted(policies.items(), key=lambda each: each[0] != judged):
            end = "" if path == judged else f" of {Path(path).name}"
            for name, figure in _with_errors(figures):
                if name != "seconds":  # that it was trained
                    yield f"{name}{end}", figure
        for path, wins in metrics.get("win_rates", {}).items():
            for name, figure in _with_errors(wins):
                yield f"{name} against {Path(path).name}", figure


def _with_errors(metrics: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Each number with its error, which stands beside it or in it."""
    for name, value in metrics.items():
        if isinstance(value, dict) and isinstance(value.get("mean"), int | float):
            yield name, Figure(value["mean"], _number(value.get("stderr")))
        elif _number(value) is not None and not _is_error(name, metrics):
            yield name, Figure(value, _number(metrics.get(f"{name}{STDERR}")))


def _is_error(name: str, metrics: dict[str, Any]) -> bool:
    """Whether a number is the error of another one."""
    return name.endswith(STDERR) and name.removesuffix(STDERR) in metrics


def _newest(folder: Path) -> dict[str, Figure]:
    """The last value of each metric that a run has logged so far."""
    last: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        for line in (folder / LOG).read_text(encoding="utf-8").splitlines():
            last |= json.loads(line)
    return {name: figure for name, figure in _with_errors(last) if not name.startswith("seconds/")}


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
