"""Attention over rows without padding against attention as it is defined, pair by pair."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_cli.data.packing import Packing
from rlhf_cli.models.row_attention import Slots, UnknownAttention, attend, laid_out, recomputing

HEADS, SHARED_HEADS, WIDTH = 4, 2, 8
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 3},
    "softcap": {"softcap": 2.0},
    "sinks": {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "all": {"sliding_window": 2, "softcap": 1.5, "s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])},
}


class Nothing(nn.Module):
    """A module without anything of its own."""


def defined(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """(H, d) what one query, (H, d), makes of the keys that it may see, (S, H_kv, d)."""
    if sliding_window is not None:
        key, value = key[-sliding_window:], value[-sliding_window:]
    outs = []
    for head in range(HEADS):
        own = head // (HEADS // SHARED_HEADS)
        scores = key[:, own] @ query[head] * WIDTH**-0.5
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.exp()
        nothing = 0.0 if s_aux is None else s_aux[head].exp()
        outs.append(weights / (weights.sum() + nothing) @ value[:, own])
    return torch.stack(outs)


def drawn(tokens: int, heads: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, heads, tokens, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_see_themselves_and_the_prompt_they_share(kind: str) -> None:
    torch.manual_seed(0)
    query, key, value = drawn(9, HEADS), drawn(9, SHARED_HEADS), drawn(9, SHARED_HEADS)
    # a prompt of 3, its responses of 1 and 2, a sequence of 3 for itself
    seen = [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 4, 5], [6, 7, 8]]
    layout = Packing(
        [3, 1, 2, 3],
        query.device,
        [len(each) for each in seen],
        torch.tensor(sum(seen, [])),
    )
    with laid_out(Nothing(), layout):
        out, _ = attend(Nothing(), query, key, value, None, **KINDS[kind])
    k, v = key[0].transpose(0, 1), value[0].transpose(0, 1)
    place = 0
    for length, own in zip(layout.lengths, seen, strict=True):
        for i in range(length):
            places = own[: len(own) - length + i + 1]
            expected = defined(query[0, :, place], k[places], v[places], **KINDS[kind])
            torch.testing.assert_close(out[0, place], expected)
            place += 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_sees_what_it_holds(kind: str) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([4, 1, 6], dtype=torch.int32)
    query = drawn(1, HEADS, 3)
    key, value = drawn(6, SHARED_HEADS, 3), drawn(6, SHARED_HEADS, 3)
    with laid_out(Nothing(), Slots.of(lengths, 6)):
        out, _ = attend(Nothing(), query, key, value, None, **KINDS[kind])
    for row, length in enumerate(lengths.tolist()):
        k, v = key[row, :, :length].transpose(0, 1), value[row, :, :length].transpose(0, 1)
        expected = defined(query[row, :, 0], k, v, **KINDS[kind])
        torch.testing.assert_close(out[row, 0], expected)


def test_what_is_not_known_is_refused() -> None:
    query, key = drawn(2, HEADS), drawn(2, SHARED_HEADS)
    layout = Packing([2], query.device)
    for more in ({"dropout": 0.1}, {"is_causal": False}, {"position_bias": query}):
        with laid_out(Nothing(), layout), pytest.raises(UnknownAttention):
            attend(Nothing(), query, key, key, None, **more)
    with pytest.raises(UnknownAttention):
        attend(Nothing(), query, key, key, None)


def test_a_recomputation_finds_the_layout_of_its_forward() -> None:
    query, key = drawn(3, HEADS), drawn(3, SHARED_HEADS)
    with laid_out(Nothing(), Packing([1, 2], query.device)):
        forward, again = recomputing(Nothing())
        with forward:
            first, _ = attend(Nothing(), query, key, key, None)
    for _ in range(2):  # backward may come twice
        with again:
            second, _ = attend(Nothing(), query, key, key, None)
        assert torch.equal(first, second)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_the_operator_of_a_graph_has_the_gradient_of_the_plain_products(
    window: int | None, shared: bool
) -> None:
    torch.manual_seed(0)
    query, key, value = sides = (
        drawn(7, HEADS).requires_grad_(),
        drawn(7, SHARED_HEADS).requires_grad_(),
        drawn(7, SHARED_HEADS).requires_grad_(),
    )
    weights = torch.randn(1, 7, HEADS, WIDTH, dtype=torch.float64)
    layout = Packing([3, 4], query.device)
    if shared:
        keys = torch.tensor([0, 1, 2, 0, 1, 3, 4, 5, 6])
        layout = Packing([3, 4], query.device, [3, 6], keys)
    grads = []
    with laid_out(Nothing(), layout):
        plain, _ = attend(Nothing(), query, key, value, None, sliding_window=window)
        ours, _, _ = torch.ops.rlhf_cli.packed_attention(*sides, WIDTH**-0.5, window)
        torch.testing.assert_close(ours, plain)
        for out in (plain, ours):
            grads.append(torch.autograd.grad((out * weights).sum(), sides))
    for own, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.slow
def test_compiled_layers_are_two_graphs_whatever_the_layout() -> None:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=20,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)

    def gradient(lengths: list[int]) -> Tensor:
        model.zero_grad()
        ids = torch.arange(sum(lengths))[None] % 20
        positions = torch.cat([torch.arange(each) for each in lengths])[None]
        with laid_out(model, Packing(lengths, ids.device)):
            states = model.model(input_ids=ids, position_ids=positions, use_cache=False)
        states.last_hidden_state.pow(2).sum().backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    layouts = [[5, 7], [3, 9, 4], [20], [2, 2, 2]]
    expected = [gradient(each) for each in layouts]
    counted = CompileCounterWithBackend("aot_eager")
    for layer in model.model.layers:
        layer.compile(dynamic=True, backend=counted)
    for lengths, plain in zip(layouts, expected, strict=True):
        torch.testing.assert_close(gradient(lengths), plain, atol=1e-7, rtol=1e-5)
    assert counted.frame_count <= 2  # one of any size, and one of the first that was seen
