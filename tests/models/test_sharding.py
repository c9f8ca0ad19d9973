"""A model that is sharded over ranks learns what a whole one learns."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.data.batches import collate
from rlhf_cli.data.items import Tokens
from rlhf_cli.models.adapters import trained
from rlhf_cli.models.adapting import place
from rlhf_cli.models.forward import token_logprobs
from rlhf_cli.models.shards import own_part, whole
from rlhf_cli.objectives.likelihood import nll_sum
from rlhf_cli.ranks.world import world
from rlhf_cli.training.loss_term import Loss, LossTerm
from rlhf_cli.training.optimize import Optimizer
from tests.ranks import on_ranks
from tests.toys import composed, hardware_of, llama, model_of, sequences_of

SEQUENCES = sequences_of(8)
TOKENS = sum(len(each.response) for each in SEQUENCES)
THREE = [SEQUENCES[:3], SEQUENCES[3:6], SEQUENCES[6:]]  # of which one rank has none in its turn


def learnt(over: str, dtype: str = "float32", **settings: Any) -> dict[str, Any]:
    """Six steps: their figures, the weights, and how many of the moments are here."""
    world().shard(over)
    model = llama(**settings)
    place(model, model_of(), getattr(torch, dtype), torch.device("cpu"))

    def loss(sequences: list[Tokens]) -> Loss:
        batch = collate(sequences)
        nll = nll_sum(token_logprobs(model, batch, chunk=5).logprobs, batch.response)
        return nll, {"nll": nll.detach()}

    config = replace(composed("dpo").algo, lr=1e-3, max_grad_norm=0.5)
    hardware = hardware_of(gradient_checkpointing=False)
    optimizer = Optimizer({"policy": (model, 1e-3)}, config, 9, hardware)
    term = LossTerm(THREE, loss, TOKENS)
    reports = [optimizer.step([term]) for _ in range(6)]
    weights = torch.cat([whole(weight.detach()).flatten() for weight in trained(model).values()])
    held = sum(own_part(each).numel() for each in optimizer.tensors().values())
    return {"reports": reports, "weights": weights.tolist(), "held": held}


def weights_of(result: dict[str, Any]) -> Tensor:
    return torch.tensor(result["weights"])


def tied(over: str) -> dict[str, Any]:
    return learnt(over, tie_word_embeddings=True)


@pytest.mark.parametrize("work", [learnt, tied])
def test_two_ranks_learn_what_one_process_learns_and_hold_half_of_it(work: Any) -> None:
    alone = work("full")
    for result in on_ranks(2, work, "full"):
        torch.testing.assert_close(weights_of(result), weights_of(alone), rtol=0, atol=1e-6)
        for ours, theirs in zip(result["reports"], alone["reports"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)
        assert 0.49 < result["held"] / alone["held"] < 0.52


def test_a_mesh_of_one_learns_the_same_to_the_bit() -> None:
    alone = learnt("full")
    (result,) = on_ranks(1, learnt, "full")
    assert result == alone
