"""Policies against each other on the same prompts: win rates, paired differences, ratings."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlhf_cli.objectives.comparisons import (
    holm,
    length_controlled,
    mean_difference,
    paired_difference,
    ratings,
)
from rlhf_cli.objectives.estimates import (
    WinRate,
    means_within,
    outcomes,
    points_interval,
    win_rate,
)

Figures = dict[str, Any]
Name = TypeVar("Name", bound=Hashable)

REFERENCES = "references"
"""The responses that the data has, as a player."""


@dataclass
class Contest:
    """Players at one temperature.

    tie: score differences up to this are ties.
    scores: by player (N, K) scores of its responses to the same N prompts, NaN where one has none.
    """

    tie: float
    scores: dict[str, Tensor] = field(default_factory=dict)

    def win_rates(self, player: str, others: Sequence[str]) -> dict[str, Figures]:
        """Of one player against each of some others; absent where no prompt has all scores.

        p is the chance of points as far from one half if both are as good, by Student's t over
        prompts; p_holm corrects it for the number of others.
        """
        found: dict[str, Figures] = {}
        for other in others:
            ours, theirs = scored_alike(self.scores[player], self.scores[other])
            if len(ours):
                wins, ties, _ = outcomes(ours, theirs, self.tie)
                tested = mean_difference(wins + ties / 2 - 0.5)
                found[other] = {**asdict(win_rate(ours, theirs, self.tie)), "p": tested.p}
        return corrected(found)

    def head_to_heads(self) -> dict[str, dict[str, Figures]]:
        """Win rates of each player against each other one."""
        return {
            player: self.win_rates(player, [other for other in self.scores if other != player])
            for player in self.scores
        }

    def against(self, other: str, players: Sequence[str]) -> dict[str, Figures]:
        """Win rates of several players against one, such as the references; as `win_rates`."""
        found = {
            player: won[other]
            for player in players
            if player != other and (won := self.win_rates(player, [other]))
        }
        return corrected(found)

    def gains(self, over: str) -> dict[str, Figures | None]:
        """By how much each player scores above one of them on the same prompts; None where unknown.

        The differences are paired by prompt, and p_holm corrects for their number.
        """
        gains: dict[str, Figures | None] = {}
        for player, scores in self.scores.items():
            ours, theirs = scored_alike(scores, self.scores[over])
            gains[player] = asdict(paired_difference(ours, theirs)) if len(ours) else None
        tested = {each: gain for each, gain in gains.items() if gain and each != over}
        return gains | corrected(tested)

    def rated(self, anchor: str, seed: int) -> dict[str, Figures]:
        """Ratings on Elo's scale from all head-to-heads, best first; none of a single player.

        not_separable: the players from whom a 95% interval of the difference tells nothing.
        """
        players = list(self.scores)
        if len(players) < 2:
            return {}
        points = played(list(self.scores.values()), self.tie)
        found = ratings(points, players.index(anchor), seed)
        rated: dict[str, Figures] = {
            player: {
                "rating": found.points[i].item(),
                "low": found.low[i].item(),
                "high": found.high[i].item(),
                "not_separable": [
                    other
                    for j, other in enumerate(players)
                    if i != j and not found.apart[i, j] and not found.apart[j, i]
                ],
            }
            for i, player in enumerate(players)
        }
        return dict(sorted(rated.items(), key=lambda each: -each[1]["rating"]))


def played(scores: Sequence[Tensor], tie: float) -> Tensor:
    """(N, P, P) what each player took from each other one on each prompt; 0 where one has no score.

    Args: scores, for each player, (N, K).
    """
    points = torch.zeros(len(scores[0]), len(scores), len(scores), dtype=torch.double)
    for i, ours in enumerate(scores):
        for j, theirs in enumerate(scores[:i]):
            known = both_known(ours, theirs)
            if known.any():
                wins, ties, losses = outcomes(ours[known], theirs[known], tie)
                points[known, i, j] = wins + ties / 2
                points[known, j, i] = losses + ties / 2
    return points


def head_to_head(points: Tensor, longer: Tensor, clusters: Sequence[Hashable]) -> Figures:
    """Wins, ties and losses of one over another in single comparisons, raw and at equal length.

    Prompts are independent, and each counts once however many comparisons it has; at equal length
    each comparison does (`length_controlled`).

    Args:
        points: (N,) 1 where it won, 0 where it lost, one half at a tie.
        longer: (N,) by how much its response is the longer one, in any unit.
        clusters: (N,) the prompt of each.
    """
    wins, losses = (points == 1).double(), (points == 0).double()
    win, loss = (means_within(each, clusters).mean().item() for each in (wins, losses))
    of_prompts = means_within(points, clusters)
    interval = points_interval(of_prompts, max(Counter(clusters).values()))
    equal = length_controlled(points, longer, clusters)
    return {
        **asdict(WinRate(win, 1 - win - loss, loss, *interval)),
        "p": mean_difference(of_prompts - 0.5).p,
        "pairs": len(points),
        "at_equal_length": {"mean": equal.mean, "stderr": equal.stderr},
    }


def corrected(found: Mapping[Name, Figures]) -> dict[Name, Figures]:
    """The same with p_holm: several comparisons are made at once."""
    chances = holm([figures["p"] for figures in found.values()])
    return {
        name: {**figures, "p_holm": chance}
        for (name, figures), chance in zip(found.items(), chances, strict=True)
    }


def scored_alike(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """The prompts to which every response of both policies has a reward: (N', K) and (N', L)."""
    known = both_known(ours, theirs)
    return ours[known], theirs[known]


def both_known(ours: Tensor, theirs: Tensor) -> Tensor:
    """(N,) whether every response of both has a score."""
    return ~(ours.isnan().any(-1) | theirs.isnan().any(-1))
