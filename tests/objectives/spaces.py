"""Spaces of a few responses, where every expectation is a sum and every optimum is known.

A policy is a table of logits for each position, so it can be any distribution over the responses,
and what a method settles at is a matter of its objective alone.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_cli.objectives.kl import k1

Tables = tuple[Tensor, ...]
"""Logits of the first token (V,), of the second after each first (V, V), and so on."""


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Space:
    """N responses of up to T tokens, with a reference, rewards and the strength of the tie."""

    responses: Tensor  # (N, T) ids
    mask: Tensor  # (N, T) bool, the tokens up to the end
    reference: Tables
    reward: Tensor  # (N,)
    beta: float = 0.5

    def start(self) -> Tables:
        """The reference, to be trained."""
        return tuple(table.clone().requires_grad_() for table in self.reference)

    def logprobs(self, policy: Tables) -> Tensor:
        """(N, T) log-probs of the tokens of all responses, zero after the end."""
        chosen = [
            torch.log_softmax(table, -1)[tuple(self.responses[:, : t + 1].T)]
            for t, table in enumerate(policy)
        ]
        return torch.where(self.mask, torch.stack(chosen, -1), 0.0)

    def logits(self, policy: Tables) -> Tensor:
        """(N, T, V) logits of each token's context."""
        count, size = len(self.responses), len(policy[0])
        rows = [
            table[tuple(self.responses[:, :t].T)].expand(count, size)
            for t, table in enumerate(policy)
        ]
        return torch.stack(rows, 1)

    def probabilities(self, policy: Tables) -> Tensor:
        """(N,) probabilities of the responses, without gradient."""
        return self.logprobs(policy).sum(-1).exp().detach()

    @property
    def optimum(self) -> Tensor:
        """(N,) pi_ref exp(r / beta) / Z."""
        return torch.softmax(self.logprobs(self.reference).sum(-1) + self.reward / self.beta, -1)

    def log_z(self) -> float:
        """log Z of the optimum."""
        tilted = self.logprobs(self.reference).sum(-1) + self.reward / self.beta
        return torch.logsumexp(tilted, -1).item()

    def distance(self, policy: Tables, other: Tensor | None = None) -> float:
        """Total variation to `other`, or to the optimum."""
        other = self.optimum if other is None else other
        return (self.probabilities(policy) - other).abs().sum().item() / 2

    def objective(self, policy: Tables) -> Tensor:
        """E[r] - beta KL(pi || ref), exactly and with its gradient."""
        ours, theirs = self.logprobs(policy), self.logprobs(self.reference)
        shaped = self.reward - self.beta * k1(ours, theirs).sum(-1)
        return (ours.sum(-1).exp() * shaped).sum()


def minimise(parameters: Iterable[Tensor], loss: Callable[[], Tensor]) -> None:
    """Exact gradients, to convergence."""
    optimizer = torch.optim.LBFGS(
        list(parameters),
        max_iter=2000,
        tolerance_grad=1e-13,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


ONE = Space(
    responses=torch.arange(7)[:, None],
    mask=torch.ones(7, 1, dtype=torch.bool),
    reference=(drawn(7, seed=1),),
    reward=drawn(7, seed=3),
)
"""One token of seven symbols."""
TWO = Space(
    responses=torch.cartesian_prod(torch.arange(3), torch.arange(3)),
    mask=torch.ones(9, 2, dtype=torch.bool),
    reference=(drawn(3, seed=1), drawn(3, 3, seed=2)),
    reward=drawn(9, seed=3),
)
"""Two tokens of three symbols: nine responses."""
ENDING = Space(
    responses=torch.tensor([[0, 0], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]]),
    mask=torch.tensor([[True, False]] + [[True, True]] * 6),
    reference=TWO.reference,
    reward=drawn(7, seed=11),
)
"""Up to two tokens, where symbol 0 ends the response: seven of them, one shorter."""
