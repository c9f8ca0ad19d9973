"""Which keys are read under which switches, as `key(..., used_by=..., needed=...)` says it.

A switch is a key whose value decides whether anything reads another one: algo.loss, algo.baseline.
A key has a value where something needs it, and none where nothing reads it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_cli.config import catalog
from rlhf_cli.config.own_code import Parameters, parameters_of
from rlhf_cli.config.schema.keys import OPTIONS

READ_ANYWAY = ("algo.beta",)  # by dpo, whatever its loss: the scale of the implicit rewards


class Switch(NamedTuple):
    """A key, and for which of its values another key is read.

    values: as written; None where any but null will do.
    above: or all numbers above this one.
    """

    key: str
    values: tuple[str, ...] | None = None
    above: float | None = None

    def reads(self, value: str) -> bool:
        """Whether the other key is read where the switch has a value, as written."""
        if self.above is not None:
            return float(value) > self.above
        return value != catalog.NULL if self.values is None else value in self.values

    def __str__(self) -> str:
        if self.above is not None:
            return f"{self.key} above {self.above:g}"
        return self.key if self.values is None else f"{self.key}={', '.join(self.values)}"


def used_by(stage: str, key: str) -> Switch | None:
    """The switch under which a key of a stage is read; None where it always is."""
    told = catalog.keys(stage)[key].metadata.get("used_by")
    if told == OPTIONS:
        switch = catalog.told_by_options(stage)
        options = catalog.shipped_options(stage, catalog.group_of(switch)).values()
        reading = {values[switch] for values in options if values[key] != catalog.NULL}
        return Switch(switch, tuple(sorted(reading)))
    return _parsed(stage, told) if told else None


def needed_by(stage: str, key: str) -> Switch | None:
    """The switch under which a key of a stage must not be null; None where it always may."""
    needed = catalog.keys(stage)[key].metadata["needed"]
    if isinstance(needed, str):
        return _parsed(stage, needed)
    return used_by(stage, key) if needed else None


def _parsed(stage: str, told: str) -> Switch:
    """A switch as the schema writes it, with the values that it has in this stage."""
    key, above, bound = told.partition(">")
    if above:
        return Switch(key, above=float(bound))
    key, equals, values = told.partition("=")
    if not equals:
        return Switch(key)
    known = catalog.choices(stage, key)
    return Switch(key, tuple(each for each in values.split("|") if not known or each in known))


def written(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None:
        return catalog.NULL
    return str(value).lower() if isinstance(value, bool) else str(value)


def complaints(stage: str, config: Mapping[str, Any]) -> Iterator[str]:
    """A line for each key that lacks a value where one is needed, then for each that nothing reads.

    Args:
        config: the value of every key of the stage.
    """
    values = {key: written(value) for key, value in config.items()}
    own = {key: catalog.own_function(stage, key, value) for key, value in config.items()}
    for key, function in own.items():
        if function is not None:
            yield from _own_complaints(stage, key, *function, config)
    for key in values:
        switch = needed_by(stage, key)
        if switch is None or own[switch.key] or config[key] is not None:
            continue
        if switch.reads(values[switch.key]):
            chosen = f"{switch.key}={values[switch.key]}"
            yield f"{chosen} needs {key}{_where_it_has_one(stage, key, switch, values)}"
    for key, field in catalog.keys(stage).items():
        switch, unused = used_by(stage, key), field.metadata["unused"]
        if switch is None or own[switch.key] or config[key] == unused:
            continue
        if not switch.reads(values[switch.key]):
            yield (
                f"{key} is not used by {switch.key}={values[switch.key]}; set it to "
                f"{written(unused)}, {_where_it_has_none(stage, switch, values)}"
            )


def _own_complaints(
    stage: str, key: str, file: Path, name: str, config: Mapping[str, Any]
) -> Iterator[str]:
    """What is wrong with a function of the user's as the value of a key, or with the keys it reads.

    It reads the keys of its group that it names. One that it does not name keeps the value that the
    stage starts with.
    """
    spec, found = f"{key}={file}:{name}", parameters_of(key, file, name)
    given, group = given_to(stage, key, found), catalog.group_of(key)
    offered = "parameters are given by name: " + ", ".join(catalog.keys(stage)[key].metadata["own"])
    if found.is_async:
        yield f"{spec} is async; a loss is called as it is: remove async"
    if unknown := [each for each in found.required if each not in given]:
        yield f"{spec} cannot be given {unknown[0]!r}; {offered}"
    if not any(f"{group}.{each}" not in config for each in given):
        yield f"{spec} names nothing to compute a loss from; {offered}"
    for other, field in catalog.keys(stage).items():
        switch, short = used_by(stage, other), other.rpartition(".")[2]
        if switch is None or switch.key != key:
            continue
        if short in found.required and config[other] is None:
            yield f"{spec} names {short}, so it needs {other}=VALUE: {field.metadata['meaning']}"
        if (
            short not in given
            and other not in READ_ANYWAY
            and not _as_at_start(stage, other, config)
        ):
            unused = written(field.metadata["unused"])
            yield f"{other} is not used by {spec}, which does not name it; set it to {unused}"


def _as_at_start(stage: str, key: str, config: Mapping[str, Any]) -> bool:
    """Whether a key is null or has the value that its stage starts with."""
    value, start = config[key], catalog.stage_values(stage, {}, catalog.config_dirs())[key]
    if value is None or start == catalog.NULL:
        return value is None
    return written(value) == start if isinstance(value, bool) else bool(value == float(start))


def given_to(stage: str, key: str, parameters: Parameters) -> tuple[str, ...]:
    """What a function of the user's is given: what it names, or all that there is for **kwargs."""
    offered: tuple[str, ...] = catalog.keys(stage)[key].metadata["own"]
    return tuple(each for each in offered if parameters.takes_all or each in parameters.names)


def _where_it_has_one(stage: str, key: str, switch: Switch, values: Mapping[str, str]) -> str:
    """The plainest option with a value for a key, or what the key means."""
    group = catalog.group_of(key)
    having = {
        option: of_option[switch.key]
        for option, of_option in _options(stage, group).items()
        if switch.reads(of_option[switch.key]) and of_option[key] != catalog.NULL
    }
    if having:
        return f"; {group}={_nearest(having, values[switch.key])} brings a value"
    return f"=VALUE: {catalog.keys(stage)[key].metadata['meaning']}"


def _where_it_has_none(stage: str, switch: Switch, values: Mapping[str, str]) -> str:
    """What else to do than to empty a key: the option with this switch, or with one that reads it.

    Where the stage's own option reads the key, only the switch was changed, not what belongs to it.
    """
    group = catalog.group_of(switch.key)
    options = {option: each[switch.key] for option, each in _options(stage, group).items()}
    reading = {option: value for option, value in options.items() if switch.reads(value)}
    others = {option: value for option, value in options.items() if option not in reading}
    default = catalog.default_options(stage).get(group)
    if default in reading and others:
        return f"as {group}={_nearest(others, values[switch.key])} does"
    if reading and default not in reading and switch.above is None:
        return f"or take {group}={next(iter(reading))}, which uses it"
    return f"or set {switch}"


def _options(stage: str, group: str) -> dict[str, dict[str, Any]]:
    return catalog.shipped_options(stage, group) if group else {}


def _nearest(options: Mapping[str, str], value: str) -> str:
    """The plainest option whose switch has this value, or has any."""
    return next((option for option in options if options[option] == value), next(iter(options)))
