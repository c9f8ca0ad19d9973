"""An adapter's numbers from a folder alone are those that are trained of the model in it."""

import math
from pathlib import Path
from typing import Any

import peft
import pytest

from rlhf_cli.folders.linear_shapes import expert_numbers, linear_shapes
from rlhf_cli.folders.manifest import Shapes, shapes_of
from rlhf_cli.models.experts import decoder_of, experts_of
from rlhf_cli.models.lora_places import lora_places, peft_targets
from rlhf_cli.runs.adapter_sizes import lora
from rlhf_cli.runs.model_sizes import of_text
from tests.model_families import build, model_of, names
from tests.pace import fast
from tests.toys import model_of as config_of

QUICK = ["gpt2", "mamba", "llama", "mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"]
ROUGH = [
    "gemma3n_text"
]  # computes with the matrix of one small layer past it, which no shape shows
SLOW = [name for name in names() if name not in {*QUICK, *ROUGH}]


@pytest.mark.parametrize("family", fast(QUICK, [*QUICK, *SLOW]))
def test_the_numbers_of_an_adapter_are_those_that_are_trained(family: str, tmp_path: Path) -> None:
    build(family, tmp_path)
    model = model_of(family)
    experts = experts_of(decoder_of(model)[1])
    targets: Any = peft_targets(model, lora_places(model))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, **targets))
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    shapes = shapes_of(tmp_path)
    assert lora(of_text(shapes), config_of(lora_rank=3)) == trained
    assert expert_numbers(shapes) == sum(weight.numel() for weight in experts.values())


def test_experts_apart_by_hand() -> None:
    block = "model.layers.0.mlp"
    shapes: Shapes = {
        "model.embed_tokens.weight": (9, 4),
        "model.layers.0.self_attn.q_proj.weight": (6, 4),
        "model.layers.0.norm.weight": (4,),
        f"{block}.gate.weight": (2, 4),
        f"{block}.shared_expert_gate.weight": (1, 4),
    }
    for expert in (0, 1):
        shapes |= {
            f"{block}.experts.{expert}.{name}_proj.weight": (5, 4) for name in ("gate", "up")
        }
        shapes[f"{block}.experts.{expert}.down_proj.weight"] = (4, 5)
    assert linear_shapes(shapes) == {
        "model.layers.0.self_attn.q_proj": (6, 4),
        f"{block}.experts.gate_proj+up_proj": (20, 8),
        f"{block}.experts.down_proj": (8, 10),
    }
    assert expert_numbers(shapes) == 2 * 3 * math.prod((5, 4))
