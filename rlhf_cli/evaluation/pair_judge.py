"""Head to heads by a language model as judge: both orders are asked, and what that shows of it.

A judge that likes what it reads first, or what is longer, is no judge. So the log-odds of both
orders are averaged, which takes a leaning to one place out; how often both orders agree, and how
often the first or the longer one wins, is told. A pair whose judge failed counts for nothing: it is
no tie.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.config.errors import RunError
from rlhf_cli.evaluation.contest import corrected, head_to_head
from rlhf_cli.evaluation.judge_asks import PairJudge
from rlhf_cli.evaluation.judge_questions import Ask
from rlhf_cli.evaluation.judgements import price_of
from rlhf_cli.objectives.estimates import clustered_share, means_within

Figures = dict[str, Any]


@dataclass
class Text:
    """A response as a judge sees it, and its length in tokens."""

    text: str
    length: int


Texts = Sequence[Sequence[Text]]
"""By prompt the responses that a judge reads, if there are any."""


@dataclass
class Pair:
    """Two responses to a prompt, and the log-odds that the judge gives ours in either order.

    place: of the prompt.
    number: of ours and of theirs among the responses to it, from 0; see `judged_pairs`.
    as_first, as_second: of ours shown first, and second; None where the judge failed.
    """

    place: int
    number: int
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
    ours: Texts,
    theirs: Texts,
) -> list[Pair]:
    """The first responses of both to a prompt, the second ones and so on, in both orders.

    Where one has fewer they begin again: a single one, such as a reference, meets all of the other.
    """
    sides = [
        (i, k, ours[i][k % len(ours[i])], theirs[i][k % len(theirs[i])])
        for i in range(len(prompts))
        if ours[i] and theirs[i]
        for k in range(max(len(ours[i]), len(theirs[i])))
    ]
    asks = [Ask(prompts[i], a.text, b.text) for i, _, a, b in sides]
    asks += [Ask(prompts[i], b.text, a.text) for i, _, a, b in sides]
    odds = judge.log_odds(asks)
    return [
        Pair(i, k, a, b, first, None if second is None else -second)
        for (i, k, a, b), first, second in zip(
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
    odds = tensor([pair.log_odds or 0.0 for pair in known])
    points = ((odds > tie).double() - (odds < -tie).double() + 1) / 2
    longer = tensor([float(pair.ours.length - pair.theirs.length) for pair in known])
    places = [pair.place for pair in known]
    return {
        **head_to_head(points, longer, places),
        "failed": len(pairs) - len(known),
        "preference": means_within(odds.sigmoid(), places).mean().item(),
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
    texts: Mapping[str, Texts],
    ours: str,
    tie: float,
) -> tuple[Figures, dict[str, list[Pair]]]:
    """Ours over each other one, and what the judge goes by; and the pairs that tell it.

    Args:
        texts: by player its responses to each prompt.

    Raises:
        RunError: the judge has failed at every pair.
    """
    pairs = {
        name: judged_pairs(judge, prompts, texts[ours], theirs)
        for name, theirs in texts.items()
        if name != ours
    }
    every = [pair for each in pairs.values() for pair in each]
    failed = sum(pair.log_odds is None for pair in every)
    if every and failed == len(every):
        raise RunError(f"the judge has failed at all of {len(every)} pairs; see the lines above")
    found = {"win_rates": judged_wins(pairs, tie), "failed": failed, **biases(every, tie)}
    return found, pairs


# --------------------------------------------------------------------------- is it any good?


def agreement(
    verdicts: Sequence[float], other: Sequence[float], clusters: Sequence[Hashable]
) -> Figures:
    """How often a judge prefers the response that another one does, half where it has a tie.

    Of pairs that the other one decides; `tied` is the share of those that the judge does not.

    Args:
        verdicts, other: (N,) of each pair above 0 for the first, below for the second, 0 at a tie.
        clusters: the prompt of each pair.
    """
    decided = [i for i, each in enumerate(other) if each]
    hits = [half(verdicts[i] * other[i]) for i in decided]
    told: Figures = {"pairs": len(decided), "tied": None}
    if not decided:
        return told
    told["tied"] = sum(verdicts[i] == 0 for i in decided) / len(decided)
    return {**asdict(clustered_share(tensor(hits), [clusters[i] for i in decided])), **told}


def verdict(pair: Pair, tie: float) -> float | None:
    """1 for ours, -1 for the other, 0 for a tie; None where the judge failed."""
    odds = pair.log_odds
    return None if odds is None else float((odds > tie) - (odds < -tie))


def agreement_with_scores(
    pairs: Mapping[str, Sequence[Pair]], ours: Tensor, scores: Mapping[str, Tensor], tie: float
) -> Figures:
    """With who scores higher by another scorer, over the pairs that both have judged.

    Args:
        pairs: by player, ours against its.
        ours, scores: (N, K) of the responses, NaN without a score.
    """
    verdicts, other, places = [], [], []
    for player, of_player in pairs.items():
        theirs = scores[player]
        for pair in of_player:
            a = ours[pair.place, pair.number % ours.shape[1]]
            b = theirs[pair.place, pair.number % theirs.shape[1]]
            said, gap = verdict(pair, tie), (a - b).item()
            if said is not None and not math.isnan(gap):
                verdicts.append(said)
                other.append(gap)
                places.append(pair.place)
    return agreement(verdicts, other, places)


def agreement_with_people(pairs: Sequence[Pair], prompts: Sequence[str], tie: float) -> Figures:
    """On rows in which people have chosen ours.

    Args: prompts, of each row; a ranking gives several rows of one.
    """
    said = [
        (each, prompts[pair.place]) for pair in pairs if (each := verdict(pair, tie)) is not None
    ]
    found = agreement([each for each, _ in said], [1.0] * len(said), [prompt for _, prompt in said])
    return {**found, "failed": len(pairs) - len(said)}


def cost_of(counts: Mapping[str, int], prices: Sequence[float]) -> Figures:
    """Calls, tokens and, at prices per million tokens read and written, what they cost."""
    names = ("calls", "cached", "prompt_tokens", "completion_tokens")
    figures: Figures = {name: counts.get(name, 0) for name in names}
    if prices:
        figures["cost"] = price_of(counts, prices)
    return figures
