"""Prompts that are nearly the same as others."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

SHINGLE = 3  # tokens in a row that two prompts may share
NEAR = 0.6  # Jaccard similarity of their shingles (Broder 1997) from which they are near
USUAL = 0.2  # share of held-out prompts that have a shingle, from which it says nothing
COMPARED = 10_000  # training prompts that are compared with held-out ones


def near_of(train: Iterable[Sequence[int]], held_out: Sequence[Sequence[int]]) -> set[int]:
    """The places of held-out prompts that share at least NEAR of their shingles with another.

    Shingles that many held-out prompts have, as those of a template, count for nothing.
    """
    ours = [shingles_of(prompt) for prompt in held_out]
    common = Counter(shingle for each in ours for shingle in each)
    most = max(1, int(USUAL * len(ours)))
    usual = {shingle for shingle, count in common.items() if count > most}
    places: dict[int, list[int]] = {}
    for place, each in enumerate(ours):
        each -= usual
        for shingle in each:
            places.setdefault(shingle, []).append(place)
    near: set[int] = set()
    for prompt in set(map(tuple, islice(train, COMPARED))):
        theirs = shingles_of(prompt) - usual
        known = theirs & places.keys()
        shared = Counter(place for shingle in known for place in places[shingle])
        for place, count in shared.items():
            if count >= NEAR * (len(theirs) + len(ours[place]) - count):
                near.add(place)
    return near


def shingles_of(prompt: Sequence[int]) -> set[int]:
    """The hashes of all runs of SHINGLE tokens; of a shorter prompt the whole."""
    runs = zip(*(prompt[i:] for i in range(SHINGLE)), strict=False)
    return set(map(hash, runs)) or {hash(tuple(prompt))}
