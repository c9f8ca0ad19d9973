"""Reward models: losses of scores that a model gives to responses.

Shapes: N pairs, responses or steps; P prompts with up to K responses each. Scores are unbounded
reals, and a difference of one multiplies the odds of being preferred by e. All losses are per item,
in nats where they are likelihoods.

The losses over comparisons see differences within a prompt only, so they leave the scores free up
to a constant per prompt; `centring_penalty` is what ties it.
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    label_smoothing: Tensor | float = 0.0,
) -> Tensor:
    """-(1 - e) log sigmoid(d) - e log sigmoid(-d) with d = r_w - r_l - m, for each pair.

    Without margin m and smoothing e it is InstructGPT 2203.02155 eq. 1 with K = 2. The margin
    (Llama 2 2307.09288 eq. 2) asks for a larger difference where the preference was stronger. Both
    together: the margin shifts either term, so the loss is least at r_w - r_l = m + logit(1 - e).

    Args:
        chosen, rejected: (N,) scores r_w and r_l.
        margin: (N,) m >= 0 in units of the score; None is 0.
        label_smoothing: assumed share e of flipped labels, 0 <= e < 0.5. Or (N,) the chance of each
            that its sides are the wrong way round, 1 - p of a soft label p (RLAIF 2309.00267 sec.
            2.2): the cross-entropy of sigmoid(d) with p.

    Returns:
        (N,) losses; ln 2 at equal scores and no margin.
    """
    d = chosen - rejected if margin is None else chosen - rejected - margin
    return -(1 - label_smoothing) * logsigmoid(d) - label_smoothing * logsigmoid(-d)


def centring_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(r_w + r_l)^2 for each pair, which pulls the mean score of a prompt to 0.

    Added with a small weight, such as 0.01 (Eisenstein 2312.09244). Shapes (N,) each.
    """
    return (chosen + rejected) ** 2


def kwise_loss(scores: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """-1/C(K,2) sum over pairs with rank_i < rank_j of log sigmoid(s_i - s_j), for each prompt.

    InstructGPT 2203.02155 eq. 1: all comparisons of a prompt are one item, for K forward passes
    and not K (K - 1). A tie is no comparison and adds nothing; the weight stays 1/C(K,2), so a
    prompt with ties counts for less.

    Args:
        scores: (P, K).
        ranks: (P, K), 1 is best.
        mask: (P, K) bool, True at real responses; the K of the weight is their number.

    Returns:
        (P,) losses; 0 where fewer than two responses are real.
    """
    scores = torch.where(mask, scores, 0.0)  # whatever stands in the padding, NaN included
    compared = _below(ranks, mask)
    losses = torch.where(compared, -logsigmoid(scores[:, :, None] - scores[:, None, :]), 0.0)
    count = mask.sum(-1)
    return losses.sum((1, 2)) / (count * (count - 1) / 2).clamp(min=1)


def plackett_luce_loss(scores: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """sum over i of [logsumexp of s over i and all that rank strictly below i, minus s_i].

    Without ties it is the negative log-likelihood of the whole ranking: the best is picked from
    all, the next from those that are left, and so on (Plackett 1975; listwise MLE, Xia 2008). It
    is log K! at equal scores, and `bradley_terry_loss` at K = 2.

    With ties each factor is the probability that i is picked from itself and all strictly below,
    and tied responses are not compared with each other. Where only the last places are tied, as
    when just the k best were ranked, this is the exact likelihood of that top-k ranking: a last
    tied response has nothing below it and adds 0.

    Args:
        scores: (P, K).
        ranks: (P, K), 1 is best.
        mask: (P, K) bool, True at real responses.

    Returns:
        (P,) losses.
    """
    scores = torch.where(mask, scores, 0.0)
    # i itself is always a candidate, so no row is empty (its gradient would be NaN); a padded i is
    # the only one in its row and adds exactly 0
    itself = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    candidates = _below(ranks, mask) | itself  # (P, K, K)
    rivals = scores[:, None, :].masked_fill(~candidates, float("-inf"))
    return (torch.logsumexp(rivals, -1) - scores).sum(-1)


def ranking_accuracy(scores: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """Share of the untied pairs of each prompt that the scores order rightly; shapes as above.

    A tie of scores is half right, and a prompt without such a pair 0. (P,).
    """
    compared = _below(ranks, mask)
    difference = (scores[:, :, None] - scores[:, None, :]).detach()
    right = (difference > 0).float() + 0.5 * (difference == 0).float()
    return (right * compared).sum((1, 2)) / compared.sum((1, 2)).clamp(min=1)


def _below(ranks: Tensor, mask: Tensor) -> Tensor:
    """(P, K, K) bool: [p, i, j] is True where both are real and j ranks strictly below i."""
    return (ranks[:, :, None] < ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]


def logistic_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """-t log sigmoid(s) - (1 - t) log sigmoid(-s): the score is the logit of being good.

    For labels of single responses (verifiers, Cobbe 2110.14168) and of single steps (process
    supervision, Lightman 2305.20050).

    Args:
        scores: (N,) logits.
        labels: (N,) float t in [0, 1]; between the ends it is a share of votes.

    Returns:
        (N,) losses; ln 2 at score 0.
    """
    return binary_cross_entropy_with_logits(scores, labels, reduction="none")


def regression_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """(s - t)^2, without a factor 1/2: least squares on ratings. Shapes (N,) each."""
    return (scores - targets) ** 2
