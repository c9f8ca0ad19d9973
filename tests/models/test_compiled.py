"""Compiled blocks: few graphs for all layers and lengths, the same gradients, the same names."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from rlhf_cli.data.packing import Packing
from rlhf_cli.models.adapters import unite
from rlhf_cli.models.compiled import compile_blocks, run_plainly
from rlhf_cli.models.decoder import trunk
from rlhf_cli.models.dropout import residual_dropout
from rlhf_cli.models.recompute import recompute_activations
from rlhf_cli.models.row_attention import laid_out
from tests.toys import llama

LAYOUTS = ([5, 7], [3, 9, 4], [20])


def gradients(model: nn.Module, lengths: list[int]) -> dict[str, Tensor]:
    model.zero_grad()
    device = next(model.parameters()).device
    ids = torch.arange(sum(lengths), device=device)[None] % 20
    positions = torch.cat([torch.arange(each) for each in lengths])[None].to(device)
    with laid_out(model, Packing(lengths, ids.device)):
        states = trunk(model)(input_ids=ids, position_ids=positions, use_cache=False)
    states.last_hidden_state.pow(2).sum().backward()
    return {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_six_layers_and_three_lengths_are_two_graphs(adapted: bool, share: float) -> None:
    torch._dynamo.reset()
    model: nn.Module = llama(num_hidden_layers=6)
    if adapted:
        targets = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(model, targets)
        unite(model)
    expected = [gradients(model, lengths) for lengths in LAYOUTS]
    names = list(model.state_dict())
    counted = CompileCounterWithBackend("aot_eager")
    if share:
        recompute_activations(model, share)
    assert compile_blocks(model, counted) == 6
    assert list(model.state_dict()) == names
    for lengths, plain in zip(LAYOUTS, expected, strict=True):
        torch.testing.assert_close(gradients(model, lengths), plain, atol=1e-6, rtol=1e-4)
    made = [graph for graph in counted.graphs if len(graph.graph.nodes)]
    assert len(made) <= 2  # of a first block whose input has no gradient, and of all others
    run_plainly(model)
    compiled = counted.frame_count
    gradients(model, [4])
    assert counted.frame_count == compiled


def test_what_goes_by_values_or_is_read_along_is_not_compiled() -> None:
    dropping: Any = llama()
    residual_dropout(dropping, 0.1)
    assert compile_blocks(dropping) == compile_blocks(nn.Linear(2, 1)) == 0
