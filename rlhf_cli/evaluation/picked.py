"""Rows to learn from, picked from what was sampled: demonstrations and preferences.

keep_best   the N responses of highest reward to a prompt are imitated: rejection sampling
            (Llama 2, 2307.09288 sec. 3.2.3; WebGPT's best of n, 2112.09332).
best_worst  the best response is preferred to the worst one (RLHF Workflow, 2405.07863).
above_row   the policy's response is preferred to what the row says: people give the bad side.
below_row   what the row says is preferred to the policy's response: people give the good side.

A response is picked where it came to an end, has a text, and a reward if one is given; a text
counts once to a prompt.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.algorithms import GenerateAlgo
from rlhf_cli.data.kinds import Prompt, Reply, reply_text
from rlhf_cli.evaluation.samples import renamed
from rlhf_cli.reporting.metrics import JsonLines, round_figures
from rlhf_cli.rollout.rollouts import Rollout

DEMONSTRATIONS, PREFERENCES = "demonstrations.jsonl", "preferences.jsonl"
BEST_WORST, ABOVE_ROW, BELOW_ROW = "best_worst", "above_row", "below_row"
SIDES = {ABOVE_ROW: ("rejected", "completion"), BELOW_ROW: ("chosen", "completion")}
"""What of a row stands against the policy's response: the first of these that it has."""


class Candidate(NamedTuple):
    """A response that may be picked; without a reward they stand in the order of sampling."""

    text: str
    reward: float | None


class Picked:
    """The files of what is picked, and how much that is."""

    def __init__(self, algo: GenerateAlgo, folder: Path) -> None:
        """The files are written into a folder, afresh."""
        self._best, self._pairs = algo.keep_best, algo.pairs
        self._demonstrations = None if self._best is None else JsonLines(folder / DEMONSTRATIONS)
        self._preferences = None if self._pairs is None else JsonLines(folder / PREFERENCES)
        self._counts: Counter[str] = Counter()
        self._rewards: list[float] = []  # of what is imitated

    def add(
        self, rollouts: Sequence[Rollout], samples: int, rewards: Sequence[float | None] | None
    ) -> None:
        """Pick from some more responses, of which each prompt has so many, side by side.

        Args:
            rewards: of each response, None where it has none; None without a reward.
        """
        for first in range(0, len(rollouts), samples):
            own = slice(first, first + samples)
            row = rollouts[first].row
            found = candidates(rollouts[own], None if rewards is None else rewards[own])
            columns = renamed(row.columns, {})
            if self._demonstrations is not None:
                for each in found[: self._best]:
                    told = {"completion": each.text, "reward": round_figures(each.reward)}
                    self._demonstrations.append({**columns, "prompt": row.prompt, **told}, None)
                    self._counts["demonstrations"] += 1
                    self._rewards += [] if each.reward is None else [each.reward]
            if self._preferences is not None and self._pairs is not None:
                pair = list(pair_of(self._pairs, found, row))
                for chosen, rejected, more in pair:
                    told = {"chosen": chosen, "rejected": rejected, **round_figures(more)}
                    self._preferences.append({**columns, "prompt": row.prompt, **told}, None)
                self._counts["preferences"] += len(pair)

    def metrics(self) -> dict[str, float]:
        """How many rows there are of each kind, and the mean reward of what is imitated."""
        figures: dict[str, float] = {}
        for name, file in (
            ("demonstrations", self._demonstrations),
            ("preferences", self._preferences),
        ):
            if file is not None:
                figures[name] = self._counts[name]
        if self._rewards:
            figures["demonstrations/reward"] = sum(self._rewards) / len(self._rewards)
        return figures


def check_sides(algo: GenerateAlgo, rows: Iterable[Prompt]) -> None:
    """Before anything is sampled.

    Raises:
        UserError: a row has no response that the policy's could stand against.
    """
    if algo.pairs in SIDES:
        for row in rows:
            reply_of(algo.pairs, row)


def candidates(
    rollouts: Sequence[Rollout], rewards: Sequence[float | None] | None
) -> list[Candidate]:
    """The responses to one prompt that may be picked, from the highest reward to the lowest."""
    found: dict[str, Candidate] = {}
    for i, rollout in enumerate(rollouts):
        reward = None if rewards is None else rewards[i]
        if rollout.ended and rollout.text.strip() and (rewards is None or reward is not None):
            found.setdefault(rollout.text, Candidate(rollout.text, reward))
    return sorted(found.values(), key=lambda each: 0.0 if each.reward is None else -each.reward)


def pair_of(
    how: str, found: Sequence[Candidate], row: Prompt
) -> Iterator[tuple[Reply, Reply, dict[str, Any]]]:
    """The chosen and the rejected side that a prompt gives and what more is known; none of equals.

    Args:
        found: from `candidates`.
    """
    if not found:
        return
    best, worst = found[0], found[-1]
    if how == BEST_WORST:
        assert best.reward is not None and worst.reward is not None  # validate() asks for one
        if best.reward > worst.reward:
            yield best.text, worst.text, {"margin": best.reward - worst.reward}
        return
    theirs = reply_of(how, row)
    if reply_text(theirs).strip() not in {each.text.strip() for each in found}:
        if how == ABOVE_ROW:
            yield best.text, theirs, {}
        else:
            yield theirs, worst.text, {}


def reply_of(how: str, row: Prompt) -> Reply:
    """What a row says itself to its prompt.

    Raises:
        UserError: nothing.
    """
    sides = SIDES[how]
    for name in sides:
        if (said := row.beside.get(name)) is not None:
            return said
    raise UserError(
        f"{row.source}: algo.pairs={how} takes one side of each pair from {' or '.join(sides)} of "
        "the row, which has neither"
    )
