"""Prompts that were asked before, and are not asked again."""

from collections.abc import Sequence
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.files import find
from rlhf_cli.data.held_out import identity
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.messages import turns_of
from rlhf_cli.data.parse import rows_of_file


def asked_in(paths: Sequence[str]) -> set[str]:
    """The identities of the prompts of all rows of some files, folders or patterns.

    Raises:
        UserError: a row has no prompt, or its prompt is no dialogue.
    """
    known = set()
    for file in (file for path in paths for file in find(path).train):
        for raw, place in rows_of_file(file):
            if isinstance(raw, UserError):
                raise raw
            prompt = raw.get("prompt")
            if not isinstance(prompt, str | list):
                raise UserError(f"{place}: needs a prompt, which is then not asked again")
            if isinstance(prompt, list):
                prompt = turns_of(prompt, "prompt", place)
            known.add(identity(Prompt(prompt)))
    return known


def not_asked(rows: Sequence[Any], known: set[str]) -> list[Any]:
    """The rows whose prompts are none of those that are known.

    Raises:
        UserError: there are none.
    """
    new = [row for row in rows if identity(row) not in known]
    if rows and not new:
        raise UserError(f"asked: each of {len(rows)} rows has a prompt that was asked before")
    return new
