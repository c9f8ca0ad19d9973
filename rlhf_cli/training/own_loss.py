"""A loss of the user's, `algo.loss=path/to/file.py:function`: given by name, and checked.

What it is given and gives is written in docs/feedback.md and docs/online.md.
"""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.config import catalog
from rlhf_cli.config.errors import RunError
from rlhf_cli.config.own_code import function_in, parameters_of, said_by, trace_of
from rlhf_cli.config.schema.stages import Run
from rlhf_cli.config.stages import stage_name
from rlhf_cli.config.switches import given_to
from rlhf_cli.models.out_of_memory import ran_out
from rlhf_cli.reporting.console import say

KEY = "algo.loss"


class OwnLoss:
    """The function that algo.loss names.

    names: what it is given: tensors, and keys of algo.
    """

    def __init__(self, cfg: Run, file: Path, name: str) -> None:
        """Runs the file.

        Raises:
            UserError: it cannot be run.
        """
        self.spec, self._file = f"{KEY}={file}:{name}", file
        parameters = parameters_of(KEY, file, name)
        self.names = given_to(stage_name(cfg), KEY, parameters)
        values = {each: getattr(cfg.algo, each) for each in self.names if hasattr(cfg.algo, each)}
        self._values = {  # where a key is null, the function's own default is meant
            each: value
            for each, value in values.items()
            if value is not None or each not in parameters.names
        }
        self._function = function_in(KEY, file, name)

    def losses(self, **tensors: Tensor) -> Tensor:
        """What it gives, of the shape of the first tensor; these are copies that it may change.

        Args:
            tensors: all that it may name. Where there is a `mask`, what it gives outside counts for
                nothing.

        Raises:
            RunError: it raises, or gives anything else than finite losses with a gradient.
        """
        given = {name: tensor.clone() for name, tensor in tensors.items() if name in self.names}
        try:
            with redirect_stdout(sys.stderr):  # standard output is for the path of what was made
                losses = self._function(**given, **self._values)
        except Exception as error:
            if ran_out(error):  # less at once may fit
                raise
            for line in trace_of(error, self._file):
                say(f"  {line}")
            raise RunError(f"{self.spec}: {said_by(error, self._file)}") from error
        if (fault := fault_of(losses, tensors)) is not None:
            raise RunError(f"{self.spec} {fault}")
        mask = tensors.get("mask")
        return losses if mask is None else torch.where(mask, losses, 0.0)


def fault_of(losses: object, tensors: dict[str, Tensor]) -> str | None:
    """What is wrong with what a loss gave; nothing is where the model itself is not finite."""
    name, first = next(iter(tensors.items()))
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        kind = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        return f"gave {kind}; it must give a tensor of losses, of the shape of {name}"
    if losses.shape != first.shape:
        return f"gave losses of shape {tuple(losses.shape)}, not {tuple(first.shape)} as {name} is"
    if torch.is_grad_enabled() and first.requires_grad and not losses.requires_grad:
        return f"gave losses without a gradient; it must compute them from {name}"
    mask = tensors.get("mask", torch.ones_like(first, dtype=torch.bool))
    sound = all(tensor[mask].isfinite().all() for tensor in tensors.values())
    if sound and not losses[mask].isfinite().all():
        return "gave losses that are not finite, for log-probs that all are"
    return None


def own_loss_of(cfg: Run) -> OwnLoss | None:
    """The loss of the user's that a config names, if it does."""
    loss: Any = getattr(cfg.algo, "loss", None)
    function = None if loss is None else catalog.own_function(stage_name(cfg), KEY, loss)
    return None if function is None else OwnLoss(cfg, *function)
