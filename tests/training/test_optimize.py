"""The optimizer step: one large batch or many small ones, terms that add up, and bad numbers."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_cli.config.errors import RunError
from rlhf_cli.config.schema import Optimizer as OptimizerConfig
from rlhf_cli.data.batches import collate, cut
from rlhf_cli.data.tokens import Tokens
from rlhf_cli.models.forward import token_logprobs
from rlhf_cli.objectives.likelihood import nll_sum
from rlhf_cli.training.optimize import Loss, Optimizer, Part
from tests.toys import composed, llama, sequences_of

SEQUENCES = sequences_of(8)
TOKENS = sum(len(each.response) for each in SEQUENCES)


def config_of(**changes: Any) -> OptimizerConfig:
    config: OptimizerConfig = composed("dpo").algo
    plain: dict[str, Any] = {
        "lr": 1e-3,
        "lr_schedule": "constant",
        "min_lr_ratio": 0.0,
        "warmup_steps": 0,
        "adam_eps": 1e-5,
        "weight_decay": 0.0,
        "max_grad_norm": None,
    }
    return replace(config, **plain | changes)


def optimizer_of(model: nn.Module, steps: int = 9, **changes: Any) -> Optimizer:
    config = config_of(**changes)
    return Optimizer({"policy": (model, config.lr)}, config, steps)


class Language:
    """A model with the loss of sft."""

    def __init__(self) -> None:
        self.model = llama()

    def loss(self, sequences: list[Tokens]) -> Loss:
        batch = collate(sequences)
        logprobs = token_logprobs(self.model, batch, chunk=5).logprobs
        nll = nll_sum(logprobs, batch.response)
        return nll, {"nll": nll.detach()}

    def weights(self) -> Tensor:
        return torch.cat([weight.detach().flatten() for weight in self.model.parameters()])


@pytest.mark.parametrize(
    "groups",
    [
        [[each] for each in SEQUENCES],
        [SEQUENCES[:5], SEQUENCES[5:]],
        cut(SEQUENCES, 20),
        [SEQUENCES[::-1]],
    ],
    ids=["8 x 1", "5 + 3", "by budget", "turned round"],
)
def test_micro_batches_of_any_cut_take_the_same_step(groups: list[list[Tokens]]) -> None:
    whole, parts = Language(), Language()
    one = optimizer_of(whole.model).step([Part([SEQUENCES], whole.loss, TOKENS)])
    many = optimizer_of(parts.model).step([Part(groups, parts.loss, TOKENS)])
    assert many == pytest.approx(one, rel=1e-5)
    torch.testing.assert_close(parts.weights(), whole.weights(), rtol=0, atol=1e-6)


def test_a_mean_of_means_would_be_another_step() -> None:
    """Two micro-batches of unlike token counts, worked through: (1 + 1 + 1 + 5) / 4 is not 3."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)

    def loss(batch: Tensor) -> Loss:
        return layer(batch).sum(), {"seen": torch.tensor(float(len(batch)))}

    batches = [torch.ones(3, 1), torch.full((1, 1), 5.0)]
    report = optimizer_of(layer).step([Part(batches, loss, 4)])
    assert report["loss"] == report["grad_norm/policy"] == 2.0
    assert report["seen"] == 1.0


def test_terms_add_their_gradients_by_weight() -> None:
    """PPO-ptx: g_RL + gamma g_ptx in one step; with gamma = 0 the second term is not there."""
    texts = sequences_of(5, seed=1)
    count = sum(len(each.response) for each in texts)

    def gradient(*terms: tuple[list[Tokens], float, float]) -> Tensor:
        language = Language()
        optimizer = optimizer_of(language.model)
        optimizer.step([Part(cut(each, 9), language.loss, n, w) for each, n, w in terms])
        return torch.cat([weight.grad.flatten() for weight in language.model.parameters()])  # type: ignore[union-attr]

    rl, ptx = (SEQUENCES, TOKENS, 1.0), (texts, count, 1.0)
    both = gradient(rl, (texts, count, 27.8))
    torch.testing.assert_close(both, gradient(rl) + 27.8 * gradient(ptx), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient(rl, (texts, count, 0.0)), gradient(rl), rtol=0, atol=0)


