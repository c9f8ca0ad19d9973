"""How far training is from the arithmetic that sampled.

With d = log pi - log pi_sampled of a token that was drawn, where both are of the same weights: 0
but for rounding. What is left makes the ratio of the first update other than 1, and its expected
gradient another one.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_cli.objectives.kl import k3
from rlhf_cli.training.loss_term import Metrics

SOUND = 0.01  # mean |d| in nats; more is called a problem of precision wherever it was measured
FAR = math.log(2)


def mismatch(gaps: Sequence[Tensor]) -> Metrics:
    """What is logged of d: its mean and greatest sizes, and what it makes of ratios.

    Args:
        gaps: d of each response, (len(response),) each, on the CPU.

    Returns:
        sampling_gap, sampling_gap_p99, sampling_gap_max: of |d|, in nats.
        sampling_kl: KL(sampled || trained) per token, by k3.
        sampling_far: share of tokens whose ratio exp(d) lies outside 1/2 .. 2.
        sampling_ratio_max: the greatest ratio of a whole response.
    """
    tokens = torch.cat(list(gaps)).double()
    sizes = tokens.abs()
    rank = math.ceil(0.99 * len(sizes))
    responses = torch.stack([each.sum() for each in tokens.split([len(gap) for gap in gaps])])
    return {
        "sampling_gap": sizes.mean().item(),
        "sampling_gap_p99": sizes.kthvalue(rank).values.item(),
        "sampling_gap_max": sizes.max().item(),
        "sampling_kl": k3(torch.zeros_like(tokens), tokens).mean().item(),
        "sampling_far": (sizes > FAR).double().mean().item(),
        "sampling_ratio_max": responses.max().exp().item(),
    }
