"""Pairs that people would doubt: they teach nothing, contradict each other, or teach length."""

from array import array
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.kinds import Preference, Ranking, Reply, prompt_key, reply_key, reply_text

Judged = Preference | Ranking
Sides = list[tuple[Reply, Reply]]

ENOUGH = 20  # pairs of unequal length, before their share says anything
ONE_SIDED = 0.98


class Doubts:
    """What is to be doubted of rows that judge pairs; takes little of each, so that millions fit.

    A ranking is as doubtful as the pairs in it, and is kept or dropped whole.
    """

    def __init__(self) -> None:
        self._rows = 0
        self._of: array[int] = array("Q")  # the row of each pair
        self._as_judged: array[int] = array("q")  # hash of prompt, better and worse side
        self._reversed: array[int] = array("q")  # the same with the sides exchanged
        self._length: array[int] = array("b")  # 1 where the better side is longer, -1 shorter
        self._alike: array[int] = array("b")  # whether the sides are equal

    def add(self, row: Judged) -> None:
        """One more row."""
        prompt = prompt_key(row)
        for better, worse in sides_of(row):
            ours, theirs = reply_key(better), reply_key(worse)
            longer = len(reply_text(better)) - len(reply_text(worse))
            self._of.append(self._rows)
            self._as_judged.append(hash((prompt, ours, theirs)))
            self._reversed.append(hash((prompt, theirs, ours)))
            self._length.append((longer > 0) - (longer < 0))
            self._alike.append(ours == theirs)
        self._rows += 1

    def kept(self, doubtful: str, place: Callable[[int], str], notes: list[str]) -> Any:
        """(N,) bool, the rows to use; `notes` gets a line on lengths, and one for each doubt.

        Args:
            doubtful: data.doubtful_pairs.
            place: where the i-th row stands.

        Raises:
            UserError: there is a doubt, and `doubtful` is error.
        """
        of = np.frombuffer(self._of, np.uint64).astype(np.int64)
        alike = self._rows_where(of, np.frombuffer(self._alike, np.int8) != 0)
        judged, reversed_ = (
            np.frombuffer(each, np.int64) for each in (self._as_judged, self._reversed)
        )
        others = ~alike[of]
        both_ways = self._rows_where(of, others & np.isin(reversed_, judged[others]))
        doubts = {"judge a text against itself": alike, "are judged both ways": both_ways}
        for what, doubted in doubts.items():
            count = int(doubted.sum())
            if count and doubtful == "error":
                first = place(int(doubted.argmax()))
                raise in_doubt(first, f"one of {count} rows that {what}", "keep or drop")
            if count:
                done = (
                    "dropped"
                    if doubtful == "drop"
                    else "kept (data.doubtful_pairs=drop drops them)"
                )
                notes.append(f"{count} of {self._rows} rows {what}: {done}")
        kept = ~(alike | both_ways) if doubtful == "drop" else np.ones(self._rows, bool)
        self._check_lengths(of, kept, doubtful, place, notes)
        return kept

    def _rows_where(self, of: Any, holds: Any) -> Any:
        """(N,) bool, the rows one of whose pairs is so."""
        rows = np.zeros(self._rows, bool)
        rows[of[holds]] = True
        return rows

    def _check_lengths(
        self, of: Any, kept: Any, doubtful: str, place: Callable[[int], str], notes: list[str]
    ) -> None:
        """Note how often the better side has more characters; doubt always and never."""
        length = np.frombuffer(self._length, np.int8)
        unequal = kept[of] & (length != 0)
        count, longer = int(unequal.sum()), int((unequal & (length > 0)).sum())
        if not count:
            notes.append("the better side is never longer or shorter than the worse one")
            return
        share = longer / count
        notes.append(f"the better side has more characters in {share:.1%} of {count} unequal pairs")
        if count < ENOUGH or 1 - ONE_SIDED < share < ONE_SIDED:
            return
        usual = share > 0.5
        side = "longer" if usual else "shorter"
        if doubtful == "error":
            first = int(of[unequal & ((length > 0) == usual)][0])
            many = longer if usual else count - longer
            what = f"the {side} side is better here and in {many} of {count} pairs"
            raise in_doubt(place(first), f"{what}, so that length alone tells them apart", "keep")
        notes.append(
            f"nearly always the {side} side is better: length alone tells them apart, and no row "
            "can be dropped for that"
        )


def doubted(rows: Sequence[Judged], doubtful: str, notes: list[str]) -> Any:
    """(N,) bool, the rows to use, by `Doubts.kept`."""
    doubts = Doubts()
    for row in rows:
        doubts.add(row)
    return doubts.kept(doubtful, lambda i: rows[i].source, notes)


def in_doubt(source: str, what: str, instead: str) -> UserError:
    """The error that names the first doubtful row."""
    return UserError(f"{source}: {what}; data.doubtful_pairs={instead} goes on")


def sides_of(row: Judged) -> Sides:
    """The better and the worse response of each pair in a row; ties are no pair."""
    if isinstance(row, Preference):
        return [(row.chosen, row.rejected)]
    answers = sorted(zip(row.ranks, row.responses, strict=True), key=lambda answer: answer[0])
    return [
        (better, worse)
        for (first, better), (second, worse) in combinations(answers, 2)
        if first < second
    ]
