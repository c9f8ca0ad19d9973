"""What an annotator may answer to a task, as it is typed and as it is kept.

Typed answers name responses as they are shown; what is kept names them by their places in the task,
so that no order before anybody's eyes is ever needed to read it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_cli.labelling.tasks import PAIR, RANK, THUMBS, Turn

Answer = dict[str, Any]
"""kind: rank, pair, thumbs, skip or flag; and by that ranks, strength, both_bad, label, reason.

ranks: of each response of the task, 1 the best, ties equal, none left out: 1, 2, 2, 3.
strength: of a pair, 1 (slightly better) to 4 (much better), 0 of a tie.
"""

SKIP, FLAG = "skip", "flag"
BETTER, TIE, BOTH_BAD = {"1": 4, "2": 3, "3": 2, "4": 1}, "5", "6"
WORSE = {"7": 1, "8": 2, "9": 3, "0": 4}
SURE = 4
"""The greatest strength."""


class Wrong(ValueError):
    """An answer that is none; says why."""


def read(line: str, turn: Turn, protocol: str) -> Answer:
    """The answer that a line is.

    Raises:
        Wrong: it is none.
    """
    word, _, rest = line.strip().partition(" ")
    if word in ("s", "f"):
        return {"kind": SKIP if word == "s" else FLAG, "reason": rest.strip()}
    if protocol == RANK:
        return ranking(line, turn)
    if protocol == PAIR:
        return comparison(line, turn)
    if line.strip() not in ("y", "n"):
        raise Wrong(f"{line.strip()!r} is neither y nor n")
    return {"kind": THUMBS, "label": line.strip() == "y"}


def ranking(text: str, turn: Turn) -> Answer:
    """An order of all that is shown, best first: `2 1=3 4`.

    Raises:
        Wrong: it is none.
    """
    count = len(turn.order)
    groups = [group.split("=") for group in re.sub(r"\s*=\s*", "=", text.strip()).split()]
    named = [each for group in groups for each in group]
    known = [str(number) for number in range(1, count + 1)]
    if strange := [each for each in named if each not in known]:
        raise Wrong(f"{strange[0]!r} is none of {', '.join(known)}")
    if twice := [each for each in known if named.count(each) > 1]:
        raise Wrong(f"{twice[0]} is there twice")
    if missing := [each for each in known if each not in named]:
        raise Wrong(f"{', '.join(missing)} is missing: rank all, best first, with = for ties")
    shown = {each: rank for rank, group in enumerate(groups, 1) for each in group}
    return {"kind": RANK, "ranks": canonical([shown[each] for each in known], turn.order)}


def comparison(key: str, turn: Turn) -> Answer:
    """Which of two is better: 1 to 4 the first, much to slightly; 7 to 0 the second, slightly to
    much; 5 a tie, 6 a tie of two bad ones.

    Raises:
        Wrong: it is none of these keys.
    """
    key = key.strip()
    if key in (TIE, BOTH_BAD):
        return {"kind": PAIR, "ranks": [1, 1], "strength": 0, "both_bad": key == BOTH_BAD}
    if key not in BETTER | WORSE:
        raise Wrong(f"{key!r} is none of 1 to 9 and 0")
    shown = [1, 2] if key in BETTER else [2, 1]
    strength = (BETTER | WORSE)[key]
    return {
        "kind": PAIR,
        "ranks": canonical(shown, turn.order),
        "strength": strength,
        "both_bad": False,
    }


def canonical(shown: Sequence[int], order: Sequence[int]) -> list[int]:
    """Ranks of responses as they are shown, by their places in the task."""
    ranks = [0] * len(order)
    for rank, place in zip(shown, order, strict=True):
        ranks[place] = rank
    return ranks


def dense(scores: Sequence[float]) -> list[int]:
    """Ranks of scores, the highest first: equal ones tie, and no rank is left out."""
    best = sorted(set(scores), reverse=True)
    return [best.index(score) + 1 for score in scores]


def fault_of(answer: Mapping[str, Any], protocol: str, count: int) -> str | None:
    """Why what a file holds is no answer to a task of so many responses; None if it is one."""
    kind, ranks = answer.get("kind"), answer.get("ranks")
    if kind in (SKIP, FLAG):
        return None
    if kind != protocol:
        return f"kind is {kind!r}, and the tasks are of {protocol}"
    if protocol not in (RANK, PAIR):
        return None if isinstance(answer.get("label"), bool) else "label is neither true nor false"
    whole = isinstance(ranks, list) and all(type(rank) is int for rank in ranks)
    if not whole or len(ranks or []) != count or sorted(set(ranks or [])) != _to(ranks or []):
        return f"ranks are not those of {count} responses, from 1 on without a gap"
    strength = answer.get("strength", 0)
    if protocol == PAIR and (type(strength) is not int or not 0 <= strength <= SURE):
        return f"strength is no whole number from 0 to {SURE}"
    if protocol == PAIR and (strength == 0) != (ranks == [1, 1]):
        return f"strength={strength} does not go with ranks={ranks}: 0 is a tie"
    return None


def _to(ranks: Sequence[int]) -> list[int]:
    return list(range(1, len(set(ranks)) + 1))
