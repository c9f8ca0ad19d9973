"""Rows without padding by the flash kernels, beside the same attention in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_cli.data.packing import Packing
from rlhf_cli.models import row_attention
from rlhf_cli.models.row_attention import Slots, attend, laid_out
from tests.toys import DEVICE

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
HEADS, SHARED_HEADS, WIDTH = 14, 2, 64
KINDS: dict[str, dict[str, Any]] = {"plain": {}, "window": {"sliding_window": 40}}
LENGTHS = [1, 130, 7, 64, 300]


def drawn(tokens: int, heads: int, rows: int = 1) -> Tensor:
    """(rows, heads, tokens, WIDTH), rounded to bfloat16 and of full precision."""
    return torch.randn(rows, heads, tokens, WIDTH, device=DEVICE).to(BF16).double()


def of(layout: Packing | Slots, dtype: torch.dtype, inputs: list[Tensor], **kind: Any) -> Tensor:
    """(B, T, H, d) attention over inputs in a type; its kernels are those of that type."""
    query, key, value = (each.to(dtype) for each in inputs)
    with laid_out(nn.Module(), layout):
        return attend(nn.Module(), query, key, value, None, **kind)[0]


def near(found: Tensor, rounded: Tensor, exact: Tensor) -> None:
    """Off by at most twice what plain products in bfloat16 are off, which round as often."""
    off, allowed = ((each.double() - exact).abs().max().item() for each in (found, rounded))
    assert off <= 2 * allowed + 1e-3 * exact.abs().max().item()


@pytest.fixture(autouse=True)
def flash_is_there() -> None:
    """Else plain products would be compared with themselves."""
    sample = torch.zeros(1, SHARED_HEADS, 8, WIDTH, device=DEVICE, dtype=BF16)
    assert row_attention._has_flash(sample, sample, sample)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_and_their_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    total = sum(LENGTHS)
    inputs = [drawn(total, heads) for heads in (HEADS, SHARED_HEADS, SHARED_HEADS)]
    weights = torch.randn(1, total, HEADS, WIDTH, device=DEVICE).double()
    layout = Packing(LENGTHS, DEVICE)

    def made(dtype: torch.dtype) -> list[Tensor]:
        leaves = [each.to(dtype).requires_grad_() for each in inputs]
        out = of(layout, dtype, leaves, **KINDS[kind])
        return [out, *torch.autograd.grad((out.double() * weights).sum(), leaves)]

    found, exact = made(BF16), made(torch.float64)
    monkeypatch.setattr(row_attention, "_has_flash", lambda *tensors: False)
    for ours, plain, true in zip(found, made(BF16), exact, strict=True):
        near(ours, plain, true)


def test_responses_that_share_their_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    prompt, responses = 90, [5, 70, 33]
    inputs = [
        drawn(prompt + sum(responses), heads) for heads in (HEADS, SHARED_HEADS, SHARED_HEADS)
    ]
    seen, place = [list(range(prompt))], prompt
    for length in responses:
        seen.append([*range(prompt), *range(place, place + length)])
        place += length
    places = torch.tensor(sum(seen, []), device=DEVICE)
    layout = Packing([prompt, *responses], DEVICE, [len(each) for each in seen], places)
    found, exact = of(layout, BF16, inputs), of(layout, torch.float64, inputs)
    monkeypatch.setattr(row_attention, "_has_flash", lambda *tensors: False)
    near(found, of(layout, BF16, inputs), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_slots_of_a_cache(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    capacity = 192
    lengths = torch.tensor([1, 192, 17, 100, 64], dtype=torch.int32, device=DEVICE)
    inputs = [
        drawn(tokens, heads, len(lengths))
        for tokens, heads in ((1, HEADS), (capacity, SHARED_HEADS), (capacity, SHARED_HEADS))
    ]
    layout = Slots.of(lengths, capacity)
    found = of(layout, BF16, inputs, **KINDS[kind])
    exact = of(layout, torch.float64, inputs, **KINDS[kind])
    monkeypatch.setattr(row_attention, "_has_flash", lambda *tensors: False)
    near(found, of(layout, BF16, inputs, **KINDS[kind]), exact)


def test_gradients_are_the_same_bytes_each_time() -> None:
    """Which they are under the strict setting alone: the kernels add up as threads come."""
    from rlhf_cli.models.repeatable import ask_for_repeatable_sums, repeatably

    ask_for_repeatable_sums()
    torch.manual_seed(3)
    layout = Packing([2048] * 4, DEVICE)
    leaves = [drawn(8192, heads).to(BF16) for heads in (HEADS, SHARED_HEADS, SHARED_HEADS)]
    for leaf in leaves:
        leaf.requires_grad_()

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(of(layout, BF16, leaves).float().square().sum(), leaves)

    first = repeatably(gradients, lambda: None)
    for _ in range(5):
        for one, other in zip(first, repeatably(gradients, lambda: None), strict=True):
            assert torch.equal(one, other)
