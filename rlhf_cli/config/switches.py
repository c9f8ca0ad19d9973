"""Which keys are read under which switches, as `key(..., used_by=..., needed=...)` says it.

A switch is a key whose value decides whether anything reads another one: algo.loss, algo.baseline.
A key has a value where something needs it, and none where nothing reads it.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rlhf_cli.config import catalog
from rlhf_cli.config.schema import OPTIONS


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
    for key in values:
        switch = needed_by(stage, key)
        if switch and config[key] is None and switch.reads(values[switch.key]):
            chosen = f"{switch.key}={values[switch.key]}"
            yield f"{chosen} needs {key}{_where_it_has_one(stage, key, switch, values)}"
    for key, field in catalog.keys(stage).items():
        switch, unused = used_by(stage, key), field.metadata["unused"]
        if switch and config[key] != unused and not switch.reads(values[switch.key]):
            yield (
                f"{key} is not used by {switch.key}={values[switch.key]}; set it to "
                f"{written(unused)}, {_where_it_has_none(stage, switch, values)}"
            )


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
    if reading and default not in reading:
        return f"or take {group}={next(iter(reading))}, which uses it"
    return f"or set {switch}"


def _options(stage: str, group: str) -> dict[str, dict[str, Any]]:
    return catalog.shipped_options(stage, group) if group else {}


def _nearest(options: Mapping[str, str], value: str) -> str:
    """The plainest option whose switch has this value, or has any."""
    return next((option for option in options if options[option] == value), next(iter(options)))
