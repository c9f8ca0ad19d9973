"""The load of experts is balanced as transformers does it, whatever the cut into micro-batches."""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.batches import collate, collate_answers
from rlhf_cli.data.items import Answers, Tokens
from rlhf_cli.data.packing import PADDED, SHARED, SHARED_FROM, Layout
from rlhf_cli.models.adapters import POLICY, REFERENCE, Acting, add_adapter
from rlhf_cli.models.forward import token_logprobs
from rlhf_cli.models.lora_places import lora_places, peft_targets
from rlhf_cli.models.recompute import recompute_activations
from rlhf_cli.objectives.likelihood import nll_sum
from rlhf_cli.ranks.world import world
from rlhf_cli.training.loss_term import Loss, LossTerm
from rlhf_cli.training.optimize import Optimizer
from tests.model_families import model_of
from tests.pace import fast
from tests.ranks import on_ranks
from tests.training.test_optimize import PLAIN, config_of

ASKS = {"output_router_logits": True}
FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"]
MORE = ["phimoe", "qwen2_moe", "granitemoe", "dbrx", "qwen3_next", "jamba", "granitemoehybrid"]
SEQUENCES = [
    Tokens([5, 6, 7], [8, 9, 10, 11]),
    Tokens([12], [13, 14]),
    Tokens([15, 16, 17, 18, 19], [20]),
    Tokens([21, 22], [23, 24, 25]),
]
TOKENS = sum(len(each.response) for each in SEQUENCES)
Gradients = dict[str, Tensor]


def step_of(
    model: Any, groups: Sequence[Sequence[Any]], loss: Any = None, count: int = TOKENS
) -> tuple[dict[str, float], Gradients]:
    """The metrics and the gradients of a step that changes nothing."""

    def nll(sequences: list[Tokens]) -> Loss:
        batch = collate(sequences)
        logprobs = token_logprobs(model, batch, chunk=50).logprobs
        return nll_sum(logprobs, batch.response), {}

    optimizer = Optimizer({"policy": (model, 0.0)}, config_of(lr=0.0), 9, PLAIN)
    metrics = optimizer.step([LossTerm(groups, loss or nll, count)])
    found = {name: weight.grad for name, weight in model.named_parameters()}
    return metrics, {name: each.clone() for name, each in found.items() if each is not None}


def by_transformers(model: Any, coef: float) -> tuple[float, Gradients]:
    """The loss over response tokens and the auxiliary one, by transformers alone."""
    batch = collate(SEQUENCES)
    labels = torch.where(batch.response, batch.ids, -100)
    model.zero_grad()
    output = model(
        input_ids=batch.ids,
        attention_mask=batch.attention.long(),
        position_ids=batch.positions,
        labels=labels,
        output_router_logits=True,
        use_cache=False,
    )
    output.loss.backward()
    gradients = {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }
    model.zero_grad()
    return output.aux_loss.item(), gradients


@pytest.mark.parametrize("family", fast(FAMILIES, [*FAMILIES, *MORE]))
def test_loss_and_gradient_are_those_of_transformers(family: str) -> None:
    changes: dict[str, Any] = {"router_aux_loss_coef": 0.7}
    if family == "dbrx":
        ffn = {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}
        changes = {"ffn_config": {**ffn, "moe_loss_weight": 0.7}}
    if family.startswith("granite"):
        changes["logits_scaling"] = 1.0  # the loss is that of logits as they come
    model = model_of(family, **ASKS, **changes)
    aux, theirs = by_transformers(model, 0.7)
    metrics, ours = step_of(model, [SEQUENCES])
    assert metrics["router/aux_loss"] == pytest.approx(aux, rel=1e-5)
    assert ours.keys() == theirs.keys()
    for name, each in ours.items():
        torch.testing.assert_close(each, theirs[name], atol=2e-5, rtol=2e-4, msg=name)


def test_micro_batches_of_any_cut_take_the_same_step() -> None:
    model = model_of("mixtral", **ASKS, router_aux_loss_coef=3.0)
    metrics, gradients = step_of(model, [SEQUENCES])
    assert 2.0 < metrics["router/aux_loss"] < 4.0
    assert metrics["router/load_max"] > 1 > metrics["router/load_min"]
    for groups in ([[each] for each in SEQUENCES], [SEQUENCES[1:], SEQUENCES[:1]]):
        others, theirs = step_of(model, groups)
        assert others == pytest.approx(metrics, rel=1e-4)
        torch.testing.assert_close(theirs, gradients, atol=1e-5, rtol=1e-4)
    recompute_activations(model)
    _, again = step_of(model, [SEQUENCES[:2], SEQUENCES[2:]])
    torch.testing.assert_close(again, gradients, atol=1e-5, rtol=1e-4)


