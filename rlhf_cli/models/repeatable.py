"""Sums on a GPU in the same order each time, where that matters, so that a run can be repeated.

torch's switch has three settings, and warn_only is not what it seems: attention then stays as it
is, in an order that differs from pass to pass (ATen/native/transformers/cuda/attention_backward.cu
takes the fixed order only where errors are asked for). So gradients are computed under the strict
setting. Where a model has an operator that knows no fixed order, it goes on without, and says so.
"""

import os
import re
from collections.abc import Callable
from typing import TypeVar

import torch

from rlhf_cli.reporting.console import say

Result = TypeVar("Result")

NO_FIXED_ORDER = re.compile(r"(\S+) does not have a deterministic implementation")
_loose: set[str] = set()
"""Operators that were met and have no fixed order."""


def ask_for_repeatable_sums() -> None:
    """Have the kernels of CUDA sum in the same order each time, before the first of them runs."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Else each new tensor is filled with NaN first: a kernel for every operator.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def repeatably(work: Callable[[], Result], again: Callable[[], object]) -> Result:
    """What `work` gives, its gradients summed in the same order each time where they can be.

    Args:
        again: what to do before `work` is done once more.
    """
    if _loose or not torch.are_deterministic_algorithms_enabled():
        return work()
    torch.use_deterministic_algorithms(True)
    try:
        return work()
    except RuntimeError as error:
        found = NO_FIXED_ORDER.search(str(error))
        if found is None:
            raise
        _loose.add(found[1])
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
    say(f"note: {found[1]} sums in no fixed order; a run that is repeated may differ by rounding")
    again()
    return work()
