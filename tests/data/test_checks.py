"""Doubtful pairs: counted and kept, dropped where a row is at fault, or an error by its place."""

from typing import Any

import pytest

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.checks import Judged, doubted
from rlhf_cli.data.kinds import Preference, Ranking

ITSELF = "judge a text against itself"
BOTH = "are judged both ways"

PAIRS: list[Judged] = [
    Preference("p", "long answer", "short", "f:1"),
    Preference("p", "same", "same", "f:2"),
    Preference("p", "a", "bb", "f:3"),
    Preference("q", "bb", "a", "f:4"),  # of another prompt
    Preference("p", "bb", "a", "f:5"),
    Preference("p", "bb", "a", "f:6"),
    Preference("p", "bb", "c", "f:7"),
]
RANKINGS: list[Judged] = [
    Ranking("p", ["a", "b", "a"], [1, 2, 3], "f:1"),
    Ranking("p", ["c", "c", "d"], [1, 1, 2], "f:2"),  # said twice, in a tie
    Ranking("p", ["e", "f", "g"], [1, 2, 3], "f:3"),
    Ranking("p", ["g", "e"], [1, 2], "f:4"),
    Ranking("p", ["b", "a"], [1, 2], "f:5"),  # against f:1, which says nothing of its own
    Ranking("p", ["x", "y"], [1, 1], "f:6"),
]


def sources(rows: list[Judged]) -> list[str]:
    return [row.source for row in rows]


def test_sound_pairs_are_kept_with_a_line_on_lengths() -> None:
    rows: list[Judged] = [Preference("p", "aa", "b"), Preference("p", "c", "dd")]
    for doubtful in ("keep", "drop", "error"):
        notes: list[str] = []
        assert check_pairs(rows, doubtful, notes) == rows
        assert notes == ["the better side has more characters in 50.0% of 2 unequal pairs"]


@pytest.mark.parametrize(
    ("rows", "itself", "both", "left"),
    [(PAIRS, 1, 3, ["f:1", "f:4", "f:7"]), (RANKINGS, 1, 2, ["f:2", "f:5", "f:6"])],
)
def test_doubtful_rows_are_counted_and_dropped_if_asked(
    rows: list[Judged], itself: int, both: int, left: list[str]
) -> None:
    notes: list[str] = []
    assert check_pairs(rows, "keep", notes) == rows
    advice = "kept (data.doubtful_pairs=drop drops them)"
    assert notes[:2] == [
        f"{itself} of {len(rows)} rows {ITSELF}: {advice}",
        f"{both} of {len(rows)} rows {BOTH}: {advice}",
    ]
    notes = []
    assert sources(check_pairs(rows, "drop", notes)) == left
    assert notes[:2] == [
        f"{itself} of {len(rows)} rows {ITSELF}: dropped",
        f"{both} of {len(rows)} rows {BOTH}: dropped",
    ]
    assert len(notes) == 3
    again: list[str] = []
    assert sources(check_pairs(check_pairs(rows, "drop", []), "error", again)) == left


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (PAIRS, f"f:2: one of 1 rows that {ITSELF}; data.doubtful_pairs=keep or drop goes on"),
        (PAIRS[2:], f"f:3: one of 3 rows that {BOTH}; data.doubtful_pairs=keep or drop goes on"),
        (RANKINGS[1:], f"f:3: one of 2 rows that {BOTH}; data.doubtful_pairs=keep or drop goes on"),
    ],
)
def test_the_first_doubtful_row_is_named(rows: list[Judged], said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_pairs(rows, "error", [])
    assert str(caught.value) == said


def check_pairs(rows: Any, doubtful: str, notes: list[str]) -> Any:
    """The rows that are kept."""
    return [row for row, keep in zip(rows, doubted(rows, doubtful, notes), strict=True) if keep]


def pairs_of_lengths(longer: int, shorter: int, equal: int = 0) -> list[Judged]:
    """As many pairs whose better side is longer, shorter or as long."""
    sides = [("aaa", "b")] * longer + [("a", "bbb")] * shorter + [("a", "b")] * equal
    return [
        Preference(f"p{i}", better, worse, f"f:{i}") for i, (better, worse) in enumerate(sides, 1)
    ]


@pytest.mark.parametrize(
    ("longer", "shorter", "doubted"),
    [(98, 2, "longer"), (97, 3, ""), (2, 98, "shorter"), (20, 0, "longer"), (19, 0, "")],
)
def test_one_side_always_the_longer(longer: int, shorter: int, doubted: str) -> None:
    rows = pairs_of_lengths(longer, shorter, equal=50)
    total = longer + shorter
    share = f"the better side has more characters in {longer / total:.1%} of {total} unequal pairs"
    doubt = (
        f"nearly always the {doubted} side is better: length alone tells them apart, and no row "
        "can be dropped for that"
    )
    for doubtful in ("keep", "drop"):
        notes: list[str] = []
        assert check_pairs(rows, doubtful, notes) == rows
        assert notes == ([share, doubt] if doubted else [share])
    if not doubted:
        assert check_pairs(rows, "error", []) == rows
        return
    with pytest.raises(UserError) as caught:
        check_pairs(rows, "error", [])
    first = 1 if doubted == "longer" else longer + 1
    assert str(caught.value) == (
        f"f:{first}: the {doubted} side is better here and in {max(longer, shorter)} of {total} "
        "pairs, so that length alone tells them apart; data.doubtful_pairs=keep goes on"
    )


def test_sides_of_one_length() -> None:
    notes: list[str] = []
    check_pairs(pairs_of_lengths(0, 0, equal=30), "error", notes)
    assert notes == ["the better side is never longer or shorter than the worse one"]


def test_a_ranking_counts_by_its_pairs() -> None:
    notes: list[str] = []
    check_pairs([Ranking("p", ["aaa", "bb", "c"], [1, 2, 2])], "keep", notes)
    assert notes == ["the better side has more characters in 100.0% of 2 unequal pairs"]
