"""Log-probs, values and scores of many sequences without gradient, in the order given."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rlhf_cli.config.schema import Hardware
from rlhf_cli.data.batches import Batch, collate, cut
from rlhf_cli.data.tokens import Tokens
from rlhf_cli.models.forward import sequence_scores, state_values, token_logprobs


@torch.no_grad()
def _each(
    sequences: Sequence[Tokens],
    hardware: Hardware,
    model: nn.Module,
    of_batch: Callable[[Batch], list[Tensor]],
) -> list[Tensor]:
    """`of_batch` over micro-batches; results on the CPU, in the order of `sequences`."""
    device = next(model.parameters()).device
    found: list[Tensor] = [torch.empty(0)] * len(sequences)
    places = cut(range(len(sequences)), hardware.tokens_per_microbatch, lambda i: len(sequences[i]))
    for group in places:
        batch = collate([sequences[i] for i in group], device)
        for i, values in zip(group, of_batch(batch), strict=True):
            found[i] = values.cpu()
    return found


def logprobs_of(
    model: nn.Module, sequences: Sequence[Tokens], hardware: Hardware, temperature: float = 1.0
) -> list[Tensor]:
    """(len(response),) log-probs of each sequence's response tokens."""

    def of_batch(batch: Batch) -> list[Tensor]:
        grid = token_logprobs(
            model, batch, chunk=hardware.logprob_chunk, temperature=temperature
        ).logprobs
        return list(grid[batch.response].split(batch.response.sum(-1).tolist()))

    return _each(sequences, hardware, model, of_batch)


def values_of(critic: nn.Module, sequences: Sequence[Tokens], hardware: Hardware) -> list[Tensor]:
    """(len(response),) value of the state in which each response token was drawn."""

    def of_batch(batch: Batch) -> list[Tensor]:
        grid = state_values(critic, batch)
        return list(grid[batch.response].split(batch.response.sum(-1).tolist()))

    return _each(sequences, hardware, critic, of_batch)


def scores_of(scorer: nn.Module, sequences: Sequence[Tokens], hardware: Hardware) -> Tensor:
    """(N,) raw scores at the last token of each sequence."""
    rows = _each(sequences, hardware, scorer, lambda batch: list(sequence_scores(scorer, batch)))
    return torch.stack(rows)


def mean_nll(model: nn.Module, sequences: Sequence[Tokens], hardware: Hardware) -> float:
    """Mean negative log-likelihood per response token, in nats, summed in float64."""
    logprobs = torch.cat(logprobs_of(model, sequences, hardware)).double()
    return -logprobs.mean().item()
