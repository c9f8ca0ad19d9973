"""Norms by one operator: the same numbers, and only where they are that norm."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from rlhf_cli.models.norms import fuse_norms


@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
def test_a_fused_norm_gives_the_same_bits(size: float) -> None:
    norm = Qwen2RMSNorm(32, eps=1e-6)
    norm.weight.data.uniform_(-1, 2)
    states = torch.randn(3, 5, 32) * size
    plain = norm(states)
    assert fuse_norms(nn.ModuleList([norm])) == 1
    assert torch.equal(norm(states), plain)
    low = states.bfloat16()  # beside float32 weights: as the family has it
    assert torch.equal(norm(low), Qwen2RMSNorm.forward(norm, low))


@pytest.mark.parametrize(
    "norm", [GemmaRMSNorm(8), BambaRMSNormGated(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)]
)
def test_what_computes_something_else_is_left_alone(norm: nn.Module) -> None:
    assert fuse_norms(norm) == 0


def test_a_copy_of_a_fused_norm_has_its_own_weights() -> None:
    norm = Qwen2RMSNorm(8)
    fuse_norms(norm)
    twin = copy.deepcopy(norm)
    norm.weight.data.zero_()
    states = torch.randn(2, 8)
    assert torch.equal(norm(states), torch.zeros(2, 8))
    assert twin(states).abs().sum() > 0
