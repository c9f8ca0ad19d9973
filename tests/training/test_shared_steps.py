"""An optimizer step that ranks share is the step of one process."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.data.batches import collate
from rlhf_cli.data.items import Tokens
from rlhf_cli.models.forward import token_logprobs
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.objectives.likelihood import nll_sum
from rlhf_cli.ranks.world import world
from rlhf_cli.training.loss_term import Loss, LossTerm
from rlhf_cli.training.optimize import Optimizer
from tests.ranks import on_ranks
from tests.toys import composed, hardware_of, llama, mean_nll, sequences_of

SEQUENCES = sequences_of(8)
TOKENS = sum(len(each.response) for each in SEQUENCES)
HALVES = [SEQUENCES[:5], SEQUENCES[5:]]
THREE = [SEQUENCES[:2], SEQUENCES[2:3], SEQUENCES[3:]]


class Language:
    """A model with the loss of sft, whose memory may end on one rank."""

    def __init__(self, fits: int = 99, on: int = 0, poor: int | None = None) -> None:
        """At most `fits` rows fit in a pass on rank `on`; rank `poor` returns NaN."""
        self.model = llama()
        self.fits = fits if world().rank == on else 99
        self.poor = world().rank == poor
        self.passes: list[int] = []

    def loss(self, sequences: list[Tokens]) -> Loss:
        self.passes.append(len(sequences))
        if len(sequences) > self.fits:
            raise MemoryError
        batch = collate(sequences)
        nll = nll_sum(token_logprobs(self.model, batch, chunk=5).logprobs, batch.response)
        nll = nll * float("nan") if self.poor else nll
        return nll, {"nll": nll.detach()}


class Means(Language):
    """What it must not be: a mean over the tokens of a rank, of which the mean is taken."""

    def loss(self, sequences: list[Tokens]) -> Loss:
        nll, metrics = super().loss(sequences)
        return nll / sum(len(each.response) for each in sequences) * TOKENS / 2, metrics


def steps(
    groups: list[list[Tokens]], count: int = 3, kind: type[Language] = Language, **faults: Any
) -> dict[str, Any]:
    language = kind(**faults)
    config = replace(composed("dpo").algo, lr=1e-3, max_grad_norm=0.5, max_skipped=5)
    hardware = hardware_of(gradient_checkpointing=False)
    optimizer = Optimizer({"policy": (language.model, 1e-3)}, config, 9, hardware)
    term = LossTerm(groups, language.loss, TOKENS)
    reports = [optimizer.step([term]) for _ in range(count)]
    weights = torch.cat([weight.detach().flatten() for weight in language.model.parameters()])
    return {"reports": reports, "weights": weights.tolist(), "passes": language.passes}


def weights_of(result: dict[str, Any]) -> Tensor:
    return torch.tensor(result["weights"])


def test_two_ranks_take_the_step_of_one_process_to_the_bit() -> None:
    alone = steps(HALVES)
    first, second = on_ranks(2, steps, HALVES)
    assert first["weights"] == second["weights"] == alone["weights"]
    assert first["reports"] == second["reports"] == alone["reports"]
    assert (first["passes"], second["passes"]) == ([5] * 3, [3] * 3)


def test_means_of_each_rank_would_be_another_loss() -> None:
    of_tokens, of_ranks = weights_of(steps(HALVES)), weights_of(steps(HALVES, kind=Means))
    assert (of_tokens - of_ranks).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("groups", [THREE, [SEQUENCES]], ids=["three", "one"])
def test_ranks_with_less_to_do_or_nothing(groups: list[list[Tokens]]) -> None:
    alone = steps(groups)
    for result in on_ranks(4, steps, groups):
        torch.testing.assert_close(weights_of(result), weights_of(alone), rtol=0, atol=1e-6)
        assert result["reports"][0] == pytest.approx(alone["reports"][0], rel=1e-6)


def short_of_memory() -> dict[str, Any]:
    return steps(HALVES, 2, fits=2, on=1)


def not_finite() -> dict[str, Any]:
    return steps(HALVES, 2, poor=1)


def test_what_goes_wrong_on_one_rank_is_known_to_all() -> None:
    alone = steps(HALVES, 2)
    for result in on_ranks(2, short_of_memory):
        torch.testing.assert_close(weights_of(result), weights_of(alone), rtol=0, atol=1e-6)
        assert result["passes"][-1] <= 3  # all have halved
    start = torch.cat([weight.detach().flatten() for weight in llama().parameters()])
    for result in on_ranks(2, not_finite):
        assert [report["skipped"] for report in result["reports"]] == [1.0, 2.0]
        assert torch.equal(weights_of(result), start)


def scored(count: int) -> tuple[list[list[float]], float]:
    model, hardware = llama(), hardware_of(tokens_per_microbatch=20)
    items = SEQUENCES[:count]
    values = logprobs_of(model, items, hardware)
    return [each.tolist() for each in values], mean_nll(model, items, hardware)


@pytest.mark.slow
def test_scores_are_gathered_in_the_order_of_the_items() -> None:
    for count in (8, 1):
        alone = scored(count)
        for values, mean in on_ranks(2, scored, count):
            assert mean == pytest.approx(alone[1], rel=1e-6)
            for ours, whole in zip(values, alone[0], strict=True):
                assert ours == pytest.approx(whole, abs=1e-5)
