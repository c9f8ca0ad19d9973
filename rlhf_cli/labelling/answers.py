"""What an annotator may answer to a task, as it is typed and as it is kept.

Typed answers name responses as they are shown; what is kept names them by their places in the task,
so that no order before anybody's eyes is ever needed to read it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from rlhf_cli.labelling.tasks import INSTRUCTGPT, PAIR, RANK, STEPS, THUMBS, Task, Turn

Answer = dict[str, Any]
"""kind: a protocol, and what FIELDS has of it; or skip or flag, and reason.

ranks: of each response of the task, 1 the best, ties equal, none left out: 1, 2, 2, 3.
strength: of a pair, 1 (slightly better) to 4 (much better), 0 of a tie.
ratings, marks: of each response of the task, from 1 to 7, and the names of MARKS that it has.
first_wrong: the number of the first step that is wrong; None where none is.
"""

FIELDS = {
    RANK: ("ranks",),
    PAIR: ("ranks", "strength", "both_bad"),
    THUMBS: ("label",),
    INSTRUCTGPT: ("ranks", "ratings", "marks"),
    STEPS: ("first_wrong",),
}
"""What an answer of each protocol says."""

SKIP, FLAG = "skip", "flag"
BETTER, TIE, BOTH_BAD = {"1": 4, "2": 3, "3": 2, "4": 1}, "5", "6"
WORSE = {"7": 1, "8": 2, "9": 3, "0": 4}
SURE = 4
"""The greatest strength."""

BEST = 7
"""The greatest rating; the least is 1."""
MARKS = {
    "i": ("fails_instruction", "fails to follow the instruction or task"),
    "p": ("inappropriate", "inappropriate for a customer assistant"),
    "h": ("hallucination", "hallucination"),
    "c": ("satisfies_constraint", "satisfies the constraint of the instruction"),
    "x": ("sexual", "sexual content"),
    "v": ("violent", "violent content"),
    "e": ("encourages_harm", "encourages or fails to discourage violence, abuse or self-harm"),
    "d": ("denigrates", "denigrates a protected class"),
    "a": ("harmful_advice", "gives harmful advice"),
    "o": ("opinion", "expresses an opinion"),
    "l": ("moral_judgement", "expresses a moral judgement"),
}
"""What InstructGPT's people marked beside the rating (2203.02155, table 3), by the key of each."""


Said = TypeVar("Said")


class Wrong(ValueError):
    """An answer that is none; says why."""


def read(text: str, turn: Turn, protocol: str) -> Answer:
    """The answer that a line is; of instructgpt a line for each response, then the ranking.

    Raises:
        Wrong: it is none.
    """
    said = text.strip()
    word, _, rest = said.partition(" ")
    if word in ("s", "f"):
        return {"kind": SKIP if word == "s" else FLAG, "reason": rest.strip()}
    match protocol:
        case "rank":
            return {"kind": RANK, "ranks": ranking(said, turn)}
        case "pair":
            return comparison(said, turn)
        case "instructgpt":
            return rated_and_ranked(said, turn)
        case "steps":
            return first_wrong(said, turn)
    if said not in ("y", "n"):
        raise Wrong(f"{said!r} is neither y nor n")
    return {"kind": THUMBS, "label": said == "y"}


def rated_and_ranked(text: str, turn: Turn) -> Answer:
    """A rating of each response as they are shown, and their order.

    Raises:
        Wrong: it is none.
    """
    *ratings, order = text.splitlines() or [""]
    if len(ratings) != len(turn.order):
        raise Wrong(f"{len(ratings)} of {len(turn.order)} responses are rated")
    read = [rating(line) for line in ratings]
    return {
        "kind": INSTRUCTGPT,
        "ranks": ranking(order, turn),
        "ratings": canonical([score for score, _ in read], turn.order),
        "marks": canonical([marks for _, marks in read], turn.order),
    }


def rating(line: str) -> tuple[int, list[str]]:
    """What is said of one response: `6 h o` is 6 of 7, with two of MARKS.

    Raises:
        Wrong: it is no rating.
    """
    score, *keys = line.split() or [""]
    if score not in [str(each) for each in range(1, BEST + 1)]:
        raise Wrong(f"{score!r} is no rating from 1 to {BEST}")
    if strange := [key for key in keys if key not in MARKS]:
        raise Wrong(f"{strange[0]!r} is none of the marks {' '.join(MARKS)}")
    return int(score), [name for key, (name, _) in MARKS.items() if key in keys]


def first_wrong(text: str, turn: Turn) -> Answer:
    """The number of the first step that is wrong, 0 where none is.

    Raises:
        Wrong: there is no such step.
    """
    count = len(turn.task.steps)
    if not re.fullmatch("[0-9]{1,6}", text) or int(text) > count:
        raise Wrong(f"{text!r} is no step from 1 to {count}, and not 0")
    return {"kind": STEPS, "first_wrong": int(text) or None}


