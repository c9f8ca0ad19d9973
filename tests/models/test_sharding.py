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
from rlhf_cli.models.shards import own_part, whole_of
from rlhf_cli.objectives.likelihood import nll_sum
from rlhf_cli.ranks.world import world
from rlhf_cli.training.loss_term import Loss, LossTerm
from rlhf_cli.training.optimize import Optimizer
from tests.ranks import on_ranks
from tests.toys import composed, hardware_of, llama, model_of, sequences_of

SEQUENCES = sequences_of(8)
TOKENS = sum(len(each.response) for each in SEQUENCES)
HALVES = [SEQUENCES[:5], SEQUENCES[5:]]


def learnt(over: str, groups: Any, dtype: str = "float32", **settings: Any) -> dict[str, Any]:
    world().shard(over) if over != "none" else None
    model = llama(**settings)
    place(model, model_of(), getattr(torch, dtype), torch.device("cpu"))

    def loss(sequences: list[Tokens]) -> Loss:
        batch = collate(sequences)
        nll = nll_sum(token_logprobs(model, batch, chunk=5).logprobs, batch.response)
        return nll, {"nll": nll.detach()}

    config = replace(composed("dpo").algo, lr=1e-3, max_grad_norm=0.5)
    hardware = hardware_of(gradient_checkpointing=False)
    optimizer = Optimizer({"policy": (model, 1e-3)}, config, 9, hardware)
    term = LossTerm(groups, loss, TOKENS)
    reports = [optimizer.step([term]) for _ in range(6)]
    weights = torch.cat([whole_of(weight.detach()).flatten() for weight in trained(model).values()])
    held = sum(own_part(each).numel() for each in trained(model).values())
    return {"reports": reports, "weights": weights.tolist(), "held": held}


@pytest.mark.parametrize("tied", [True, False])
def test_two_ranks(tied) -> None:
    groups=[SEQUENCES[:3],SEQUENCES[3:6],SEQUENCES[6:]]
    alone = learnt("none", groups, tie_word_embeddings=tied)
    for r in on_ranks(2, learnt, "full", groups, tie_word_embeddings=tied) if False else on_ranks(2, both, groups, tied):
        a = torch.tensor(r["weights"]) - torch.tensor(alone["weights"])
        print(a.abs().max(), r["held"], alone["held"])
    (r,) = on_ranks(1, both, groups, tied)
    print(r["reports"]==alone["reports"], r["weights"]==alone["weights"])
    assert r["weights"]==alone["weights"]

def both(groups, tied): return learnt("full", groups, tie_word_embeddings=tied)
