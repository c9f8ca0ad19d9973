"""The only way to a response: weights in, rollouts out. An engine knows nothing of any stage."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from rlhf_cli.data.items import EncodedPrompt
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.rollout.sampling import Sampling


class Kept(Protocol):
    """Where responses are kept as they are made, so that a run that was ended goes on from there.

    done: the prompts, by place, that all responses are there for.
    """

    done: Mapping[int, list[Rollout]]

    def keep(self, made: Mapping[int, list[Rollout]]) -> None:
        """Keep all responses to some more prompts, by place."""


@dataclass(frozen=True)
class Order:
    """What is to be sampled: `samples` responses to each prompt whose place is in `left`.

    first, seed, advance: as `Engine.sample` has them.
    resumable: whether what is done is kept as it is made.
    """

    prompts: Sequence[EncodedPrompt]
    left: Sequence[int]
    sampling: Sampling
    samples: int
    first: int
    seed: int
    advance: Callable[[int], None]
    resumable: bool


class Engine(ABC):
    """Samples responses from the weights that it was last given."""

    @property
    @abstractmethod
    def exact(self) -> bool:
        """Whether its log-probs are those that training computes, up to float32 rounding."""

    @property
    def foreign(self) -> bool:
        """Whether another program samples, whose arithmetic is its own even where the weights are
        the same; algo.rollout_correction=auto corrects for it.
        """
        return False

    @abstractmethod
    def update(self, model: nn.Module) -> None:
        """Sample from the weights that the policy has now."""

    def sample(
        self,
        prompts: Sequence[EncodedPrompt],
        sampling: Sampling,
        *,
        samples: int = 1,
        first: int = 0,
        seed: int,
        advance: Callable[[int], None] = lambda count: None,
        kept: Kept | None = None,
    ) -> list[Rollout]:
        """`samples` responses to each prompt, prompt by prompt.

        Args:
            prompts: from Encoder.prompts.
            first: the place of the first prompt among all that are sampled in turn.
            seed: fixes every draw with that place, whatever else is sampled beside it.
            advance: told how many more responses are done.
            kept: what it has is not sampled again, and what is sampled goes there.

        Raises:
            RunError: memory is too small for one response, the model's logits are not finite, or a
                server does not answer as it should.
        """
        rollouts = dict(kept.done) if kept is not None else {}
        left = [place for place in range(len(prompts)) if place not in rollouts]
        given = samples, first, seed, advance, kept is not None
        for made in self._made(Order(prompts, left, sampling, *given)):
            rollouts |= made
            if kept is not None:
                kept.keep(made)
        return [rollout for place in range(len(prompts)) for rollout in rollouts[place]]

    @abstractmethod
    def _made(self, order: Order) -> Iterator[Mapping[int, list[Rollout]]]:
        """All responses to some of the prompts that are left, by place, as they are done."""
