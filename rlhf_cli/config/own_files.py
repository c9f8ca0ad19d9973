"""Option files of users: YAML that sets keys of ours, and can make nothing run.

Hydra calls what a config names under `_target_`, in callbacks, launchers and logging, and as soon
as it has composed it. So nothing below `hydra` comes from such a file but the values of a sweep.
YAML's own ways to make objects (tags), and to make a few lines into gigabytes (aliases within
aliases), are refused before anything else reads the file.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rlhf_cli.config.errors import UserError

# Every scalar stays the text that the file has: `2e-4` is shown as 2e-4, not as 0.0002.
_AsWritten: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)

HYDRA = "hydra"
HEADER = 512  # characters in which Hydra looks for `# @package`
LARGEST = 2**20  # bytes of a file
MOST_NODES = 10_000  # values of a file, once its aliases are written out
MERGE = "<<"  # a YAML key that stands for all keys of the maps that it holds


def read_yaml(file: Path) -> dict[str, Any]:
    """The keys and values of a file, as written.

    Raises:
        UserError: it cannot be read, holds anything but YAML keys and values, or grows without
            bounds.
    """
    return _keys_and_values(file, _text(file))


def read_own(file: Path) -> dict[str, Any]:
    """`read_yaml` of an option file of a user.

    Raises:
        UserError: as `read_yaml`, or it reaches for what is Hydra's own.
    """
    text = _text(file)
    content = _keys_and_values(file, text)
    if reached := next(_hydras_own(text, content), None):
        raise UserError(
            f"{file}: {reached} is not for options: they set keys of the stage, and of Hydra's "
            "hydra.sweeper.params at most"
        )
    return content


def check_place(file: str) -> None:
    """Refuse an option file whose place or name makes it a part of Hydra's own config.

    Args:
        file: its path in the folder of options.

    Raises:
        UserError: it does.
    """
    if HYDRA in re.split(r"[/.]", file):
        raise UserError(
            f"{file}: no option can be named {HYDRA}, nor lie in a folder {HYDRA}: that is Hydra's "
            "own config"
        )


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > LARGEST:
            raise UserError(f"{file}: larger than {LARGEST} bytes; that is no option")
        return file.read_text(encoding="utf-8")
    except ValueError as error:
        raise UserError(f"{file}: not YAML: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def _keys_and_values(file: Path, text: str) -> dict[str, Any]:
    try:
        for event in yaml.parse(text, Loader=_AsWritten):
            if (tag := getattr(event, "tag", None)) is not None:
                line = event.start_mark.line + 1 if event.start_mark else 1
                raise UserError(f"{file} line {line}: no YAML tags: remove {tag}")
        content = yaml.load(text, Loader=_AsWritten) or {}
        size = _size(content, {})
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{file} line {line}: not YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # no text, or without end
        raise UserError(f"{file}: not YAML: {str(error).splitlines()[0]}") from error
    if size > MOST_NODES:
        raise UserError(f"{file}: more than {MOST_NODES} values, with its aliases written out")
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold KEY: VALUE lines")
    return _merged(content)


def _size(value: Any, known: dict[int, int]) -> int:
    """How many values there are in all; what an alias names is counted each time."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        inner = [*value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(each, known) for each in inner)
    return known[id(value)]


def _merged(content: dict[str, Any]) -> dict[str, Any]:
    """The keys of a map with those that it takes over from others; its own win."""
    taken = content.get(MERGE, {})
    maps = [each for each in (taken if isinstance(taken, list) else [taken]) if each]
    values: dict[str, Any] = {}
    for each in reversed(maps):  # the first one wins
        values |= _merged(each) if isinstance(each, dict) else {MERGE: each}
    return values | {key: value for key, value in content.items() if key != MERGE}


def _hydras_own(text: str, content: dict[str, Any]) -> Iterator[str]:
    """What of Hydra's own config a file sets, chooses or moves into."""
    for line in text[:HEADER].splitlines():
        if "@package" in line and HYDRA in re.split(r"[\s./]", line):
            yield line.strip("# ")
    for entry in _texts(content.get("defaults", [])):
        # `override /GROUP: OPTION`, `/GROUP/OPTION@PACKAGE`; a package may be put together as well
        if HYDRA in re.split(r"[\s./@]", entry) or "${" in entry.partition("@")[2]:
            yield f"defaults: {entry}"
    yield from _settings(content.get(HYDRA, {}))


def _settings(settings: Any) -> Iterator[str]:
    """The keys under `hydra` of a file that are not the values of a sweep."""
    if not isinstance(settings, dict):
        yield HYDRA
        return
    for name, values in settings.items():
        if name != "sweeper" or not isinstance(values, dict):
            yield f"{HYDRA}.{name}"
            continue
        for key, params in values.items():
            if key != "params" or not isinstance(params, dict):
                yield f"{HYDRA}.{name}.{key}"
            else:  # they become words of the command line
                bad = (word for word in params if HYDRA in word or word.startswith(("~", MERGE)))
                yield from (f"{HYDRA}.{name}.{key}: {word}" for word in bad)


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value, keys of maps included."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield str(key)
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
    else:
        yield str(value)


# --------------------------------------------------------------------------- written


class _Dumper(yaml.SafeDumper):
    """Texts with a backslash get the quotes within which config/texts.py reads them back."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if "\\" in text else None
    ),
)


def dump(content: dict[str, Any]) -> str:
    """YAML that `--config` reads as the same."""
    return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False))