def test_a_clipped_norm_is_that_of_each_network_and_reported_unclipped() -> None:
    models: dict[str, nn.Module] = {
        "policy": nn.Linear(1, 1, bias=False),
        "critic": nn.Linear(1, 1, bias=False),
    }

    def loss(batch: Tensor) -> Loss:
        return 3 * models["policy"](batch).sum() + 0.01 * models["critic"](batch).sum(), {}

    config = config_of(max_grad_norm=1.0)
    rates = {name: (model, config.lr) for name, model in models.items()}
    report = Optimizer(rates, config, 9).step([Part([torch.ones(1, 1)], loss, 1)])
    assert report["grad_norm/policy"] == pytest.approx(3.0)
    assert report["grad_norm/critic"] == pytest.approx(0.01)
    gradients = [weight.grad for model in models.values() for weight in model.parameters()]
    torch.testing.assert_close(gradients, [torch.tensor([[g]]) for g in (1.0, 0.01)])


def test_a_schedule_with_warmup() -> None:
    """Linear from zero over 4 steps, then a half cosine down to a tenth of the peak."""
    layer = nn.Linear(1, 1)
    changes: dict[str, Any] = {
        "lr": 2.0,
        "lr_schedule": "cosine",
        "min_lr_ratio": 0.1,
        "warmup_steps": 4,
    }
    optimizer = optimizer_of(layer, 20, **changes)
    part = Part([torch.ones(1, 1)], lambda x: (layer(x).sum(), {}), 1)
    rates = [optimizer.step([part])["lr"] for _ in range(21)]
    assert rates[:5] == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0], abs=1e-12)
    half = [2 * (0.1 + 0.9 * (1 + math.cos(math.pi * t / 16)) / 2) for t in range(17)]
    assert rates[4:] == pytest.approx(half, abs=1e-12)
    assert rates[-1] == pytest.approx(0.2, abs=1e-12)


def test_frozen_weights_do_not_move() -> None:
    language = Language()
    table = language.model.model.embed_tokens.weight.requires_grad_(False)
    before, trained = table.clone(), language.model.lm_head.weight.detach().clone()
    optimizer_of(language.model, weight_decay=0.1).step([Part([SEQUENCES], language.loss, TOKENS)])
    assert torch.equal(table, before)
    assert not torch.equal(language.model.lm_head.weight, trained)


class Faulty:
    """A one-weight model whose loss or gradient is bad on demand."""

    def __init__(self) -> None:
        self.layer = nn.Linear(1, 1, bias=False)
        self.optimizer = optimizer_of(self.layer)

    def step(self, scale: float) -> dict[str, float]:
        def loss(batch: Tensor) -> Loss:
            return self.layer(batch).sum() * scale, {}

        return self.optimizer.step([Part([torch.ones(1, 1)], loss, 1)])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_of_bad_numbers_is_skipped_and_counted(bad: float) -> None:
    faulty = Faulty()
    faulty.step(1.0)
    before = faulty.layer.weight.detach().clone()
    for skipped in (1, 2):
        assert faulty.step(bad)["skipped"] == skipped
        assert torch.equal(faulty.layer.weight, before)
    assert faulty.step(1.0)["skipped"] == 2  # a good step starts the count in a row afresh
    assert not torch.equal(faulty.layer.weight, before)
    faulty.step(bad)
    faulty.step(bad)
    with pytest.raises(RunError, match="3 steps in a row .* not finite"):
        faulty.step(bad)


def test_moments_and_schedule_go_on_where_they_were() -> None:
    options: dict[str, Any] = {"lr_schedule": "linear", "warmup_steps": 2}
    whole, first, second = Language(), Language(), Language()

    def steps(language: Language, optimizer: Optimizer, numbers: range) -> list[dict[str, float]]:
        return [
            optimizer.step([Part(cut(SEQUENCES[i % 4 :], 30), language.loss, TOKENS)])
            for i in numbers
        ]

    expected = steps(whole, optimizer_of(whole.model, **options), range(6))
    before = optimizer_of(first.model, **options)
    steps(first, before, range(3))
    second.model.load_state_dict(first.model.state_dict())
    after = optimizer_of(second.model, **options)
    after.load({name: each.clone() for name, each in before.tensors().items()}, before.state())
    assert steps(second, after, range(3, 6)) == expected[3:]
    assert torch.equal(second.weights(), whole.weights())
