"""Principles that responses are judged and revised by: a constitution (2212.08073)."""

import random
from collections.abc import Sequence
from pathlib import Path

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.order import derived_seed


def read_principles(path: str | None) -> list[str]:
    """The lines of a file that say something; none where no file is named.

    Raises:
        UserError: it cannot be read, or says nothing.
    """
    if path is None:
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"principles={path} cannot be read: {error}") from None
    if not (said := [line.strip() for line in lines if line.strip()]):
        raise UserError(f"principles={path} is empty: write one principle on each line")
    return said


def drawn(principles: Sequence[str], seed: int, *about: object) -> str:
    """The principle that something is judged or revised by: the same at every time."""
    return random.Random(derived_seed(seed, "principle", *about)).choice(principles)


def template_of(key: str, path: str | None, ours: str, parts: Sequence[str]) -> str:
    """The text that a key names, or ours, with a place for each part.

    Raises:
        UserError: it cannot be read, or lacks a part.
    """
    if path is None:
        return ours
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{key}={path} cannot be read: {error}") from None
    if missing := [each for each in parts if each not in text]:
        raise UserError(f"{key}={path} lacks {missing[0]}")
    return text
