"""The learning rate over the steps of a run, as a share of its peak.

As transformers has them, whose module brings peft along at every start.
"""

import math
from collections.abc import Callable
from functools import partial

from rlhf_cli.config.schema.algorithms import OptimizerConfig


def schedule_of(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """Step, counted from 0 -> share of the peak rate: linear warm-up, then as lr_schedule says."""
    return partial(share_of_peak, config, total_steps)


def share_of_peak(config: OptimizerConfig, total_steps: int, step: int) -> float:
    """Of the peak rate at a step, counted from 0."""
    warmup = config.warmup_steps
    if step < warmup:
        return step / warmup
    if config.lr_schedule == "constant":
        return 1.0
    length = max(1, total_steps - warmup)
    if config.lr_schedule == "linear":
        return max(0.0, (total_steps - step) / length)
    share = 0.5 * (1 + math.cos(math.pi * ((step - warmup) / length)))
    return max(0.0, share * (1 - config.min_lr_ratio) + config.min_lr_ratio)
