"""The optimizer step: one large batch or many small ones, terms that add up, and bad numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rlhf_cli.config.errors import RunError
from rlhf_cli.config.schema.algorithms import OptimizerConfig
from rlhf_cli.config.schema.hardware import Hardware
from rlhf_cli.data.batches import collate, cut
from rlhf_cli.data.items import Tokens
from rlhf_cli.models.forward import token_logprobs
from rlhf_cli.models.out_of_memory import keys_that_help
from rlhf_cli.objectives.likelihood import nll_sum
from rlhf_cli.training.loss_term import Loss, LossTerm
from rlhf_cli.training.optimize import Optimizer, mean_metrics
from tests.toys import composed, hardware_of, llama, sequences_of

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
        "max_skipped": 3,
    }
    return replace(config, **plain | changes)


PLAIN = hardware_of(gradient_checkpointing=False)


def optimizer_of(
    model: nn.Module, steps: int = 9, hardware: Hardware = PLAIN, **changes: Any
) -> Optimizer:
    config = config_of(**changes)
    return Optimizer({"policy": (model, config.rate)}, config, steps, hardware)


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
    one = optimizer_of(whole.model).step([LossTerm([SEQUENCES], whole.loss, TOKENS)])
    many = optimizer_of(parts.model).step([LossTerm(groups, parts.loss, TOKENS)])
    assert many == pytest.approx(one, rel=1e-5)
    torch.testing.assert_close(parts.weights(), whole.weights(), rtol=0, atol=1e-6)


def test_a_mean_of_means_would_be_another_step() -> None:
    """Two micro-batches of unlike token counts, worked through: (1 + 1 + 1 + 5) / 4 is not 3."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)

    def loss(batch: Tensor) -> Loss:
        return layer(batch).sum(), {"seen": torch.tensor(float(len(batch)))}

    batches = [torch.ones(3, 1), torch.full((1, 1), 5.0)]
    report = optimizer_of(layer).step([LossTerm(batches, loss, 4)])
    assert report["loss"] == report["grad_norm/policy"] == 2.0
    assert report["seen"] == 1.0


def test_terms_add_their_gradients_by_weight() -> None:
    """PPO-ptx: g_RL + gamma g_ptx in one step; with gamma = 0 the second term is not there."""
    texts = sequences_of(5, seed=1)
    count = sum(len(each.response) for each in texts)

    def gradient(*terms: tuple[list[Tokens], float, float]) -> Tensor:
        language = Language()
        optimizer = optimizer_of(language.model)
        optimizer.step([LossTerm(cut(each, 9), language.loss, n, w) for each, n, w in terms])
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
    rates = {name: (model, config.rate) for name, model in models.items()}
    report = Optimizer(rates, config, 9, hardware_of()).step(
        [LossTerm([torch.ones(1, 1)], loss, 1)]
    )
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
    part = LossTerm([torch.ones(1, 1)], lambda x: (layer(x).sum(), {}), 1)
    rates = [optimizer.step([part])["lr"] for _ in range(21)]
    assert rates[:5] == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0], abs=1e-12)
    half = [2 * (0.1 + 0.9 * (1 + math.cos(math.pi * t / 16)) / 2) for t in range(17)]
    assert rates[4:] == pytest.approx(half, abs=1e-12)
    assert rates[-1] == pytest.approx(0.2, abs=1e-12)


def test_the_schedule_goes_by_the_planned_step() -> None:
    """Updates that drop out do not hold it up, and a resumed run takes it up where it stood."""
    terms = [LossTerm([SEQUENCES], Language().loss, TOKENS)]
    every = optimizer_of(Language().model, 8, lr_schedule="linear", warmup_steps=2)
    rates = [every.step(terms)["lr"] for _ in range(8)]
    some = optimizer_of(Language().model, 8, lr_schedule="linear", warmup_steps=2)
    numbers = [0, 3, 4, 7]
    assert [some.step(terms, number)["lr"] for number in numbers] == [rates[i] for i in numbers]
    again = optimizer_of(Language().model, 8, lr_schedule="linear", warmup_steps=2)
    again.load(some.tensors(), {**some.state(), "schedule": 5})
    assert again.step(terms)["lr"] == rates[5]


