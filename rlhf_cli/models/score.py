"""Log-probs, values and scores of many items without gradient: a result per response, in order.

Items are sequences, of one response each, or groups of responses to one prompt. All results are on
the CPU.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rlhf_cli.config.errors import RunError
from rlhf_cli.config.schema.hardware import Hardware
from rlhf_cli.data.batches import Batch, micro_batches
from rlhf_cli.data.items import Answers, Tokens
from rlhf_cli.models.forward import (
    response_scores,
    response_states,
    score_head,
    state_values,
    token_logprobs,
    token_scores,
    trunk_values,
)
from rlhf_cli.models.keeping_up import in_shared_groups
from rlhf_cli.models.layouts import batch_of, layout_of
from rlhf_cli.models.out_of_memory import keys_that_help, oom_error
from rlhf_cli.models.sharding import let_go
from rlhf_cli.ranks.progress import Share
from rlhf_cli.ranks.world import world

Items = Sequence[Tokens] | Sequence[Answers]


@torch.no_grad()
def _each(
    items: Items,
    hardware: Hardware,
    model: nn.Module,
    of_batch: Callable[[Batch], list[Tensor]],
    *,
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
    layout = layout_of(model, hardware)
    budget, ranks = hardware.tokens_at_once, world().size
    places = micro_batches(range(len(items)), budget, layout, lambda i: items[i], ranks)

    def work(group: list[int]) -> list[Tensor]:
        return of_batch(batch_of(model, [items[i] for i in group], layout))

    def failure(group: list[int]) -> RunError:
        item = items[group[0]]
        keys = keys_that_help(hardware, len(item), logits=logits)
        return oom_error("scoring", len(item.responses), len(item), keys)

    bar = Share(advance, len(items), sum(map(len, world().dealt(places))))
    groups, own = in_shared_groups(places, work, failure, lambda group: bar.advance(len(group)))
    found = [each for _, of_group in own for each in of_group]
    let_go(model)
    order = [place for rank in range(ranks) for group in groups[rank::ranks] for place in group]
    values = iter(world().gather(found))
    bar.finish()
    of_items = {i: [next(values) for _ in items[i].responses] for i in order}
    return [each for i in range(len(items)) for each in of_items[i]]


def _by_response(grid: Tensor, batch: Batch) -> list[Tensor]:
    """The values at the tokens of each response, of a grid like batch.response."""
    return list(grid.flatten()[batch.scored].cpu().split(batch.response.sum(-1).tolist()))


def logprobs_of(
    model: nn.Module,
    items: Items,
    hardware: Hardware,
    temperature: float = 1.0,
    *,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Tensor]:
    """(len(response),) log-probs of the tokens of each response.

    Args:
        advance: told how many items are done.
    """

    def of_batch(batch: Batch) -> list[Tensor]:
        scored = token_logprobs(
            model, batch, chunk=hardware.logits_at_once, temperature=temperature
        )
        return _by_response(scored.logprobs, batch)

    return _each(items, hardware, model, of_batch, advance=advance, logits=True)


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


def token_scores_of(scorer: nn.Module, items: Items, hardware: Hardware) -> list[Tensor]:
    """(len(response),) raw scores at the tokens of each response."""

    def of_batch(batch: Batch) -> list[Tensor]:
        return _by_response(token_scores(scorer, batch), batch)

    return _each(items, hardware, scorer, of_batch)


def scores_of(scorer: nn.Module, items: Items, hardware: Hardware) -> Tensor:
    """(S,) raw scores at the last token of each response."""

    def of_batch(batch: Batch) -> list[Tensor]:
        return list(response_scores(scorer, batch).cpu().split(1))  # (1,) each

    return torch.cat(_each(items, hardware, scorer, of_batch))


def states_of(scorer: nn.Module, items: Items, hardware: Hardware) -> tuple[Tensor, Tensor]:
    """(S,) raw scores at the last token of each response, and (S, d) what the head reads there."""

    def of_batch(batch: Batch) -> list[Tensor]:
        states = response_states(scorer, batch).float()
        rows = torch.cat([score_head(scorer, states)[:, None], states], -1)
        return list(rows.cpu().split(1))  # (1, 1 + d) each

    scores, states = torch.cat(_each(items, hardware, scorer, of_batch)).tensor_split([1], -1)
    return scores[:, 0], states
