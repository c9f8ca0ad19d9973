"""Which prompts are held out: those whose hash is low, so that other rows move none of them."""

import hashlib
import json
import re
from typing import Any

import numpy as np

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.kinds import Row, Text

SPACE = 2**64  # of the hashes
AROUND = re.compile(r"^(\s*<[^<>\s]+>)+|(<[^<>\s]+>\s*)+$")  # <s>, <|endoftext|>, ...
MOST = 200  # prompts of a share that evaluations look at; the others wait for it to be raised


def identity(row: Row) -> str:
    """What makes two rows share a side of the split: their prompt, or the text itself.

    White space makes no other prompt of it: a copy with a line break more must not be held out; nor
    do the BOS and EOS that a template has written around a text.
    """
    if isinstance(row, Text):
        return " ".join(AROUND.sub("", row.text).split())
    if isinstance(row.prompt, str):
        return " ".join(row.prompt.split())
    turns = [
        {
            key: " ".join(each.split()) if isinstance(each, str) else each
            for key, each in turn.items()
        }
        for turn in row.prompt
    ]
    return json.dumps(turns, sort_keys=True, default=str)


def hash_of(text: str) -> int:
    """64 bits that stand for a text."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def hold_out(
    prompts: Any, of: Any, share: float, count: int | None, place: object
) -> tuple[Any, Any]:
    """Which items are held out, and which of them are looked at: two (N,) of bool.

    A prompt is on one side, and on the same side at every seed and in every stage that reads this
    source with this share or count. By share no prompt changes sides when rows are added.

    Args:
        prompts: (M,) uint64 hashes of the prompts of all rows that were read.
        of: (N,) uint64 hashes of the prompts of the items to be split.
        share: of prompts; one is held out at least, and of many MOST are looked at.
        count: of prompts, in place of a share: those whose hash is lowest.
        place: of the rows, for messages.

    Raises:
        UserError: nothing is left to train on.
    """
    known = np.unique(prompts)
    if count is None:
        limit = np.uint64(min(int(share * SPACE), SPACE - 1))
        held = max(int((known < limit).sum()), 1)
    else:
        held = min(count, len(known))
    if held == len(known):
        lower = "set data.eval_share lower or " if count is None else "set data.eval_rows lower or "
        raise UserError(
            f"{place}: holding out {count or held} of {len(known)} prompts leaves none to train "
            f"on; {lower if len(known) > 1 else ''}give data.eval_path"
        )
    looked_at = held if count is not None else min(held, MOST)
    return of < known[held], of < known[looked_at]