def test_a_shared_prompt_counts_as_often_as_it_is_read() -> None:
    model = model_of("qwen3_moe", **ASKS, router_aux_loss_coef=3.0)
    prompt = [5 + i % 9 for i in range(SHARED_FROM)]
    groups = [Answers(prompt, [[9, 10], [11, 12, 13]], None), Answers([14], [[15]], None)]
    found = []
    for layout in (PADDED, SHARED):

        def loss(items: list[Answers], layout: Layout = layout) -> Loss:
            batch = collate_answers(items, layout=layout)
            return nll_sum(token_logprobs(model, batch, chunk=50).logprobs, batch.response), {}

        found.append(step_of(model, [groups], loss, 6))
    (apart, gradients), (together, others) = found
    assert together == pytest.approx(apart, rel=1e-4)
    torch.testing.assert_close(others, gradients, atol=1e-5, rtol=1e-4)


def test_passes_of_other_roles_do_not_count() -> None:
    import peft

    model = model_of("mixtral", **ASKS, router_aux_loss_coef=3.0)
    targets: Any = peft_targets(model, lora_places(model))
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, **targets)).eval()
    add_adapter(adapted, REFERENCE, adapted.peft_config[POLICY])
    metrics, gradients = step_of(adapted, [SEQUENCES])
    assert gradients.keys() and all(".default." in name for name in gradients)

    def with_reference(sequences: list[Tokens]) -> Loss:
        batch = collate(sequences)
        with torch.no_grad(), Acting(adapted, REFERENCE):
            token_logprobs(adapted, collate([Tokens([9, 9, 9], [9, 9])]), chunk=50)
        logprobs = token_logprobs(adapted, batch, chunk=50).logprobs
        return nll_sum(logprobs, batch.response), {}

    others, theirs = step_of(adapted, [[each] for each in SEQUENCES], with_reference)
    assert others == pytest.approx(metrics, rel=1e-4)
    torch.testing.assert_close(theirs, gradients, atol=1e-5, rtol=1e-4)


def test_what_is_left_out_is_said_and_what_is_asked_for_is_done(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = model_of("mixtral")
    metrics, plain = step_of(model, [SEQUENCES])
    step_of(model, [SEQUENCES])
    said = capsys.readouterr().err
    assert said.count("no load-balancing loss of the policy's routers") == 1
    assert "router_aux_loss_coef=0.001" in said
    assert "model.router_aux_coef=0.001 adds it" in said
    assert "router/aux_loss" not in metrics

    del model.router_watch
    model.router_aux_coef = 0.5
    with_loss, more = step_of(model, [SEQUENCES])
    assert "weight 0.5, model.router_aux_coef" in capsys.readouterr().err
    assert with_loss["loss"] == pytest.approx(metrics["loss"] + 0.5 * with_loss["router/aux_loss"])
    gate = "model.layers.0.mlp.gate.weight"
    assert not torch.allclose(plain[gate], more[gate])

    model.router_aux_coef = 0.0
    model.config.output_router_logits = True
    off, without = step_of(model, [SEQUENCES])
    assert off == metrics
    torch.testing.assert_close(without, plain, rtol=0, atol=0)

    dense = model_of("llama")
    dense.router_aux_coef = 0.5
    with pytest.raises(UserError, match=r"router_aux_coef=0.5: LlamaForCausalLM has no routers"):
        step_of(dense, [SEQUENCES])


def with_memory_that_ends_on_one_rank(*passes: int) -> list[tuple[dict[str, float], float]]:
    """The metrics and the size of the gradient of a step whose pass of a number finds no memory."""
    found = []
    for ends in passes:
        model, numbers = model_of("mixtral", **ASKS), count(1)

        def nll(
            sequences: list[Tokens],
            model: Any = model,
            numbers: Iterator[int] = numbers,
            ends: int = ends,
        ) -> Loss:
            if next(numbers) == ends and world().rank == 1:
                raise MemoryError
            batch = collate(sequences)
            return nll_sum(token_logprobs(model, batch, chunk=50).logprobs, batch.response), {}

        metrics, gradient = step_of(model, [SEQUENCES[:2], SEQUENCES[2:]], nll)
        found.append((metrics, sum(each.double().norm().item() for each in gradient.values())))
    return found


def test_memory_that_ends_on_one_rank_as_experts_are_counted_keeps_none_waiting() -> None:
    ((metrics, size),) = with_memory_that_ends_on_one_rank(0)
    as_it_counts, as_it_learns = 1, 2
    for steps in on_ranks(2, with_memory_that_ends_on_one_rank, as_it_counts, as_it_learns):
        for found, found_size in steps:
            assert found == pytest.approx(metrics, rel=1e-5)
            assert found_size == pytest.approx(size, rel=1e-5)
