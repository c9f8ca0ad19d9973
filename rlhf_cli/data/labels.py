"""Numbers and thumbs as people write them: one map, printed by the run that reads it."""

import math
from collections import Counter
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.columns import is_given, shown
from rlhf_cli.data.raw import Raw, RowError

GOOD = (
    *("true", "1", "1.0", "+1", "yes", "y", "t", "good", "up", "thumbs up", "thumbs_up", "+"),
    *("chosen", "positive", "correct", "right", "desirable", "accepted", "like", "liked", "👍"),
)
BAD = (
    *("false", "0", "0.0", "-1", "-1.0", "no", "n", "f", "bad", "down", "thumbs down"),
    *("thumbs_down", "-", "rejected", "negative", "incorrect", "wrong", "undesirable"),
    *("dislike", "disliked", "👎"),
)
LABELS = {**{word: (True, word) for word in GOOD}, **{word: (False, word) for word in BAD}}
"""What a label means by how it is written, in small letters, and that spelling."""

THUMBS = "true or false, yes or no, good or bad, 1 or 0, 1 or -1"


def thumb_of(value: Any) -> tuple[bool, str] | None:
    """Thumbs up or down and how that is written; None for all that is no label."""
    if not isinstance(value, bool | int | float | str):
        return None
    written = str(value).strip().lower()
    if written in LABELS:
        return LABELS[written]
    number = as_number(value)  # 1.00 in a cell of CSV
    return LABELS[str(int(number))] if number in (-1, 0, 1) else None


def as_label(value: Any) -> bool | None:
    """Thumbs up or down; None for all else."""
    thumb = thumb_of(value)
    return None if thumb is None else thumb[0]


def label_of(raw: Raw, source: str) -> tuple[bool, str] | tuple[None, str]:
    """The column `label` of a judged response and its spelling; none where it is not given.

    Raises:
        RowError: it is no label, which nothing could be learnt from.
    """
    if not is_given(raw, "label"):
        return None, ""
    thumb = thumb_of(raw["label"])
    if thumb is None:
        raise RowError(
            f"{source}: column 'label' holds {shown(raw['label'])}, expected {THUMBS}; rename it "
            "if it judges nothing"
        )
    return thumb


def note(spellings: Counter[str]) -> str:
    """A line that says how labels were read, from `Feedback.spelling` of all rows.

    Raises:
        UserError: both 0 and -1 are there, so that 0 may mean neither good nor bad.
    """
    counts = Counter({word: count for word, count in spellings.items() if word})
    if counts["-1"] + counts["-1.0"] and counts["0"] + counts["0.0"]:
        zeros = counts["0"] + counts["0.0"]
        raise UserError(
            f"column 'label' holds -1, and 0 in {zeros} rows: 0 is bad beside 1 alone and may be "
            "neither beside -1; write true and false, or give the numbers as column 'score'"
        )
    good = [f"{word} ({count})" for word, count in counts.items() if LABELS[word][0]]
    bad = [f"{word} ({count})" for word, count in counts.items() if not LABELS[word][0]]
    read = [(good, "good"), (bad, "bad")]
    return "labels: " + ", ".join(f"{' and '.join(w)} as {what}" for w, what in read if w)


def as_number(value: Any) -> float | None:
    """A finite number, which CSV has as text; None for all else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def number_of(raw: Raw, name: str, source: str) -> float | None:
    """A column that holds a number or is not given."""
    if not is_given(raw, name):
        return None
    number = as_number(raw[name])
    if number is None:
        raise RowError(f"{source}: column {name!r} holds {shown(raw[name])}, expected a number")
    return number


def check_weight(raw: Raw, source: str) -> None:
    """Rows count alike: a column `weight` holds 1 or nothing."""
    if is_given(raw, "weight") and as_number(raw["weight"]) != 1:
        raise RowError(
            f"{source}: column 'weight' holds {shown(raw['weight'])}, but rows have no weights of "
            "their own here: write 1, or repeat or leave out the row"
        )
