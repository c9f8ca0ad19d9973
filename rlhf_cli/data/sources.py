"""Where rows come from: the one path of `data`, or the several of data.sources."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.hints import nearest
from rlhf_cli.config.schema.data import Data
from rlhf_cli.data.files import files_of, is_local, refuse_twins, shown_path
from rlhf_cli.data.shapes.formats import FORMATS


@dataclass
class Source:
    """One place of rows, and its part in the mix.

    path: as data.path.
    shape: how its rows are stored, as data.format.
    columns: as data.columns.
    cap: the rows that are read of it, at most; null reads all.
    repeat: how often each of its rows stands in an epoch, without weights.
    weight: the share of an epoch that it has beside the weights of the others.
    """

    path: Any
    shape: str
    columns: Any = field(default_factory=dict)
    cap: int | None = None
    repeat: int = 1
    weight: float | None = None
    name: str = ""


def check_sources(sources: list[Source]) -> None:
    """No file is read by two sources.

    Raises:
        UserError: one is.
    """
    refuse_twins([file for each in sources if is_local(each.path) for file in files_of(each.path)])


KEYS = tuple(each.name for each in fields(Source))


def sources_of(data: Data) -> list[Source]:
    """The sources of training rows, in the order in which they are read.

    Raises:
        UserError: an entry of data.sources says something else.
    """
    if not data.sources:
        return [Source(data.path, data.format, data.columns, data.max_rows)]
    made = [_source(i, entry, data) for i, entry in enumerate(data.sources)]
    names = [each.name for each in made]
    made = [
        each if names.count(each.name) == 1 else replace(each, name=shown_path(each.path))
        for each in made
    ]
    weights = [each.weight is not None for each in made]
    if any(weights) and not all(weights):
        raise UserError("data.sources: give each source a weight, or none of them")
    if any(weights) and any(each.repeat != 1 for each in made):
        raise UserError("data.sources: weight says how often rows come; give no repeat beside it")
    return made


def _source(number: int, entry: Any, data: Data) -> Source:
    place = f"data.sources[{number}]"
    if not isinstance(entry, Mapping) or "path" not in entry:
        raise UserError(f"{place}: expected {{path: ..., {', '.join(KEYS[1:])}}}, got {entry!r}")
    for key in entry:
        if key not in KEYS:
            hint = nearest(str(key), list(KEYS)) or f"; keys are {', '.join(KEYS)}"
            raise UserError(f"{place}: unknown key {key}{hint}")
    given = {key: value for key, value in entry.items() if value is not None}
    source = Source(**{"shape": data.format, "columns": data.columns, **given})
    source = replace(source, name=source.name or name_of_path(source.path))
    fault = fault_of(source)
    if fault is not None:
        raise UserError(f"{place}.{fault}")
    return source


def fault_of(source: Source) -> str | None:
    """What is wrong with the values of a source."""
    for key, least in (("cap", 1), ("repeat", 1)):
        value = getattr(source, key)
        if value is not None and (type(value) is not int or value < least):
            return f"{key}={value!r}: expected a whole number from {least}"
    if source.shape not in FORMATS:
        shapes = [shape for shape in FORMATS if shape != "demo"]
        return f"shape={source.shape}{nearest(source.shape, shapes) or f'; shapes are {shapes}'}"
    weight = source.weight
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float)):
        return f"weight={weight!r}: expected a number above 0"
    if weight is not None and not 0 < weight < float("inf"):
        return f"weight={weight!r}: expected a number above 0"
    if not isinstance(source.columns, dict):
        return f"columns={source.columns!r}: expected {{ours: yours}}"
    if source.path in (None, "", [], "-"):
        return f"path={source.path!r}: expected a file, a folder or a hub dataset"
    return None


def name_of_path(path: Any) -> str:
    """What a source is called where it has no name: the last part of its path."""
    first = path[0] if isinstance(path, list) else path
    return str(first).rstrip("/").rpartition("/")[2]
