"""Log-probs, values and scores of many sequences without gradient, in the order given."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rlhf_cli.config.errors import RunError
from rlhf_cli.config.schema import Hardware
from rlhf_cli.data.batches import AnswerBatch, Batch, collate, cut
from rlhf_cli.data.tokens import Answers, Tokens
from rlhf_cli.models.forward import (
    answer_batch,
    answer_logprobs,
    answer_scores,
    sequence_scores,
    state_values,
    token_logprobs,
    token_scores,
    trunk_values,
)
from rlhf_cli.models.out_of_memory import in_groups, keys_that_help, oom_error


@torch.no_grad()
def _each(
    sequences: Sequence[Tokens],
    hardware: Hardware,
    model: nn.Module,
    of_batch: Callable[[Batch], list[Tensor]],
    logits: bool = False,
) -> list[Tensor]:
    """`of_batch` over micro-batches; results on the CPU, in the order of `sequences`.

    Args:
        logits: whether it computes logits.

    Raises:
        RunError: memory is too small for one sequence.
    """
    device = next(model.parameters()).device
    found: list[Tensor] = [torch.empty(0)] * len(sequences)
    places = cut(range(len(sequences)), hardware.tokens_per_microbatch, lambda i: len(sequences[i]))

    def score(group: list[int]) -> list[Tensor]:
        batch = collate([sequences[i] for i in group], device)
        return [values.cpu() for values in of_batch(batch)]

    def failure(group: list[int]) -> RunError:
        longest = len(sequences[group[0]])
        return oom_error("scoring", 1, longest, keys_that_help(hardware, longest, logits=logits))

    for group, scores in in_groups(places, score, failure):
        for i, values in zip(group, scores, strict=True):
            found[i] = values
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

    return _each(sequences, hardware, model, of_batch, logits=True)


def values_of(critic: nn.Module, sequences: Sequence[Tokens], hardware: Hardware) -> list[Tensor]:
    """(len(response),) value of the state in which each response token was drawn."""

    def of_batch(batch: Batch) -> list[Tensor]:
        grid = state_values(critic, batch)
        return list(grid[batch.response].split(batch.response.sum(-1).tolist()))

    return _each(sequences, hardware, critic, of_batch)


def trunk_values_of(
    policy: nn.Module, head: nn.Linear, sequences: Sequence[Tokens], hardware: Hardware
) -> list[Tensor]:
    """What `values_of` gives, by a value head on the policy's trunk."""

    def of_batch(batch: Batch) -> list[Tensor]:
        grid = trunk_values(policy, head, batch)
        return list(grid[batch.response].split(batch.response.sum(-1).tolist()))

    return _each(sequences, hardware, policy, of_batch)


def token_scores_of(
    scorer: nn.Module, sequences: Sequence[Tokens], hardware: Hardware
) -> list[Tensor]:
    """(len(response),) raw scores at each response token."""

    def of_batch(batch: Batch) -> list[Tensor]:
        grid = token_scores(scorer, batch)
        return list(grid[batch.response].split(batch.response.sum(-1).tolist()))

    return _each(sequences, hardware, scorer, of_batch)


def scores_of(scorer: nn.Module, sequences: Sequence[Tokens], hardware: Hardware) -> Tensor:
    """(N,) raw scores at the last token of each sequence."""
    rows = _each(sequences, hardware, scorer, lambda batch: list(sequence_scores(scorer, batch)))
    return torch.stack(rows)


def mean_nll(model: nn.Module, sequences: Sequence[Tokens], hardware: Hardware) -> float:
    """Mean negative log-likelihood per response token, in nats, summed in float64."""
    logprobs = torch.cat(logprobs_of(model, sequences, hardware)).double()
    return -logprobs.mean().item()


def answer_logprobs_of(
    model: nn.Module,
    groups: Sequence[Answers],
    hardware: Hardware,
    share: bool,
    advance: Callable[[int], None] = lambda count: None,
) -> list[list[Tensor]]:
    """(len(response),) log-probs of the tokens of each response of each group.

    Args:
        share: whether prompts may be computed once; where it does not pay they are not.
        advance: told how many groups are done.
    """

    def of_batch(batch: AnswerBatch) -> list[Tensor]:
        grid = answer_logprobs(model, batch, chunk=hardware.logprob_chunk)
        return list(grid[batch.response].cpu().split(batch.response.sum(-1).tolist()))

    return _each_group(groups, hardware, share, model, of_batch, advance, logits=True)


def answer_scores_of(
    scorer: nn.Module, groups: Sequence[Answers], hardware: Hardware, share: bool
) -> list[Tensor]:
    """(K,) raw scores of each group's responses; share as in answer_logprobs_of."""

    def of_batch(batch: AnswerBatch) -> list[Tensor]:
        return list(answer_scores(scorer, batch).cpu())

    return [
        torch.stack(scores) for scores in _each_group(groups, hardware, share, scorer, of_batch)
    ]


@torch.no_grad()
def _each_group(
    groups: Sequence[Answers],
    hardware: Hardware,
    share: bool,
    model: nn.Module,
    of_batch: Callable[[AnswerBatch], list[Tensor]],
    advance: Callable[[int], None] = lambda count: None,
    logits: bool = False,
) -> list[list[Tensor]]:
    """`of_batch`, a tensor per response, over micro-batches; results in the order of `groups`.

    Args:
        logits: whether it computes logits.

    Raises:
        RunError: memory is too small for the responses of one group.
    """
    found: list[list[Tensor]] = [[]] * len(groups)
    places = cut(
        range(len(groups)),
        hardware.tokens_per_microbatch,
        length=lambda i: len(groups[i]),
        count=lambda i: len(groups[i].responses),
    )

    def score(some: list[int]) -> list[Tensor]:
        return of_batch(answer_batch(model, [groups[i] for i in some], share))

    def failure(some: list[int]) -> RunError:
        group = groups[some[0]]
        keys = keys_that_help(hardware, len(group), logits=logits)
        return oom_error("scoring", len(group.responses), len(group), keys)

    for some, scores in in_groups(places, score, failure):
        of_responses = iter(scores)
        for i in some:
            found[i] = [next(of_responses) for _ in groups[i].responses]
        advance(len(some))
    return found
