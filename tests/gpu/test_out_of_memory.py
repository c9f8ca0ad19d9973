"""A GPU with little memory: work is cut and ends the same, or a run ends in one line."""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_cli.config.errors import RunError
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.models.forward import response_nll
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.rollout.native import NativeEngine
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.training.loss_term import LossTerm
from rlhf_cli.training.optimize import Optimizer
from tests.toys import DEVICE, bpe, composed, data_of, hardware_of, llama

pytestmark = pytest.mark.gpu
MIB = 2**20
SHARES = [0.7, 0.4, 0.2, 0.1]  # of what the work takes when nothing limits it
ALL_AT_ONCE = {"tokens_per_microbatch": 10**9, "rollout_tokens": 10**9}
Limit = Callable[[float], AbstractContextManager[None]]


@contextmanager
def at_most(size: float) -> Iterator[None]:
    """The process gets so many bytes of the GPU more than it holds."""
    free_all()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    limit = torch.cuda.memory_reserved() + size
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        free_all()


def free_all() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def taken(work: Callable[[], Any]) -> tuple[Any, int]:
    """What some work gives, and the bytes of the GPU that it takes for itself."""
    work()  # what is loaded once is there
    free_all()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = work()
    return found, torch.cuda.max_memory_allocated() - before


def decoder() -> Any:
    size = {"hidden_size": 512, "intermediate_size": 2048, "num_key_value_heads": 4}
    model: Any = llama(300, **size, max_position_embeddings=2048, initializer_range=0.05)
    return model.to(DEVICE)


def sequences(count: int = 128) -> list[Tokens]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (count, 500), generator=generator).tolist()
    return [Tokens(row[:100], row[100 : 300 + i]) for i, row in enumerate(ids)]


@pytest.mark.parametrize("share", SHARES)
def test_scoring(share: float) -> None:
    model, items = decoder(), sequences()

    def score() -> list[Tensor]:
        return logprobs_of(model, items, hardware_of(**ALL_AT_ONCE, logprob_chunk=10**6))

    expected, size = taken(score)
    with at_most(share * size):
        torch.testing.assert_close(score(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", SHARES)
def test_sampling(share: float) -> None:
    model, tokenizer = decoder(), bpe()
    encoder = Encoder(tokenizer, data_of(max_prompt_tokens=64, max_response_tokens=192))
    prompts = encoder.prompts([Prompt(f"{i} plus {i}, and then a long story") for i in range(64)])

    def sample() -> list[list[int]]:
        engine = NativeEngine(model, encoder, hardware_of(**ALL_AT_ONCE))
        found = engine.sample(prompts, Sampling(192, min_tokens=150), samples=4, seed=3)
        return [rollout.tokens.response for rollout in found]

    expected, size = taken(sample)
    with at_most(share * size):
        found = sample()
    # a draw within rounding of the border between two tokens may fall on its other side
    alike = sum(one == other for one, other in zip(found, expected, strict=True))
    assert alike > 0.95 * len(expected)


@pytest.mark.parametrize("share", SHARES)
def test_training(share: float, capsys: pytest.CaptureFixture[str]) -> None:
    items = sequences()
    count = sum(len(item.response) for item in items)

    def step() -> tuple[dict[str, float], dict[str, Tensor]]:
        model = decoder()
        optimizer = Optimizer({"": (model, 1e-3)}, composed("sft").algo, 3, hardware_of())

        def loss(batch: list[Tokens]) -> tuple[Tensor, dict[str, Tensor]]:
            return response_nll(model, batch, hardware_of(logprob_chunk=10**6)).sum(), {}

        report = optimizer.step([LossTerm([items], loss, count)])
        return report, {name: weight.grad.cpu() for name, weight in model.named_parameters()}

    (report, gradients), size = taken(step)
    capsys.readouterr()
    with at_most(share * size):
        found, ours = step()
    assert found["loss"] == pytest.approx(report["loss"], rel=1e-5)
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
    assert "out of memory" in capsys.readouterr().err


def test_an_item_that_does_not_fit_ends_in_one_line() -> None:
    model, item = decoder(), Tokens([5] * 100, [7] * 1900)
    with at_most(0), pytest.raises(RunError, match="^out of memory in scoring, .*: 1 sequence x"):
        logprobs_of(model, [item, item], hardware_of(**ALL_AT_ONCE))


@pytest.mark.parametrize("room", [4 * MIB, 40 * MIB, 80 * MIB, 120 * MIB])
def test_moments_that_do_not_fit_end_the_run_in_one_line(room: int) -> None:
    """A weight of 64 MiB and its gradient; AdamW wants twice that beside them."""
    layer = nn.Linear(4096, 4096, bias=False, device=DEVICE)
    optimizer = Optimizer({"": (layer, 1e-3)}, composed("sft").algo, 3, hardware_of())
    with at_most(64 * MIB + room), pytest.raises(RunError, match="out of memory in the update"):
        optimizer.step([LossTerm([[Tokens([1], [2])]], lambda items: (layer.weight.sum(), {}), 1)])
