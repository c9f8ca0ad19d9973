"""Pairs that people would doubt: they teach nothing, contradict each other, or teach length."""

from itertools import combinations

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.kinds import Preference, Ranking, prompt_key, reply_key

Judged = Preference | Ranking
Sides = list[tuple[str, str]]

ENOUGH = 20  # pairs of unequal length, before their share says anything
ONE_SIDED = 0.98


def check_pairs(rows: list[Judged], doubtful: str, notes: list[str]) -> list[Judged]:
    """The rows to use; `notes` gets a line on lengths, and one for each doubt.

    A ranking is as doubtful as the pairs in it, and is kept or dropped whole.

    Args:
        doubtful: data.doubtful_pairs.

    Raises:
        UserError: there is a doubt, and `doubtful` is error.
    """
    pairs = [(row, sides_of(row)) for row in rows]
    identical = [row for row, sides in pairs if any(better == worse for better, worse in sides)]
    useless = {id(row) for row in identical}
    others = [(row, prompt_key(row), sides) for row, sides in pairs if id(row) not in useless]
    known = {(prompt, *side) for _, prompt, sides in others for side in sides}
    both_ways = [
        row
        for row, prompt, sides in others
        if any((prompt, worse, better) in known for better, worse in sides)
    ]
    doubts = {"judge a text against itself": identical, "are judged both ways": both_ways}
    for what, doubted in doubts.items():
        if doubted and doubtful == "error":
            raise in_doubt(doubted[0], f"one of {len(doubted)} rows that {what}", "keep or drop")
        if doubted:
            done = "dropped" if doubtful == "drop" else "kept (data.doubtful_pairs=drop drops them)"
            notes.append(f"{len(doubted)} of {len(rows)} rows {what}: {done}")
    if doubtful == "drop":
        dropped = {id(row) for row in identical + both_ways}
        pairs = [(row, sides) for row, sides in pairs if id(row) not in dropped]
    check_lengths(pairs, doubtful, notes)
    return [row for row, _ in pairs]


def check_lengths(pairs: list[tuple[Judged, Sides]], doubtful: str, notes: list[str]) -> None:
    """Note how often the better side is the longer one, in characters; doubt always and never."""
    unequal = [
        (row, len(better) > len(worse))
        for row, sides in pairs
        for better, worse in sides
        if len(better) != len(worse)
    ]
    if not unequal:
        notes.append("the better side is never longer or shorter than the worse one")
        return
    share = sum(longer for _, longer in unequal) / len(unequal)
    count = len(unequal)
    notes.append(f"the better side has more characters in {share:.1%} of {count} unequal pairs")
    if len(unequal) < ENOUGH or 1 - ONE_SIDED < share < ONE_SIDED:
        return
    usual = share > 0.5
    side = "longer" if usual else "shorter"
    if doubtful == "error":
        first = next(row for row, longer in unequal if longer == usual)
        count = sum(longer == usual for _, longer in unequal)
        what = f"the {side} side is better here and in {count} of {len(unequal)} pairs"
        raise in_doubt(first, f"{what}, so that length alone tells them apart", "keep")
    notes.append(
        f"nearly always the {side} side is better: length alone tells them apart, and no row can "
        "be dropped for that"
    )


def in_doubt(row: Judged, what: str, instead: str) -> UserError:
    """The error that names the first doubtful row."""
    return UserError(f"{row.source}: {what}; data.doubtful_pairs={instead} goes on")


def sides_of(row: Judged) -> Sides:
    """The better and the worse response of each pair in a row, as text; ties are no pair."""
    if isinstance(row, Preference):
        return [(reply_key(row.chosen), reply_key(row.rejected))]
    answers = sorted(zip(row.ranks, map(reply_key, row.responses), strict=True))
    return [
        (better, worse)
        for (first, better), (second, worse) in combinations(answers, 2)
        if first < second
    ]
