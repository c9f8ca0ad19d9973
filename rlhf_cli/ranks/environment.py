"""Which of several processes this one is, as the environment says it.

torchrun and our own agent say RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
MASTER_PORT. This module is read before torch is imported.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from rlhf_cli.config.errors import UserError


class Place(NamedTuple):
    """Where a process stands among all of a run, and among those of its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def place() -> Place | None:
    """That of this process; None where it is the only one.

    Raises:
        UserError: the environment says half of it, or what cannot be.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    local_rank, local_size = _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", size)
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise UserError(
            f"RANK={rank} of WORLD_SIZE={size}, LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE="
            f"{local_size} cannot be; torchrun sets them, and else they are to be unset"
        )
    return Place(rank, size, local_rank, local_size)


def _number(name: str, other: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and other is not None:
        return other
    try:
        return int(text or "")
    except ValueError:
        raise UserError(f"{name}={text} is no number; torchrun sets it, or unset it") from None
