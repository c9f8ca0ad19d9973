"""Values of the environment that nobody else may read: kept out of configs, logs and reports.

A variable is secret by its name: one of its words ends in TOKEN, SECRET, PASSWORD, PASSWD,
CREDENTIALS or APIKEY, or it ends in _KEY. One that says where a secret lies is none.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_cli.config.errors import UserError

NAMED = re.compile(
    r"(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY)S?(?:_|\d|$)|_KEY$", re.IGNORECASE
)
PLACES = re.compile(r"_(?:FILE|PATH|DIR)$", re.IGNORECASE)
SHORTEST = 8  # characters: shorter values stand in too many texts by chance


def secrets(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """name -> value of what is secret, the longest first: a value may be part of another."""
    named = {
        name: value
        for name, value in (os.environ if environment is None else environment).items()
        if len(value) >= SHORTEST and NAMED.search(name) and not PLACES.search(name)
    }
    return dict(sorted(named.items(), key=lambda pair: -len(pair[1])))


def redacted(text: str) -> str:
    """A text with [NAME] in the place of the value of each secret variable."""
    for name, value in secrets().items():
        text = text.replace(value, f"[{name}]")
    return text


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
