"""Mean and variance of all values seen so far."""

from dataclasses import dataclass

from torch import Tensor

from rlhf_cli.objectives.rounding import EQUAL


@dataclass
class RunningMoments:
    """Moments that grow batch by batch, to divide rewards by the spread of all rewards so far."""

    mean: float = 0.0
    var: float = 0.0
    """Of the values seen: ddof 0."""
    count: int = 0

    def update(self, values: Tensor) -> None:
        """Take in (N,) values; NaN, which marks a missing one, and infinities are left out.

        Source: Chan, Golub and LeVeque 1979, eq. 2.1: no difference of large squares.
        """
        values = values[values.isfinite()].double()
        if not len(values):
            return
        total = self.count + len(values)
        delta = values.mean().item() - self.mean
        within = self.var * self.count + values.var(correction=0).item() * len(values)
        self.var = (within + delta**2 * self.count * len(values) / total) / total
        self.mean += delta * len(values) / total
        self.count = total

    @property
    def varies(self) -> bool:
        """Whether the values differ by more than rounding."""
        return self.std > EQUAL * max(1.0, abs(self.mean))

    @property
    def std(self) -> float:
        """Estimated standard deviation, ddof 1; 0 where fewer than two values were seen."""
        return (self.var * self.count / max(self.count - 1, 1)) ** 0.5
