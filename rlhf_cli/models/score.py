"""Log-probs, values and scores of many items without gradient: a result per response, in order.

Items are sequences, of one response each, or groups of responses to one prompt. All results are on
the CPU. `share` says of groups whether prompts may be computed once, by `shares_prompts`; where it
does not pay they are not.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rlhf_cli.config.errors import RunError
from rlhf_cli.config.schema import Hardware
from rlhf_cli.data.batches import Batch, collate, cut
from rlhf_cli.data.items import Answers, Tokens
from rlhf_cli.models.forward import (
    answer_batch,
    response_scores,
    state_values,
    token_logprobs,
    token_scores,
    trunk_values,
)
from rlhf_cli.models.out_of_memory import in_groups, keys_that_help, oom_error

Items = Sequence[Tokens] | Sequence[Answers]


@torch.no_grad()
def _each(
    items: Items,
    hardware: Hardware,
    model: nn.Module,
    of_batch: Callable[[Batch], list[Tensor]],
    *,
    share: bool = False,
    advance: Callable[[int], None] = lambda count: None,
    logits: bool = False,
) -> list[Tensor]:
    """`of_batch`, a tensor per response, over micro-batches; results in the order of the items.

    Args:
        advance: told how many items are done.
        logits: whether it computes logits.

    Raises:
        RunError: memory is too small for the responses of one item.
    """
    of_items: list[list[Tensor]] = [[]] * len(items)
    places = cut(
        range(len(items)),
        hardware.tokens_at_once,
        length=lambda i: len(items[i]),
        count=lambda i: len(items[i].responses),
    )

    def work(group: list[int]) -> list[Tensor]:
        return of_batch(_batch_of([items[i] for i in group], model, share))

    def failure(group: list[int]) -> RunError:
        item = items[group[0]]
        keys = keys_that_help(hardware, len(item), logits=logits)
        return oom_error("scoring", len(item.responses), len(item), keys)

    for group, of_group in in_groups(places, work, failure):
        of_responses = iter(of_group)
        for i in group:
            of_items[i] = [next(of_responses) for _ in items[i].responses]
        advance(len(group))
    return [values for of_item in of_items for values in of_item]


def _batch_of(items: Sequence[Tokens | Answers], model: nn.Module, share: bool) -> Batch:
    """Items of one kind, on the model's device."""
    sequences = [item for item in items if isinstance(item, Tokens)]
    if sequences:
        return collate(sequences, next(model.parameters()).device)
    groups = [item for item in items if isinstance(item, Answers)]
    return answer_batch(model, groups, share)


def _by_response(grid: Tensor, batch: Batch) -> list[Tensor]:
    """The values at the tokens of each response, of a grid like batch.response."""
    return list(grid[batch.response].cpu().split(batch.response.sum(-1).tolist()))


def logprobs_of(
    model: nn.Module,
    items: Items,
    hardware: Hardware,
    temperature: float = 1.0,
    *,
    share: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Tensor]:
    """(len(response),) log-probs of the tokens of each response.

    Args:
        advance: told how many items are done.
    """

    def of_batch(batch: Batch) -> list[Tensor]:
        scored = token_logprobs(model, batch, chunk=hardware.logprob_chunk, temperature=temperature)
        return _by_response(scored.logprobs, batch)

    return _each(items, hardware, model, of_batch, share=share, advance=advance, logits=True)


def mean_nll(model: nn.Module, items: Items, hardware: Hardware) -> float:
    """Mean negative log-likelihood per response token, in nats, summed in float64."""
    logprobs = torch.cat(logprobs_of(model, items, hardware)).double()
    return -logprobs.mean().item()


def values_of(critic: nn.Module, sequences: Sequence[Tokens], hardware: Hardware) -> list[Tensor]:
    """(len(response),) values of the states in which each token of a response was drawn."""

    def of_batch(batch: Batch) -> list[Tensor]:
        return _by_response(state_values(critic, batch), batch)

    return _each(sequences, hardware, critic, of_batch)


def trunk_values_of(
    policy: nn.Module, head: nn.Linear, sequences: Sequence[Tokens], hardware: Hardware
) -> list[Tensor]:
    """What `values_of` gives, by a value head on the policy's trunk."""

    def of_batch(batch: Batch) -> list[Tensor]:
        return _by_response(trunk_values(policy, head, batch), batch)

    return _each(sequences, hardware, policy, of_batch)


def token_scores_of(
    scorer: nn.Module, items: Items, hardware: Hardware, *, share: bool = False
) -> list[Tensor]:
    """(len(response),) raw scores at the tokens of each response."""

    def of_batch(batch: Batch) -> list[Tensor]:
        return _by_response(token_scores(scorer, batch), batch)

    return _each(items, hardware, scorer, of_batch, share=share)


def scores_of(
    scorer: nn.Module, items: Items, hardware: Hardware, *, share: bool = False
) -> Tensor:
    """(S,) raw scores at the last token of each response."""

    def of_batch(batch: Batch) -> list[Tensor]:
        return list(response_scores(scorer, batch).cpu())

    return torch.stack(_each(items, hardware, scorer, of_batch, share=share))
