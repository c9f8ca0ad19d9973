"""The weights of a run's networks, by the names that resume points know them by."""

from collections.abc import Mapping

from torch import Tensor, nn

from rlhf_cli.models.adapters import trained
from rlhf_cli.models.masters import master_of
from rlhf_cli.models.shards import is_sharded
from rlhf_cli.runs.slices import Wanted


def all_weights(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The weights of networks, frozen ones too, as they are trained."""
    return {
        f"{name}/{weight}": master_of(value)
        for name, network in networks.items()
        for weight, value in network.named_parameters()
    }


def trained_weights(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What training changes of networks."""
    return {
        f"{name}/{weight}": master_of(value)
        for name, network in networks.items()
        for weight, value in trained(network).items()
    }


def wanted_by(networks: Mapping[str, nn.Module]) -> Wanted | None:
    """The weight as which each tensor of a resume point is to be sharded; None if none is."""
    weights = all_weights(networks)
    if not any(map(is_sharded, weights.values())):
        return None
    steps = {name: list(trained(network).values()) for name, network in networks.items()}
    by_name = {name.partition("/")[2]: weight for name, weight in reversed(weights.items())}

    def wanted(name: str, shape: list[int]) -> Tensor | None:
        group, _, rest = name.partition("/")
        if group == "optimizer":
            network, number, _ = rest.split(".", 2)
            weight: Tensor | None = steps[network][int(number)]
        elif group == "extra":  # weights that were kept; those of other networks are read whole
            kept, _, rest = rest.rpartition("/")
            weight = by_name.get(rest) if kept in ("", "best", "average") else None
        else:
            weight = weights.get(name)
        return weight if weight is not None and list(weight.shape) == shape else None

    return wanted


def tensors_of(tensors: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    """The tensors whose names start with `group/`, without that."""
    start = f"{group}/"
    return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}
