"""Figures of an optimizer step, read from the device together: each wait for it costs time."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_cli.ranks.world import world

EVERYWHERE = -1  # the place of what all ranks have


class Figures:
    """Sums of scalars by name, which stay on their device until they are read.

    place: of the work that figures are added of from now on, among the work that ranks share;
        EVERYWHERE for what each of them does.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[int, str, Tensor, float]] = []
        self.place = EVERYWHERE

    def add(self, name: str, value: Tensor, over: float = 1.0) -> None:
        """Add a scalar, divided by `over`, to the figure of a name."""
        self._entries.append((self.place, name, value.detach(), over))

    def read(self) -> dict[str, float]:
        """Each figure, summed in float64 over all ranks, by place and as its parts were added."""
        values = read([value for *_, value, _ in self._entries])
        parts = [
            (place, name, value / over)
            for (place, name, _, over), value in zip(self._entries, values, strict=True)
        ]
        if world().size > 1:
            shared = [part for part in parts if part[0] != EVERYWHERE]
            gathered = [part for of_rank in world().from_all(shared) for part in of_rank]
            own = [part for part in parts if part[0] == EVERYWHERE]
            parts = sorted(gathered, key=lambda part: part[0]) + own
        sums: defaultdict[str, float] = defaultdict(float)
        for _, name, value in parts:
            sums[name] += value
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
