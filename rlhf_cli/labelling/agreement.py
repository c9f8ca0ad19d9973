"""How far those agree who judged the same things, and how far one can be believed who is so sure.

What is said of responses to one prompt is not independent, in one task or in several, so errors and
intervals are over prompts.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch

from rlhf_cli.evaluation.judging import pair_calibration
from rlhf_cli.labelling.outcomes import Asked, Figures, Outcomes
from rlhf_cli.labelling.tasks import SINGLE
from rlhf_cli.objectives.agreement import NOMINAL, ORDINAL, either_way, krippendorff_alpha
from rlhf_cli.objectives.estimates import Share, clustered_share, ratio_mean


def between_people(said: Sequence[Outcomes], protocol: str, seed: int) -> Figures | None:
    """Agreement of annotators with each other, and Krippendorff's alpha with 95% intervals.

    Alpha of pairs does not depend on which response is called the first (`either_way`).
    """
    figures = agreement_of(list(combinations(said, 2)))
    if figures is None:
        return None
    keys = sorted({key for each in said for key in each})
    table = torch.tensor([[each.get(key, math.nan) for each in said] for key in keys])
    prompts = [key.prompt for key in keys]
    if protocol not in SINGLE:
        table, prompts = either_way(table), [*prompts, *prompts]
    for name, metric in (("alpha", NOMINAL), ("alpha_ordinal", ORDINAL)):
        found = krippendorff_alpha(table, prompts, metric, seed)
        ends = {"": found.value, "_low": found.low, "_high": found.high}
        figures |= {name + end: None if math.isnan(x) else x for end, x in ends.items()}
    return figures


def agreement_of(pairs: Sequence[tuple[Outcomes, Outcomes]]) -> Figures | None:
    """How often two say the same, over all pairs of those who judged the same things.

    agreement: of all outcomes, with a standard error over prompts; decided: of those where neither
        says that it is a tie, with a 95% interval over prompts. None where nothing was judged by
        two.
    """
    of_prompt: dict[str, list[float]] = {}
    tasks, decided = set(), []
    for ours, theirs in pairs:
        for key in ours.keys() & theirs.keys():
            tasks.add(key.task)
            of_prompt.setdefault(key.prompt, []).append(float(ours[key] == theirs[key]))
            if 0.5 not in (ours[key], theirs[key]):
                decided.append((ours[key] == theirs[key], key.prompt))
    if not of_prompt:
        return None
    figures = mean_of(of_prompt, "agreement", "outcomes")
    figures |= {"tasks": len(tasks), "prompts": len(of_prompt)}
    if decided:
        share = share_of(decided)
        figures |= {"decided": share.mean, "decided_low": share.low, "decided_high": share.high}
        figures |= {"decided_outcomes": len(decided)}
    return figures


def share_of(hits: Sequence[tuple[bool, str]]) -> Share:
    """The share of hits, each with its prompt."""
    return clustered_share(torch.tensor([hit for hit, _ in hits]), [place for _, place in hits])


def mean_of(of_prompt: Mapping[str, Sequence[float]], name: str, counted: str) -> Figures:
    """The mean of what was said on prompts, with its standard error, and of how many values."""
    counts = torch.tensor([len(said) for said in of_prompt.values()])
    sums = torch.tensor([sum(said) for said in of_prompt.values()], dtype=torch.double)
    found = ratio_mean(sums, counts)
    stderr = {} if math.isnan(found.stderr) else {"stderr": found.stderr}
    return {name: found.mean, **stderr, counted: int(counts.sum())}


def calibration_of(said: Sequence[Outcomes], log_odds: Mapping[Asked, float]) -> Figures | None:
    """How far the probabilities of one who judges pairs are those with which others prefer a side;
    None where nobody has judged its pairs.

    Args:
        said: of each annotator; a tie is one half.
        log_odds: that the first of two responses is better.
    """
    both = [(key, value) for each in said for key, value in each.items() if key in log_odds]
    if not both:
        return None
    odds = torch.tensor([log_odds[key] for key, _ in both], dtype=torch.double)
    outcomes = torch.tensor([value for _, value in both], dtype=torch.double)
    return pair_calibration(odds, outcomes, [key.prompt for key, _ in both])