def test_frozen_weights_do_not_move() -> None:
    language = Language()
    table = language.model.model.embed_tokens.weight.requires_grad_(False)
    before, trained = table.clone(), language.model.lm_head.weight.detach().clone()
    optimizer_of(language.model, weight_decay=0.1).step(
        [LossTerm([SEQUENCES], language.loss, TOKENS)]
    )
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

        return self.optimizer.step([LossTerm([torch.ones(1, 1)], loss, 1)])


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
            optimizer.step([LossTerm(cut(SEQUENCES[i % 4 :], 30), language.loss, TOKENS)])
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


# --------------------------------------------------------------------------- what is to blame


@dataclass
class Item:
    """A row of numbers for a model of one weight each."""

    x: Tensor
    worth: Tensor
    source: str


class Terms:
    """Two networks, a loss of two terms, and items that come from rows."""

    def __init__(self, rows: int = 6, **changes: Any) -> None:
        config = config_of(**changes)
        self.policy, self.critic = nn.Linear(1, 1), nn.Linear(1, 1)
        networks = {"policy": (self.policy, config.rate), "critic": (self.critic, config.rate)}
        self.optimizer = Optimizer(networks, config, 9, hardware_of())  # type: ignore[arg-type]
        self.items = [
            Item(torch.full((1,), 1.0 + i), torch.ones(1), f"rows.jsonl:{i + 1}")
            for i in range(rows)
        ]

    def loss(self, items: Sequence[Item]) -> Loss:
        x = torch.stack([item.x for item in items])  # (N, 1)
        worth = torch.stack([item.worth for item in items])
        policy, value = (self.policy(x) * worth).sum(), self.critic(x).square().sum()
        metrics = {"seen": x.sum(), "loss/policy": policy.detach(), "loss/value": value.detach()}
        return policy + value, metrics

    def step(self) -> dict[str, float]:
        return self.optimizer.step([LossTerm(cut(self.items, 2, lambda _: 1), self.loss, 6)])


def said(capsys: pytest.CaptureFixture[str]) -> str:
    line: str = capsys.readouterr().err
    assert line.count("\n") <= 1
    return line.strip()


