"""What may be written on the command line, read without Hydra: stages, groups, options and keys.

Help, `ls`, completion and the hints in error messages need names and values at once. Importing
Hydra and composing takes longer than all of that, so this module reads the schema and the YAML
files itself. It follows only what conf/ uses: a defaults list of sibling options and `_self_`.
"""

import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.own_code import function_named
from rlhf_cli.config.own_files import read_own, read_yaml
from rlhf_cli.config.paths import is_path
from rlhf_cli.config.schema.keys import AUTO, OPTIONS
from rlhf_cli.config.stages import STAGES

GROUPS = ("algo", "model", "data", "hardware")
NULL = "null"  # as it is written


@cache
def shipped(folder: str) -> Path:
    """`conf` or `recipes`, as installed in the package or as it lies beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder


def config_dirs(own: str | None = None) -> list[Path]:
    """The folders that options come from: the user's `--config-dir`, if any, after ours."""
    return [shipped("conf"), *([Path(own)] if own else [])]


@cache
def keys(stage: str) -> Mapping[str, "dataclasses.Field[Any]"]:
    """Every key of a stage by its dotted name, in the order of the schema."""
    return dict(_leaves(STAGES[stage].config))


def _leaves(schema: type, prefix: str = "") -> Iterator[tuple[str, "dataclasses.Field[Any]"]]:
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.type):
            assert isinstance(field.type, type)
            yield from _leaves(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field


def model_keys(stage: str) -> dict[str, str]:
    """The keys of a stage that name models, and their role: policy or reward."""
    return {
        key: field.metadata["role"]
        for key, field in keys(stage).items()
        if "role" in field.metadata
    }


def group_of(key: str) -> str:
    """The group of a key; nothing for those of the stage itself."""
    return key.rpartition(".")[0]


@cache
def group_keys(stage: str, group: str) -> frozenset[str]:
    """The names of the keys in one group of a stage, without the group."""
    start = f"{group}."
    return frozenset(key.removeprefix(start) for key in keys(stage) if key.startswith(start))


def options(group: str, dirs: list[Path]) -> list[str]:
    """All options of a group, sorted."""
    return sorted({file.stem for folder in dirs for file in (folder / group).glob("*.yaml")})


def option_file(group: str, option: str, dirs: list[Path]) -> Path | None:
    """The file of an option, or None where there is none."""
    files = (folder / group / f"{option}.yaml" for folder in dirs)
    return next((file for file in files if is_path(str(file)) and file.is_file()), None)


def read(file: Path) -> tuple[list[Any], dict[str, Any]]:
    """The defaults list and the own values of a YAML file, values as written; not to be changed.

    Shipped files are read once.

    Raises:
        UserError: the file does not hold YAML keys and values.
    """
    return _read_once(file) if file.is_relative_to(shipped("conf")) else _read(file)


def _read(file: Path) -> tuple[list[Any], dict[str, Any]]:
    content = read_yaml(file) if file.is_relative_to(shipped("conf")) else read_own(file)
    defaults = content.pop("defaults", None) or []
    if not isinstance(defaults, list):
        raise UserError(f"{file}: defaults must be a list, as in defaults: [ppo, _self_]")
    return defaults, content


_read_once = cache(_read)


def option_values(group: str, option: str, dirs: list[Path]) -> dict[str, Any]:
    """The values of an option with those of the options that it builds on."""
    file = option_file(group, option, dirs)
    if file is None:
        return {}
    defaults, own = read(file)
    values: dict[str, Any] = {}
    for base in defaults:
        values |= own if base == "_self_" else option_values(group, str(base), dirs)
    return values if "_self_" in defaults else values | own


def stages_of(group: str, option: str, dirs: list[Path]) -> list[str]:
    """The stages that an option belongs to: it sets keys of theirs, to words that they know.

    It must leave no key of the group without a value; the stage's own file may have the rest.
    """
    values = option_values(group, option, dirs)
    return [stage for stage in STAGES if _fits(stage, group, values, choices)]


def _fits(
    stage: str, group: str, values: dict[str, Any], known: Callable[[str, str], tuple[str, ...]]
) -> bool:
    names = group_keys(stage, group)
    _, own = read(shipped("conf") / f"{stage}.yaml")
    if not set(values) <= names <= set(values) | set(own.get(group, {})):
        return False
    return all(
        value in (*words, NULL) or own_function(stage, f"{group}.{name}", value)
        for name, value in values.items()
        if (words := known(stage, f"{group}.{name}")) and not isinstance(value, list)
    )


def shipped_options(stage: str, group: str) -> dict[str, dict[str, Any]]:
    """What each shipped option of a group, with what it builds on, makes of a stage's values.

    Returns:
        By option, the plainest first, the stage's own keys and those of the group by dotted name,
        as written; not to be changed.
    """
    return _shipped_options(shipped("conf"), stage, group)


@cache
def _shipped_options(conf: Path, stage: str, group: str) -> dict[str, dict[str, Any]]:
    sets = {option: option_values(group, option, [conf]) for option in options(group, [conf])}
    fitting = [
        option for option, values in sets.items() if _fits(stage, group, values, _words_of_schema)
    ]
    made = {}

    def plainness(option: str) -> tuple[int, int, str]:
        values = sets[option]
        return len(values), sum(value not in (None, {}) for value in values.values()), option

    for option in sorted(fitting, key=plainness):
        values = stage_values(stage, {group: option}, [conf])
        made[option] = {key: values[key] for key in values if group_of(key) in ("", group)}
    return made


def choices(stage: str, key: str) -> tuple[str, ...]:
    """The values that a key of a stage knows; none where it takes any."""
    if keys(stage)[key].metadata.get("choices") != OPTIONS:
        return _words_of_schema(stage, key)
    known = shipped_options(stage, group_of(key)).values()
    return tuple(sorted({values[key] for values in known}))


def own_function(stage: str, key: str, value: Any) -> tuple[Path, str] | None:
    """File and name of the function of a user that is the value of a key, where it may be one."""
    may_be = isinstance(value, str) and "own" in keys(stage)[key].metadata
    return function_named(value) if may_be else None


def _words_of_schema(stage: str, key: str) -> tuple[str, ...]:
    """Those that the schema itself tells."""
    words = keys(stage)[key].metadata.get("choices")
    return words if isinstance(words, tuple) else ()


def told_by_options(stage: str) -> str:
    """The key of a stage whose choices are OPTIONS."""
    fields = keys(stage).items()
    return next(key for key, field in fields if field.metadata.get("choices") == OPTIONS)


def default_options(stage: str) -> dict[str, str]:
    """The option that a stage takes for each group when nothing is said."""
    defaults, _ = read(shipped("conf") / f"{stage}.yaml")
    chosen: dict[str, str] = {}
    for entry in defaults:
        if isinstance(entry, dict):
            chosen |= entry
    return chosen


def stage_values(stage: str, chosen: dict[str, str], dirs: list[Path]) -> dict[str, Any]:
    """The value of every key of a stage under the chosen options, by dotted name, as written."""
    defaults, own = read(shipped("conf") / f"{stage}.yaml")
    options = default_options(stage) | chosen
    values: dict[str, Any] = {}
    for entry in defaults:  # later ones win, as in Hydra
        if entry == "_self_":
            values |= _dotted(own)
        elif isinstance(entry, dict):
            for group in entry:
                values |= _dotted({group: option_values(group, options[group], dirs)})
    return values


def _dotted(own: dict[str, Any]) -> dict[str, Any]:
    """{"algo": {"lr": 1}, "seed": 0} -> {"algo.lr": 1, "seed": 0}."""
    values: dict[str, Any] = {}
    for key, value in own.items():
        if key in GROUPS:
            values |= {f"{key}.{name}": each for name, each in value.items()}
        elif key != "hydra":
            values[key] = value
    return values


_TYPES = {int: "integer", float: "number", str: "text", bool: "true|false"}


def describe(stage: str, key: str) -> str:
    """What a key takes, in words: `number >= 0`, `cosine|linear|constant`, `text or null`."""
    field = keys(stage)[key]
    if field.metadata["texts"]:
        return "text, a list of texts, or null"
    kinds = get_args(field.type) if _is_union(field.type) else (field.type,)
    kind = field.metadata["auto"] or next(each for each in kinds if each is not type(None))
    if known := choices(stage, key):
        words = "|".join(known)
        words = f"list of {words}" if get_origin(kind) is list else words
        words += "|path.py:function" if "own" in field.metadata else ""
    else:
        words = _TYPES.get(kind) or {list: "list", dict: "map"}[get_origin(kind)]
    limits = field.metadata
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    words += ",".join(f" {signs[name]} {limits[name]:g}" for name in signs if name in limits)
    words = f"{AUTO} or {words}" if limits["auto"] else words
    return words + (" or null" if type(None) in kinds else "")


def is_map(field: "dataclasses.Field[Any]") -> bool:
    """Whether a key holds a mapping whose own keys are free."""
    return get_origin(field.type) is dict


def is_text(kind: Any) -> bool:
    """Whether a type holds texts alone: str, or a list or map of them; null counts for nothing."""
    parts = get_args(kind)
    return kind in (str, type(None)) or (bool(parts) and all(map(is_text, parts)))


def is_single(field: "dataclasses.Field[Any]") -> bool:
    """Whether a key holds one value, not a list or a map."""
    kinds = get_args(field.type) if _is_union(field.type) else (field.type,)
    return all(get_origin(kind) is None for kind in kinds)


def may_hold_regex(field: "dataclasses.Field[Any]") -> bool:
    """Whether backslashes in a text belong to a regular expression, as in reward=regex:..."""
    return bool(field.metadata.get("regex")) or field.metadata.get("role") == "reward"


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)
