"""Values of the environment that nobody else may read: kept out of configs, logs and reports.

A variable is secret by its name: one of its words ends in TOKEN, SECRET, PASSWORD, PASS,
CREDENTIALS, APIKEY and the like, or is PAT, DSN or WEBHOOK; or it is the address of a database, or
ends in _KEY. So is an address that holds a password. One that says where a secret lies is none.

What a config takes from the environment by ${oc.env:NAME} stays that reference in files, and [NAME]
in messages, whatever its name. Paths that other tools open are written as they are: the base of an
adapter, the reference of an implicit reward.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rlhf_cli.config.errors import UserError

NAMED = re.compile(
    r"(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|(?<!BY)(?<!COM)PASS|_PWD|CREDENTIAL|API_?KEY"
    r"|WEBHOOK|(?:^|_)(?:PAT|DSN|AUTH|BEARER|COOKIE))S?(?:_UR[LI])?(?:_|\d|$)"
    r"|(?:DATABASE|DB|REDIS|MONGO|MONGODB|POSTGRES|POSTGRESQL|PG|MYSQL|AMQP|RABBITMQ|BROKER)_UR[LI]"
    r"|CONN(?:ECTION)?_?STR(?:ING)?$|_KEY$",
    re.IGNORECASE,
)
WITH_PASSWORD = re.compile(r"\w://[^/\s:@]*:[^/\s@]+@")
PLACES = re.compile(r"_(?:FILE|PATH|DIR|SOCK)$", re.IGNORECASE)
SHORTEST = 8  # characters: shorter values stand in too many texts by chance
SHORTEST_TAKEN = 4  # of what a config takes by ${oc.env:NAME}
REFERENCE = re.compile(r"\$\{oc\.env:(\w+)\}")

_taken: dict[str, str] = {}  # name -> value of what configs have taken from the environment
_as_given: dict[tuple[str, str], Any] = {}  # key and value of a config -> as it was given


def secrets(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """name -> value of what is secret, the longest first: a value may be part of another."""
    named = {
        name: value
        for name, value in (os.environ if environment is None else environment).items()
        if len(value) >= SHORTEST
        and (WITH_PASSWORD.search(value) or (NAMED.search(name) and not PLACES.search(name)))
    }
    return dict(sorted(named.items(), key=lambda pair: -len(pair[1])))


def redacted(text: str, spelt: Callable[[str], str] = str) -> str:
    """A text with [NAME] in the place of the value of each secret variable.

    Args:
        spelt: a value as it stands in the text.
    """
    hidden = {**_long_enough(), **secrets()}
    for name, value in sorted(hidden.items(), key=lambda pair: -len(pair[1])):
        text = text.replace(spelt(value), f"[{name}]")
    return text


def take(name: str, value: str) -> None:
    """From now on a value of the environment is written as a reference: a config took it."""
    _taken[name] = value


def _long_enough() -> dict[str, str]:
    return {name: value for name, value in _taken.items() if len(value) >= SHORTEST_TAKEN}


def referenced(value: Any) -> Any:
    """A value for a file, with a reference in the place of what was taken from the environment."""
    if isinstance(value, str):
        for name, text in sorted(_long_enough().items(), key=lambda pair: -len(pair[1])):
            value = value.replace(text, f"${{oc.env:{name}}}")
        return value
    if isinstance(value, Mapping):
        return {referenced(key): referenced(each) for key, each in value.items()}
    return [referenced(each) for each in value] if isinstance(value, list | tuple) else value


def filled_in(value: Any) -> Any:
    """What `referenced` wrote, as it is in this environment; a secret is not filled in."""
    if isinstance(value, str):
        hidden = secrets() if "${" in value else {}
        return REFERENCE.sub(
            lambda found: found[0] if found[1] in hidden else os.environ.get(found[1], found[0]),
            value,
        )
    if isinstance(value, Mapping):
        return {filled_in(key): filled_in(each) for key, each in value.items()}
    return [filled_in(each) for each in value] if isinstance(value, list) else value


def keep_reference(key: str, value: Any, given: Any) -> None:
    """What a key of a config got its value from, where the environment went into it."""
    if "${oc.env:" in str(given) and referenced(value) == value:  # too short to be found there
        _as_given[key, repr(value)] = given


def as_given(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config for its file: where the environment went into a value, the text that took it."""
    written: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if (given := _as_given.get((key, repr(value)))) is not None:
            written[name] = given
        elif isinstance(value, Mapping):
            written[name] = as_given(value, f"{key}.")
        else:
            written[name] = referenced(value)
    return written


def marks() -> dict[str, str]:
    """name -> eight digits that tell whether what was taken has changed, and not what it is."""
    return {
        name: hashlib.sha256(f"{name}={value}".encode()).hexdigest()[:8]
        for name, value in sorted(_taken.items())
    }


def refuse_secrets(values: Mapping[str, Any]) -> None:
    """Stop where a value that is going to be written down holds a secret.

    Args:
        values: what will be written, by key; lists and maps are looked through.

    Raises:
        UserError: naming the key and the variable.
    """
    hidden = secrets()
    for key, value in values.items():
        texts = list(_texts(value))
        name = next((name for name in hidden if any(hidden[name] in text for text in texts)), None)
        if name is not None:
            raise UserError(
                f"{key} holds the value of the variable {name}, which config.yaml would keep for "
                "all to read; leave it out: reward functions and the hub read the environment "
                "themselves"
            )


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value, keys of maps included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield str(key)
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
