"""Where work fails on one rank of a sharded model, all do it again in another way."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_cli.config.errors import RunError
from rlhf_cli.data.batches import collate
from rlhf_cli.data.items import Tokens
from rlhf_cli.models.compiled import compile_blocks
from rlhf_cli.models.forward import token_logprobs
from rlhf_cli.models.layouts import layout_of
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.models.shards import whole
from rlhf_cli.ranks.world import world
from rlhf_cli.training.loss_term import Loss, LossTerm
from rlhf_cli.training.optimize import Optimizer
from tests.models.test_out_of_memory import CPU
from tests.models.test_sharding import SEQUENCES, TOKENS, model_on_ranks, numbers, weights_of
from tests.ranks import on_ranks
from tests.toys import composed, hardware_of

HARDWARE = hardware_of(gradient_checkpointing=False, tokens_per_microbatch=64)
MOST = 24  # padded tokens that one rank has memory for
Fails = Callable[[nn.Module], None]


def in_forward(model: Any, place: str) -> None:
    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].shape[:-1].numel() > MOST:
            raise RuntimeError(CPU)

    model.get_submodule(place).register_forward_pre_hook(look)


def in_backward(model: Any, place: str) -> None:
    def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad and output.shape[:-1].numel() > MOST:
            output.register_hook(fail)

    model.get_submodule(place).register_forward_hook(look)


def fail(grad: Tensor) -> Tensor:
    raise RuntimeError(CPU)


def in_compiler(model: Any, place: str) -> None:
    def backend(*graph: Any) -> Any:
        if world().rank == 1:
            raise ValueError("no compiler here")
        return graph[0].forward

    compile_blocks(model, backend)


PLACES = {
    "first block": (in_forward, "model.layers.0.mlp"),
    "last norm": (in_forward, "model.norm"),
    "backward of the last block": (in_backward, "model.layers.1.mlp"),
    "backward of the first block": (in_backward, "model.layers.0.self_attn.o_proj"),
    "compiler": (in_compiler, ""),
}


def learnt(over: str, place: str) -> dict[str, Any]:
    """Scores, three steps, and scores, where rank 1 fails at a place."""
    model = model_on_ranks(over)
    layout_of(model, HARDWARE)  # tried with passes of their own
    fails, where = PLACES.get(place, (None, ""))

    def loss(sequences: list[Tokens]) -> Loss:
        scored = token_logprobs(model, collate(sequences), chunk=5)
        return -scored.logprobs.sum(), {}

    config = replace(composed("dpo").algo, lr=1e-3)
    optimizer = Optimizer({"policy": (model, 1e-3)}, config, 9, HARDWARE)
    if fails is in_compiler:
        fails(model, where)
        optimizer._compiling.compiled = True
    elif fails and world().rank == 1:
        fails(model, where)
    before = numbers(logprobs_of(model, SEQUENCES, HARDWARE))
    term = LossTerm([SEQUENCES[:3], SEQUENCES[3:6], SEQUENCES[6:]], loss, TOKENS)
    reports = [optimizer.step([term]) for _ in range(3)]
    return {
        "before": before,
        "reports": reports,
        "after": numbers(logprobs_of(model, SEQUENCES, HARDWARE)),
        "evaluated": term.evaluated()["loss"],
        "weights": numbers([whole(each.detach()).flatten() for each in weights_of(model)]),
        "halvings": optimizer.room.halvings,
        "compiled": optimizer._compiling.compiled,
    }


def all_places(over: str, places: list[str]) -> dict[str, dict[str, Any]]:
    return {place: learnt(over, place) for place in places}


@pytest.mark.parametrize("places", [["backward of the last block"], [*PLACES]])
@pytest.mark.slow
def test_all_ranks_do_again_what_fails_on_one(places: list[str]) -> None:
    alone = learnt("none", "")
    ranks = on_ranks(2, all_places, "full", places)
    for place in places:
        for rank in ranks:
            found = rank[place]
            assert found["halvings"] == (0 if place == "compiler" else 1) and not found["compiled"]
            for name in ("before", "after", "weights", "evaluated"):
                assert found[name] == pytest.approx(alone[name], rel=0, abs=1e-5), (place, name)
            for ours, theirs in zip(found["reports"], alone["reports"], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def no_room() -> str:
    """What is said where not even one sequence fits."""
    model = model_on_ranks("full")
    layout_of(model, HARDWARE)
    if world().rank == 1:
        model.get_submodule("model.norm").register_forward_pre_hook(lambda *_: fail(torch.ones(1)))
    with pytest.raises((RunError, RuntimeError)) as told:
        logprobs_of(model, SEQUENCES, HARDWARE)
    return str(told.value)


@pytest.mark.slow
def test_a_rank_that_cannot_keep_up_ends_in_a_line() -> None:
    assert "rank" in on_ranks(2, no_room)[1]
