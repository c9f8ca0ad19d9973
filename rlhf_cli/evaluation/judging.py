"""How good a scorer is, from its scores of held-out rows: reports ready for JSON.

In every report a number is a figure and a list a table; what is undefined is None.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.data.items import Answers
from rlhf_cli.data.kinds import Feedback, Preference, Ranking
from rlhf_cli.objectives.estimates import (
    Bin,
    Calibration,
    area_under_curve,
    calibration_error,
    clustered_share,
    clustered_stderr,
    correlation,
    kendall_tau,
)
from rlhf_cli.objectives.reward_model import bradley_terry_loss, logistic_loss, regression_loss
from rlhf_cli.reporting.metrics import round_figures

PAIR_BINS = 20  # on [0, 1]: the confidence in the preferred side is at least one half
BUCKETS = 4  # quartiles

Report = dict[str, Any]


@dataclass
class JudgedPairs:
    """N >= 1 pairs as a scorer sees them, and what the rows say of them.

    chosen, rejected: (N,) scores.
    chosen_lengths, rejected_lengths: tokens of the responses.
    margins: by how much the row says that chosen is better; None where it does not say.
    groups: the part of the data that each row is of; "" where it does not say.
    clusters: the prompt of each pair, by any key.
    selected: the rule by which each came to be labelled; "" where the row does not say.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Sequence[int]
    rejected_lengths: Sequence[int]
    margins: Sequence[float | None]
    groups: Sequence[str]
    clusters: Sequence[Hashable]
    selected: Sequence[str] = ()


@dataclass
class JudgedRanking:
    """K >= 2 responses to one prompt: scores (K,), ranks (K,) with 1 best, lengths in tokens."""

    scores: Tensor
    ranks: Sequence[float]
    lengths: Sequence[int]
    cluster: Hashable
    group: str = ""
    selected: str = ""


def accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen side scores higher, one half at a tie: (N,)."""
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()


def pair_report(judged: JudgedPairs) -> Report:
    """Accuracy, loss, calibration and length bias on pairs.

    Chosen is always the right side, so the calibration is that of the side which the scorer
    prefers: its confidence sigmoid(|r_w - r_l|), and whether that side is the chosen one.
    The length of a response is a rule to beat: "the longer is better", half right at a tie. Where
    the scorer prefers the longer of two (of unequal length) more often than it is the chosen one,
    it overrates length.
    """
    chosen, rejected = judged.chosen.double(), judged.rejected.double()
    longer, shorter = torch.tensor(judged.chosen_lengths), torch.tensor(judged.rejected_lengths)
    hits, margins = accuracy(chosen, rejected), (chosen - rejected).abs()
    uneven = longer != shorter
    longer_preferred = torch.where(longer > shorter, hits, 1 - hits)[uneven]
    report = {
        "pairs": len(hits),
        "prompts": len(set(judged.clusters)),
        **share(hits, judged.clusters),
        "loss": bradley_terry_loss(chosen, rejected).mean().item(),
        **plain(calibration_error(margins.sigmoid(), hits, PAIR_BINS)),
        "length_correlation": correlation(
            torch.cat([chosen, rejected]), torch.cat([longer, shorter])
        ),
        "longer_chosen": (longer > shorter)[uneven].double().mean().item(),
        "longer_preferred": longer_preferred.mean().item(),
        "longer_accuracy": accuracy(longer, shorter).mean().item(),
        "by_score_margin": buckets(hits, judged.clusters, margins.tolist()),
        "by_row_margin": buckets(hits, judged.clusters, judged.margins),
        "by_group": groups(hits, judged.clusters, judged.groups),
        "by_selected": groups(hits, judged.clusters, judged.selected, "selected"),
    }
    return round_figures(report, digits=None)


def ranking_report(rankings: Sequence[JudgedRanking]) -> Report:
    """Kendall's tau-b and the top response of each ranking, and the report on its untied pairs.

    A ranking whose responses all share a rank asks nothing and is left out; where none is left,
    the count of 0 is all there is to report. A scorer that scores all responses alike tells
    nothing: a tau of 0. The row margin of a pair is how far its ranks are apart.
    """
    asked = [ranking for ranking in rankings if len(set(ranking.ranks)) > 1]
    if not asked:
        return {"rankings": 0}
    clusters = [ranking.cluster for ranking in asked]
    taus, tops, chances = [], [], []
    for ranking in asked:
        scores, ranks = ranking.scores, torch.tensor(ranking.ranks)
        best = (ranks == ranks.min()).double()
        taus.append(kendall_tau(scores, ranks) or 0.0)
        tops.append(best[scores == scores.max()].mean().item())  # top scores may be tied
        chances.append(best.mean().item())
    tau, top = torch.tensor(taus), torch.tensor(tops)
    report = {
        "rankings": len(asked),
        "kendall_tau": tau.mean().item(),
        "kendall_tau_stderr": clustered_stderr(tau, clusters),
        "top1": top.mean().item(),
        "top1_stderr": clustered_stderr(top, clusters),
        "top1_chance": sum(chances) / len(chances),
        **pair_report(pairs_of_rankings(asked)),
    }
    return round_figures(report, digits=None)


def pairs_of_rankings(rankings: Sequence[JudgedRanking]) -> JudgedPairs:
    """Every pair of responses to one prompt whose ranks differ."""
    pairs = [
        (ranking, better, worse)
        for ranking in rankings
        for better, first in enumerate(ranking.ranks)
        for worse, second in enumerate(ranking.ranks)
        if first < second
    ]
    return JudgedPairs(
        chosen=torch.stack([ranking.scores[better] for ranking, better, _ in pairs]),
        rejected=torch.stack([ranking.scores[worse] for ranking, _, worse in pairs]),
        chosen_lengths=[ranking.lengths[better] for ranking, better, _ in pairs],
        rejected_lengths=[ranking.lengths[worse] for ranking, _, worse in pairs],
        margins=[ranking.ranks[worse] - ranking.ranks[better] for ranking, better, worse in pairs],
        groups=[ranking.group for ranking, _, _ in pairs],
        clusters=[ranking.cluster for ranking, _, _ in pairs],
        selected=[ranking.selected for ranking, _, _ in pairs],
    )


def label_report(
    scores: Tensor, labels: Tensor, clusters: Sequence[Hashable], names: Sequence[str] = ()
) -> Report:
    """Of a scorer of responses or steps that are right or wrong; a score is the logit of right.

    The calibration is that of sigmoid(score) as the probability of right. The base rate is the
    accuracy of always giving the more frequent label.

    Args:
        scores: (N,) logits.
        labels: (N,) 1 is right, 0 wrong; a share of votes counts as that share.
        clusters: the prompt of each.
        names: the part of the data that each is of; none where the data does not say.
    """
    scores, labels = scores.double(), labels.double()
    says_right = accuracy(scores, torch.zeros_like(scores))
    hits = says_right * labels + (1 - says_right) * (1 - labels)
    right = labels.mean().item()
    report = {
        "labels": len(hits),
        "prompts": len(set(clusters)),
        **share(hits, clusters),
        "base_rate": max(right, 1 - right),
        "auc": area_under_curve(scores, labels),
        "loss": logistic_loss(scores, labels).mean().item(),
        **plain(calibration_error(scores.sigmoid(), labels)),
        "by_group": groups(hits, clusters, names),
    }
    return round_figures(report, digits=None)


def regression_report(scores: Tensor, targets: Tensor, clusters: Sequence[Hashable]) -> Report:
    """Of a scorer of responses with a number: mean squared error, share of variance explained.

    Args:
        scores, targets: (N,) in the same units.
        clusters: the prompt of each.
    """
    scores, targets = scores.double(), targets.double()
    errors = regression_loss(scores, targets)
    unexplained = errors.sum() / regression_loss(targets.mean(), targets).sum()
    report = {
        "targets": len(targets),
        "prompts": len(set(clusters)),
        "mse": errors.mean().item(),
        "mse_stderr": clustered_stderr(errors, clusters),
        "r2": 1 - unexplained.item(),  # not a number where the targets do not vary
        "correlation": correlation(scores, targets),
    }
    return round_figures(report, digits=None)


def pair_calibration(log_odds: Tensor, outcomes: Tensor, clusters: Sequence[Hashable]) -> Report:
    """How far the probabilities of one who judges pairs are those with which a side is preferred.

    Brier's score (1950) is the mean of (p - outcome)^2, one quarter of who always says one half.
    The calibration error is that of the side which the judge prefers, as in `pair_report`. Neither
    depends on which side of a pair is called the first.

    Args:
        log_odds: (N,) that the first of two is better.
        outcomes: (N,) 1 where it was preferred, 0 where the other one was, one half at a tie.
        clusters: the prompt of each.
    """
    scores = (log_odds.sigmoid() - outcomes).square()
    right = 0.5 + (outcomes - 0.5) * log_odds.sign()
    return {
        "pairs": len(scores),
        "prompts": len(set(clusters)),
        "brier": scores.mean().item(),
        "brier_stderr": clustered_stderr(scores, clusters),
        **plain(calibration_error(log_odds.abs().sigmoid(), right, PAIR_BINS)),
    }


def calibration_of(report: Report) -> Calibration:
    """The calibration that a report holds, to draw it."""
    error = report["calibration_error"]
    bins = [Bin(**each) for each in report["calibration_bins"]]
    return Calibration(math.nan if error is None else error, bins)


# ------------------------------------------------------------------ rows and their scores


def judge(items: Sequence[Answers], scores: Sequence[Tensor], target: str | None = None) -> Report:
    """The report that fits the rows.

    Args:
        items: of one kind of row.
        scores: per item (K,) of its responses, or of its steps.
        target: of feedback, `label` or `score`.
    """
    clusters = [str(item.row.prompt) for item in items]
    if isinstance(items[0].row, Ranking):
        judged = zip(items, scores, clusters, strict=True)
        return ranking_report([ranking_of(item, each, cluster) for item, each, cluster in judged])
    if isinstance(items[0].row, Preference):
        chosen, rejected = torch.stack(list(scores)).unbind(-1)
        sides = [lengths_of(item) for item in items]
        return pair_report(
            JudgedPairs(
                chosen,
                rejected,
                [better for better, _ in sides],
                [worse for _, worse in sides],
                [item.row.margin for item in items],
                [item.row.group for item in items],
                clusters,
                [selected_by(item) for item in items],
            )
        )
    every = torch.cat(list(scores))
    if target == "score":
        targets = torch.tensor([item.row.score for item in items])
        return regression_report(every, targets, clusters)
    if isinstance(items[0].row, Feedback):
        labels = torch.tensor([float(item.row.label) for item in items])
        return label_report(every, labels, clusters, [item.row.group for item in items])
    steps = [item.row.labels[: len(item.ends)] for item in items]
    repeated = [c for c, labels in zip(clusters, steps, strict=True) for _ in labels]
    return label_report(every, torch.tensor([x for labels in steps for x in labels]), repeated)


def ranking_of(item: Answers, scores: Tensor, cluster: Hashable) -> JudgedRanking:
    """A ranking and its scores."""
    row = item.row
    return JudgedRanking(scores, row.ranks, lengths_of(item), cluster, row.group, selected_by(item))


def selected_by(item: Answers) -> str:
    """The rule by which a row came to be labelled, as label says it; "" where it says nothing."""
    said = item.row.columns.get("selected")
    return said if isinstance(said, str) else ""


def lengths_of(item: Answers) -> list[int]:
    """Tokens of each response."""
    return [len(response) for response in item.responses]


def with_order_reversed(items: Sequence[Answers]) -> list[Answers]:
    """The same responses in reverse order, to find a scorer that hears it."""
    return [replace(item, responses=item.responses[::-1]) for item in items]


def with_prompts_exchanged(items: Sequence[Answers]) -> list[Answers]:
    """The same responses after the prompt of another row, the next one with a different prompt.

    What remains of the accuracy is what the responses show without their prompt.
    """
    count = len(items)
    exchanged = []
    for i, item in enumerate(items):
        after = (items[(i + step) % count].prompt for step in range(1, count))
        other = next((prompt for prompt in after if prompt != item.prompt), item.prompt)
        exchanged.append(replace(item, prompt=other))
    return exchanged


def figures(report: Report) -> dict[str, float]:
    """The numbers of a report as metrics: eval/accuracy and so on, and the accuracy on each source;
    not a number where undefined.
    """
    told = {f"eval/{name}": value for name, value in numbers_in(report).items()}
    for part in report.get("by_source", []):
        told |= {
            f"eval/source/{part['source']}/{name}": value
            for name, value in part.items()
            if name.startswith("accuracy")
        }
    return {name: math.nan if value is None else float(value) for name, value in told.items()}


def numbers_in(report: Report) -> Report:
    """A report without its tables."""
    return {
        name: value
        for name, value in report.items()
        if value is None or isinstance(value, float | int)
    }


# ------------------------------------------------------------------ parts of reports


def share(hits: Tensor, clusters: Sequence[Hashable]) -> Report:
    """Accuracy with its standard error and 95% interval, clustered by prompt."""
    estimate = clustered_share(hits, clusters)
    return {
        "accuracy": estimate.mean,
        "accuracy_stderr": estimate.stderr,
        "accuracy_low": estimate.low,
        "accuracy_high": estimate.high,
    }


def plain(calibration: Calibration) -> Report:
    """Error and bins as they stand in a report."""
    return {
        "calibration_error": calibration.error,
        "calibration_bins": [asdict(each) for each in calibration.bins],
    }


def buckets(
    hits: Tensor, clusters: Sequence[Hashable], margins: Sequence[float | None]
) -> list[Report]:
    """Accuracy by quartile of the known margins; equal margins are never parted."""
    known = [i for i, margin in enumerate(margins) if margin is not None]
    if not known:
        return []
    values = torch.tensor([margins[i] for i in known], dtype=torch.double)
    distinct = values.unique()
    if len(distinct) <= BUCKETS:  # grades such as 1, 2, 3: a bucket each
        cuts = distinct[1:]
    else:
        cuts = values.quantile(torch.arange(1, BUCKETS).double() / BUCKETS)
    places = torch.bucketize(values, cuts, right=True)
    quartiles = []
    for place in range(BUCKETS):
        inside = places == place
        if inside.any():
            ends = {"low": values[inside].min().item(), "high": values[inside].max().item()}
            members = [known[i] for i in inside.nonzero().flatten().tolist()]
            quartiles.append({**ends, **part(hits, clusters, members)})
    return quartiles


def groups(
    hits: Tensor, clusters: Sequence[Hashable], names: Sequence[str], called: str = "group"
) -> list[Report]:
    """Accuracy by group, where there is more than one."""
    distinct = sorted(set(names) - {""})
    if len(distinct) < 2:
        return []
    return [
        {called: group, **part(hits, clusters, [i for i, n in enumerate(names) if n == group])}
        for group in distinct
    ]


def part(hits: Tensor, clusters: Sequence[Hashable], members: Iterable[int]) -> Report:
    """Accuracy on some of the pairs."""
    places = list(members)
    return {"pairs": len(places), **share(hits[places], [clusters[i] for i in places])}