def test_a_bad_tensor_of_a_row_is_named_before_what_it_spoils(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The loss of rows 2 and 5 is bad too, but because of `worth`; x, an earlier field, wins."""
    terms = Terms()
    for i in (1, 4):
        terms.items[i].worth = torch.tensor([math.nan])
    assert terms.step()["skipped"] == 1
    expected = "note: step skipped (1 in a row, 3 end the run); not finite: worth of "
    assert said(capsys) == f"{expected}rows.jsonl:2, rows.jsonl:5"
    terms.items[3].x = torch.tensor([-math.inf])
    terms.step()
    assert said(capsys).endswith("(2 in a row, 3 end the run); not finite: x of rows.jsonl:4")


def test_a_bad_term_of_the_loss_is_named_with_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    """Five rows whose square overflows: three are named."""
    terms = Terms()
    for i in range(5):
        terms.items[i].x = torch.tensor([1e30])
    terms.step()
    rows = "rows.jsonl:1, rows.jsonl:2, rows.jsonl:3 and 2 more"
    assert said(capsys).endswith(f"not finite: loss/value of {rows}")


def test_a_bad_weight_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    terms = Terms()
    with torch.no_grad():
        terms.critic.bias.fill_(math.nan)
    terms.step()
    assert said(capsys).endswith("not finite: weight critic: bias")


def test_a_bad_gradient_is_named_with_the_rows_that_give_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The loss is finite; a hook spoils the gradient of one weight where row 3 takes part."""
    terms = Terms(max_grad_norm=1.0)

    def loss(items: Sequence[Item]) -> Loss:
        found, metrics = terms.loss(items)
        bad = any(item.source == "rows.jsonl:3" for item in items)
        seen = terms.policy.weight * 1.0
        if bad and seen.requires_grad:
            seen.register_hook(lambda gradient: gradient * math.nan)
        return found + 0 * seen.sum(), metrics

    terms.optimizer.step([LossTerm([terms.items[:4], terms.items[4:]], loss, 6)])
    expected = "not finite: gradient of policy: weight, by rows.jsonl:3"
    assert said(capsys).endswith(expected)


def test_a_sum_that_overflows_is_of_no_row(capsys: pytest.CaptureFixture[str]) -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    optimizer = optimizer_of(layer)
    big = torch.full((4, 1), 3e38)
    optimizer.step([LossTerm([big], lambda x: (layer(x / x).sum() + x.sum(), {}), 1.0)])
    assert said(capsys).endswith("not finite: sum over 4 rows, though each is")


@pytest.mark.parametrize("most", [1, 2])
def test_as_many_skipped_in_a_row_as_the_config_says_end_the_run(most: int) -> None:
    terms = Terms(max_skipped=most)
    terms.items[0].worth = torch.tensor([math.nan])
    for _ in range(most - 1):
        terms.step()
    with pytest.raises(RunError) as stop:
        terms.step()
    steps = "1 step" if most == 1 else "2 steps"
    line = f"{steps} in a row had a loss or gradient that is not finite (loss nan, lr 0.001): worth"
    assert str(stop.value).startswith(f"{line} of rows.jsonl:1; lower algo.lr")


@pytest.mark.parametrize("bad", ["worth", "hook"])
def test_looking_for_the_cause_leaves_no_trace(bad: str) -> None:
    """Weights, moments, random states and the rate of a good step after it are the same."""
    terms, other = Terms(), Terms()
    other.policy.load_state_dict(terms.policy.state_dict())
    other.critic.load_state_dict(terms.critic.state_dict())

    def noisy(items: Sequence[Item]) -> Loss:
        torch.rand(3)  # as dropout draws
        found, metrics = terms.loss(items)
        seen = terms.policy.weight * 1.0
        if bad == "hook" and seen.requires_grad:
            seen.register_hook(lambda gradient: gradient * math.nan)
        return found + 0 * seen.sum(), metrics

    terms.step()
    other.step()
    torch.manual_seed(5)
    if bad == "worth":
        terms.items[2].worth = torch.tensor([math.nan])
    terms.optimizer.step([LossTerm([terms.items], noisy, 6)])
    assert terms.optimizer.skipped == 1
    after = torch.get_rng_state()
    torch.manual_seed(5)
    torch.rand(3)
    assert torch.equal(after, torch.get_rng_state())
    assert all(weight.grad is None for weight in terms.policy.parameters())
    before = {name: each.clone() for name, each in other.optimizer.tensors().items()}
    torch.testing.assert_close(terms.optimizer.tensors(), before, rtol=0, atol=0)
    torch.testing.assert_close(terms.policy.state_dict(), other.policy.state_dict())


def test_means_of_an_iteration_leave_out_what_a_skipped_update_could_not_measure() -> None:
    updates = [
        {"loss": 1.0, "kl": math.nan, "skipped": 0.0},
        {"loss": math.nan, "kl": math.nan, "skipped": 1.0},
        {"loss": 4.0, "kl": math.inf, "skipped": 1.0},
    ]
    means = mean_metrics(updates)
    assert means["loss"] == 2.5 and means["skipped"] == 1.0 and math.isnan(means["kl"])


# --------------------------------------------------------------------------- out of memory


class Small(Language):
    """A memory that holds no more than `most` padded tokens.

    sizes: those that it held.
    refused: how many it did not.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.refused = 0
        self.most = most
        self.model.model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module: nn.Module, args: Any, kwargs: dict[str, Tensor]) -> None:
        size = kwargs["input_ids"].numel()
        if size > self.most:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.sizes.append(size)


LONGEST = max(map(len, SEQUENCES))


@settings(max_examples=15)
@given(budget=st.integers(LONGEST, 99), most=st.integers(LONGEST, 99), texts=st.integers(0, 4))
@pytest.mark.slow
def test_halved_micro_batches_give_the_same_step(budget: int, most: int, texts: int) -> None:
    whole, small = Language(), Small(most)

    def parts(language: Language) -> list[LossTerm]:
        second = [LossTerm([SEQUENCES[:texts]], language.loss, 9, 0.5)] if texts else []
        return [LossTerm(cut(SEQUENCES, budget), language.loss, TOKENS), *second]

    expected = optimizer_of(whole.model).step(parts(whole))
    assert optimizer_of(small.model).step(parts(small)) == pytest.approx(expected, rel=1e-5)
    gradients = [
        [weight.grad for weight in language.model.parameters()] for language in (small, whole)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert max(small.sizes) <= most


def test_a_step_that_did_not_fit_is_told_once_and_remembered(
    capsys: pytest.CaptureFixture[str],
) -> None:
    small, resumed = Small(40), Small(40)
    optimizer = optimizer_of(small.model)
    for _ in range(3):
        optimizer.step([LossTerm([SEQUENCES], small.loss, TOKENS)])
        sizes, small.sizes = small.sizes, []
    assert said(capsys) == "note: out of memory; the step is done again in smaller micro-batches"
    again = optimizer_of(resumed.model)
    again.load(optimizer.tensors(), optimizer.state())
    again.step([LossTerm([SEQUENCES], resumed.loss, TOKENS)])
    assert resumed.sizes == sizes
    assert (small.refused, resumed.refused) == (1, 0)  # the whole, once
    assert said(capsys) == ""


def test_blocks_are_computed_again_before_micro_batches_are_halved(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And a run that goes on begins as the one before it had to become."""
    whole, small, resumed = Small(99), Small(40), Small(40)
    expected = optimizer_of(whole.model).step([LossTerm([SEQUENCES], whole.loss, TOKENS)])
    optimizer = optimizer_of(small.model, hardware=hardware_of())
    report = optimizer.step([LossTerm([SEQUENCES], small.loss, TOKENS)])
    assert report == pytest.approx(expected, rel=1e-5)
    assert capsys.readouterr().err.splitlines() == [
        "note: out of memory; backward computes 1 block again from here on "
        "(hardware.gradient_checkpointing=auto)",
        "note: out of memory; backward computes 2 blocks again from here on "
        "(hardware.gradient_checkpointing=auto)",
        "note: out of memory; the step is done again in smaller micro-batches",
    ]
    again = optimizer_of(resumed.model, hardware=hardware_of())
    again.load(optimizer.tensors(), optimizer.state())
    again.step([LossTerm([SEQUENCES], resumed.loss, TOKENS)])
    assert (small.refused, resumed.refused, said(capsys)) == (3, 0, "")
    assert [each.gradient_checkpointing for each in resumed.model.model.layers] == [True, True]


def test_the_draws_of_a_failed_attempt_are_drawn_again() -> None:
    """A run that was resumed and one that went on must drop the same units."""
    small, drawn = Small(40), []

    def loss(sequences: Sequence[Tokens]) -> Loss:
        drawn.append(torch.rand(1).item())
        return small.loss(list(sequences))

    optimizer = optimizer_of(small.model)
    torch.manual_seed(3)
    optimizer.step([LossTerm([SEQUENCES], loss, TOKENS)])
    torch.manual_seed(3)
    numbers = torch.rand(9).tolist()
    last = len(small.sizes)
    assert 1 < last < len(drawn) and drawn[-last:] == pytest.approx(numbers[:last])


def test_an_item_that_does_not_fit_ends_the_run_in_one_line() -> None:
    small = Small(LONGEST - 1)
    before = small.weights()
    lighter = partial(keys_that_help, replace(PLAIN, logprob_chunk=6), logits=True, gradient=True)
    part = LossTerm([SEQUENCES], small.loss, TOKENS, rows=lambda _: 2, keys_that_help=lighter)
    with pytest.raises(RunError) as stop:
        optimizer_of(small.model).step([part])
    assert str(stop.value) == (
        f"out of memory in the update, with as little at once as can be: 2 sequences x {LONGEST} = "
        f"{2 * LONGEST} padded tokens; what helps: hardware.logprob_chunk=3, "
        "hardware.gradient_checkpointing=true, shorter data.max_prompt_tokens and "
        "max_response_tokens, a smaller model"
    )
    assert torch.equal(small.weights(), before)
    assert all(weight.grad is None for weight in small.model.parameters())


def test_moments_that_do_not_fit_end_the_run_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    language = Language()
    optimizer = optimizer_of(language.model)

    def full(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(optimizer._adamw, "step", full)
    count = sum(weight.numel() for weight in language.model.parameters())
    with pytest.raises(RunError, match=f"AdamW keeps 2 numbers for each of {count} trained"):
        optimizer.step([LossTerm([SEQUENCES], language.loss, TOKENS)])