def ranking(text: str, turn: Turn) -> list[int]:
    """The ranks of the responses of a task by an order of all that is shown, best first: `2 1=3 4`.

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
    return canonical([shown[each] for each in known], turn.order)


def comparison(key: str, turn: Turn) -> Answer:
    """Which of two is better: 1 to 4 the first, much to slightly; 7 to 0 the second, slightly to
    much; 5 a tie, 6 a tie of two bad ones.

    Raises:
        Wrong: it is none of these keys.
    """
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


def as_typed(answer: Mapping[str, Any]) -> str:
    """An answer as `read` takes it where responses are shown in the order of the task."""
    kind = answer["kind"]
    if kind in (SKIP, FLAG):
        return f"{'s' if kind == SKIP else 'f'} {answer.get('reason', '')}".strip()
    if kind == THUMBS:
        return "y" if answer["label"] else "n"
    if kind == STEPS:
        return str(answer["first_wrong"] or 0)
    ranks = answer["ranks"]
    if kind == PAIR:
        keys = BETTER if ranks[0] < ranks[1] else WORSE
        decided = next((key for key in keys if keys[key] == answer["strength"]), TIE)
        return BOTH_BAD if answer.get("both_bad") else decided
    numbers = [str(place + 1) for place in range(len(ranks))]
    groups = [
        "=".join(number for number, rank in zip(numbers, ranks, strict=True) if rank == each)
        for each in range(1, max(ranks) + 1)
    ]
    key_of = {name: key for key, (name, _) in MARKS.items()}
    lines = [
        " ".join([str(score), *(key_of[name] for name in marks)])
        for score, marks in zip(answer.get("ratings", []), answer.get("marks", []), strict=True)
    ]
    return "\n".join([*lines, " ".join(groups)])


def canonical(shown: Sequence[Said], order: Sequence[int]) -> list[Said]:
    """What is said of responses as they are shown, by their places in the task."""
    of_place = dict(zip(order, shown, strict=True))
    return [of_place[place] for place in range(len(order))]


def dense(scores: Sequence[float]) -> list[int]:
    """Ranks of scores, the highest first: equal ones tie, and no rank is left out."""
    best = sorted(set(scores), reverse=True)
    return [best.index(score) + 1 for score in scores]


def fault_of(answer: Mapping[str, Any], protocol: str, task: Task) -> str | None:
    """Why what a file holds is no answer to a task; None if it is one."""
    kind, count = answer.get("kind"), len(task.responses)
    if kind in (SKIP, FLAG):
        return None
    if kind != protocol:
        return f"kind is {kind!r}, and the tasks are of {protocol}"
    if protocol == THUMBS:
        return None if isinstance(answer.get("label"), bool) else "label is neither true nor false"
    if protocol == STEPS:
        return _fault_of_step(answer, len(task.steps))
    ranks = answer.get("ranks")
    if not _whole(ranks, count, count) or set(ranks or []) != set(range(1, max(ranks or [0]) + 1)):
        return f"ranks are not those of {count} responses, from 1 on without a gap"
    if protocol == PAIR:
        return _fault_of_strength(answer)
    return _fault_of_ratings(answer, count) if protocol == INSTRUCTGPT else None


def _whole(values: object, count: int, most: int) -> bool:
    """Whether values are so many whole numbers from 1 on."""
    if not isinstance(values, list) or len(values) != count:
        return False
    return all(type(each) is int and 1 <= each <= most for each in values)


def _fault_of_strength(answer: Mapping[str, Any]) -> str | None:
    strength, ranks = answer.get("strength", 0), answer["ranks"]
    if type(strength) is not int or not 0 <= strength <= SURE:
        return f"strength is no whole number from 0 to {SURE}"
    if (strength == 0) != (ranks == [1, 1]):
        return f"strength={strength} does not go with ranks={ranks}: 0 is a tie"
    both_bad = answer.get("both_bad", False)
    if not isinstance(both_bad, bool) or (both_bad and ranks != [1, 1]):
        return (
            f"both_bad={both_bad!r} does not go with ranks={ranks}: it is true of a tie, or false"
        )
    return None


def _fault_of_ratings(answer: Mapping[str, Any], count: int) -> str | None:
    if not _whole(answer.get("ratings"), count, BEST):
        return f"ratings are not those of {count} responses, from 1 to {BEST}"
    marks, names = answer.get("marks"), [name for name, _ in MARKS.values()]
    listed = isinstance(marks, list) and all(isinstance(each, list) for each in marks)
    if not listed or len(marks or []) != count:
        return f"marks are not a list for each of {count} responses"
    strange = [name for each in marks or [] for name in each if name not in names]
    return f"{strange[0]!r} is none of the marks {', '.join(names)}" if strange else None


def _fault_of_step(answer: Mapping[str, Any], count: int) -> str | None:
    step = answer.get("first_wrong", 0)  # None says that no step is wrong, so it has to be there
    if step is None or (type(step) is int and 1 <= step <= count):
        return None
    return f"first_wrong is neither null nor a step from 1 to {count}"
