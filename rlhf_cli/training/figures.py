"""Figures of an optimizer step, read from the device together: each wait for it costs time."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


class Figures:
    """Sums of scalars by name, which stay on their device until they are read."""

    def __init__(self) -> None:
        self._entries: list[tuple[str, Tensor, float]] = []

    def add(self, name: str, value: Tensor, over: float = 1.0) -> None:
        """Add a scalar, divided by `over`, to the figure of a name."""
        self._entries.append((name, value.detach(), over))

    def read(self) -> dict[str, float]:
        """Each figure, summed in float64 in the order in which its parts were added."""
        values = read([value for _, value, _ in self._entries])
        sums: defaultdict[str, float] = defaultdict(float)
        for (name, _, over), value in zip(self._entries, values, strict=True):
            sums[name] += value / over
        return dict(sums)


def read(scalars: Sequence[Tensor]) -> list[float]:
    """The values of scalars of any types; each device is waited for once."""
    places: defaultdict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for place, scalar in enumerate(scalars):
        places[scalar.device, scalar.dtype].append(place)
    values = [0.0] * len(scalars)
    for device in dict.fromkeys(device for device, _ in places):
        kinds = [here for (where, _), here in places.items() if where == device]
        stacked = [torch.stack([scalars[place] for place in here]).double() for here in kinds]
        of_device: list[float] = torch.cat(stacked).tolist()
        for place, value in zip(
            (place for here in kinds for place in here), of_device, strict=True
        ):
            values[place] = value
    return values
