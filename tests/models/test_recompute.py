"""Blocks that backward computes again: as many as asked for, with the same gradients."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.batches import collate
from rlhf_cli.models.dropout import residual_dropout, training_mode
from rlhf_cli.models.forward import token_logprobs
from rlhf_cli.models.recompute import recompute_activations
from rlhf_cli.models.shared import freeze_lowest
from tests.toys import llama, sequences_of

BATCH = collate(sequences_of(3))


def gradients(model: nn.Module) -> list[Tensor | None]:
    model.zero_grad()
    token_logprobs(model, BATCH, chunk=99).logprobs.sum().backward()
    return [weight.grad for weight in model.parameters()]


@pytest.mark.parametrize(("share", "again"), [(0.25, [1]), (0.5, [1, 2]), (1.0, [1, 2, 3])])
def test_the_lowest_trained_blocks_are_computed_again(share: float, again: list[int]) -> None:
    model: Any = llama(num_hidden_layers=4)
    freeze_lowest(model, 1)
    plain = gradients(model)
    assert recompute_activations(model, 1.0) == 3  # what was asked for last counts
    assert recompute_activations(model, share) == len(again)
    runs: Counter[int] = Counter()
    for i, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(lambda *_, i=i: runs.update([i]))
    for ours, theirs in zip(gradients(model), plain, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert [i for i, count in runs.items() if count == 2 and i > 0] == again


def test_dropout_stays_where_it_is_while_recomputation_is_tried() -> None:
    """Memory may run out in the middle of a run that drops units."""
    model = llama()
    residual_dropout(model, 0.5)
    recompute_activations(model)
    training_mode(model)
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        draws.append(token_logprobs(model, BATCH, chunk=99).logprobs)
    other = token_logprobs(model, BATCH, chunk=99).logprobs
    assert torch.equal(*draws) and not torch.equal(other, draws[0])


def test_a_model_that_computes_something_else_in_training_mode_is_left_as_it_was() -> None:
    """A run whose memory ran out goes on without."""
    model: Any = llama()
    before = gradients(model)
    block = model.model.layers[0].mlp
    block.register_forward_hook(
        lambda *each: each[2] * 2 if model.model.layers[0].training else None
    )
    with pytest.raises(UserError, match="in training mode"):
        recompute_activations(model)
    torch.testing.assert_close(gradients(model), before, rtol=0, atol=0)
