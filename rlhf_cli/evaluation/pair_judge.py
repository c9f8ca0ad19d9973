"""Head to heads by a language model as judge: both orders are asked, and what that shows of it.

A judge that likes what it reads first, or what is longer, is no judge. So the log-odds of both
orders are averaged, which takes a leaning to one place out; how often both orders agree, and how
often the first or the longer one wins, is told. A pair whose judge failed counts for nothing: it is
no tie.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.config.errors import RunError
from rlhf_cli.evaluation.contest import corrected
from rlhf_cli.evaluation.judge_asks import Ask, PairJudge
from rlhf_cli.objectives.comparisons import length_controlled, mean_difference
from rlhf_cli.objectives.estimates import WinRate, clustered_share, points_interval

Figures = dict[str, Any]


@dataclass
class Text:
    """A response as a judge sees it, and its length in tokens."""

    text: str
    length: int


@dataclass
class Pair:
    """Two responses to a prompt, and the log-odds that the judge gives ours in either order.

    as_first, as_second: of ours shown first, and second; None where the judge failed.
    """

    place: int
    ours: Text
    theirs: Text
    as_first: float | None
    as_second: float | None

    @property
    def log_odds(self) -> float | None:
        """The mean of both orders; None where either failed."""
        if self.as_first is None or self.as_second is None:
            return None
        return (self.as_first + self.as_second) / 2


def judged_pairs(
    judge: PairJudge,
    prompts: Sequence[str],
    ours: Sequence[Text | None],
    theirs: Sequence[Text | None],
) -> list[Pair]:
    """Each pair of responses to one prompt that both have, in both orders."""
    places = [i for i in range(len(prompts)) if ours[i] is not None and theirs[i] is not None]
    sides = [(i, a, b) for i in places if (a := ours[i]) and (b := theirs[i])]
    asks = [Ask(prompts[i], a.text, b.text) for i, a, b in sides]
    asks += [Ask(prompts[i], b.text, a.text) for i, a, b in sides]
    odds = judge.log_odds(asks)
    return [
        Pair(i, a, b, first, None if second is None else -second)
        for (i, a, b), first, second in zip(
            sides, odds[: len(sides)], odds[len(sides) :], strict=True
        )
    ]


def won(pairs: Sequence[Pair], tie: float) -> Figures | None:
    """Wins, ties and losses of ours over one other, raw and at equal length; None without a pair.

    Args: tie, mean log-odds nearer to 0 than this are one.
    """
    known = [pair for pair in pairs if pair.log_odds is not None]
    if not known:
        return None
    odds = torch.tensor([pair.log_odds for pair in known], dtype=torch.double)
    wins, losses = (odds > tie).double(), (odds < -tie).double()
    points = wins + (1 - wins - losses) / 2
    longer = torch.tensor([float(pair.ours.length - pair.theirs.length) for pair in known])
    interval = points_interval(points, 1)
    ties = 1 - wins.mean().item() - losses.mean().item()
    rate = WinRate(wins.mean().item(), ties, losses.mean().item(), *interval)
    equal = length_controlled(points, longer)
    return {
        **asdict(rate),
        "p": mean_difference(points - 0.5).p,
        "pairs": len(known),
        "failed": len(pairs) - len(known),
        "preference": odds.sigmoid().mean().item(),
        "at_equal_length": {"mean": equal.mean, "stderr": equal.stderr},
    }


def judged_wins(pairs: Mapping[str, Sequence[Pair]], tie: float) -> dict[str, Figures]:
    """`won` over each other one, corrected for their number."""
    found = {name: of for name, each in pairs.items() if (of := won(each, tie)) is not None}
    return corrected(found)


def biases(pairs: Sequence[Pair], tie: float) -> Figures:
    """What the judge goes by beside the responses: shares with 95% intervals, clustered by prompt.

    consistency: pairs of which both orders prefer the same response.
    first_slot: askings in which the response shown first is preferred, half where neither is; of a
        judge without a leaning one half.
    longer_wins: decided pairs of unlike length that the longer one wins.
    """
    known = [pair for pair in pairs if pair.log_odds is not None]
    same, first, longer = [], [], []
    clusters: list[int] = []
    of_longer: list[int] = []
    for pair in known:
        assert pair.as_first is not None and pair.as_second is not None
        same.append(float(pair.as_first * pair.as_second > 0))
        first += [half(pair.as_first), half(-pair.as_second)]
        clusters += [pair.place]
        odds, gap = (pair.as_first + pair.as_second) / 2, pair.ours.length - pair.theirs.length
        if abs(odds) > tie and gap:
            longer.append(float((odds > 0) == (gap > 0)))
            of_longer.append(pair.place)
    return {
        "consistency": share(same, clusters),
        "first_slot": share(first, [place for place in clusters for _ in range(2)]),
        "longer_wins": share(longer, of_longer),
    }


def half(log_odds: float) -> float:
    """1 above 0, 0 below, one half at 0."""
    return 0.5 + 0.5 * (math.copysign(1, log_odds) if log_odds else 0)


def share(hits: Sequence[float], clusters: Sequence[int]) -> Figures | None:
    """A share with its error and interval; None of nothing."""
    return asdict(clustered_share(tensor(hits), clusters)) if hits else None


def tensor(values: Sequence[float]) -> Tensor:
    """(N,) in float64."""
    return torch.tensor(values, dtype=torch.double)


def judged_report(
    judge: PairJudge,
    prompts: Sequence[str],
    texts: Mapping[str, Sequence[Text | None]],
    ours: str,
    tie: float,
) -> Figures:
    """Ours over each other one, and what the judge goes by.

    Args:
        texts: by player its response to each prompt.

    Raises:
        RunError: the judge has failed at every pair.
    """
    pairs = {
        name: judged_pairs(judge, prompts, texts[ours], theirs)
        for name, theirs in texts.items()
        if name != ours
    }
    every = [pair for each in pairs.values() for pair in each]
    if every and all(pair.log_odds is None for pair in every):
        raise RunError(f"the judge has failed at all of {len(every)} pairs; see the lines above")
    return {"win_rates": judged_wins(pairs, tie), **biases(every, tie)}


def cost_of(counts: Mapping[str, int], prices: Sequence[float]) -> Figures:
    """Calls, tokens and, at prices per million tokens read and written, what they cost."""
    names = ("calls", "cached", "prompt_tokens", "completion_tokens")
    figures: Figures = {name: counts.get(name, 0) for name in names}
    if prices:
        read, written = (counts.get(name, 0) for name in names[2:])
        figures["cost"] = (read * prices[0] + written * prices[1]) / 1e6
    return figures
