"""How long a sequence a loaded model takes."""

from torch import nn

from rlhf_cli.folders.geometry import context_of
from rlhf_cli.models.decoder import unwrap


def positions_of(model: nn.Module) -> int | None:
    """The longest sequence that a model takes, in tokens; None where nothing limits it."""
    base = unwrap(model)
    shapes = {name: tuple(weight.shape) for name, weight in base.named_parameters()}
    return context_of(base.config.to_dict(), shapes)
