"""What every source of a reward offers: a check of rows, and scores of responses or steps."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from rlhf_cli.data.kinds import Prompt
from rlhf_cli.rollout.rollouts import Rollout

Require = Callable[[str, float, bool, str], None]
"""How a stage records a hand-off check: name, value, whether it holds, diagnosis."""


@dataclass
class Cut:
    """The steps of a response: the index in its ids of each step's last token, and their texts."""

    ends: list[int]
    texts: list[str]


class RewardSource(ABC):
    """One term of a reward.

    step_end: what ends a step of a response, where this source judges steps; else None.
    """

    step_end: str | None = None

    def __init__(self, spec: str) -> None:
        self.spec = spec

    @abstractmethod
    def check(self, rows: Sequence[Prompt], require: Require, role: str) -> None:
        """The rows have what this source reads, and it is any good; `role` names it in checks."""

    @abstractmethod
    def score(self, rollouts: Sequence[Rollout]) -> Tensor:
        """(B,) of each response; NaN where this does not apply, infinite where it failed."""

    def score_steps(self, rollouts: Sequence[Rollout], cuts: Sequence[Cut]) -> list[Tensor]:
        """(n_i,) of each step of each response; NaN where unknown, infinite where it failed."""
        raise NotImplementedError(f"{self.spec} judges whole responses")
