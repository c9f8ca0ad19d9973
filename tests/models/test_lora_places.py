"""Where LoRA goes, by structure, and that peft puts it there and nowhere else."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from rlhf_cli.models.adapters import POLICY, REFERENCE, Acting, add_adapter, copy_adapter, trained
from rlhf_cli.models.lora_places import (
    in_short,
    lora_places,
    peft_targets,
    shortest,
    without_parameters,
)
from rlhf_cli.models.recompute import recompute_activations
from tests.model_families import model_of, names
from tests.pace import fast

ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
MLP = ["down_proj", "gate_proj", "up_proj"]
EXPERTS = ["experts.down_proj", "experts.gate_up_proj"]
LATENT = ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"]
CASES = {
    "gpt2": (["c_attn", "c_fc", "c_proj"], [], []),
    "llama": (sorted(ATTENTION + MLP), [], []),
    "mixtral": (ATTENTION, EXPERTS, ["model.layers.*.mlp.gate"]),
    "gpt_oss": (ATTENTION, EXPERTS, ["model.layers.*.mlp.router"]),
    "llama4_text": (
        *(sorted(ATTENTION + MLP), EXPERTS),
        ["model.layers.*.feed_forward.router"],
    ),
    "qwen2_moe": (
        *(sorted(ATTENTION + MLP), EXPERTS),
        ["model.layers.*.mlp.gate", "model.layers.*.mlp.shared_expert_gate"],
    ),
    # peft takes gate_proj for a name of experts here, also in the dense MLP and the shared experts
    "deepseek_v3": (
        LATENT,
        sorted([*EXPERTS, *(f"{name}.weight" for name in MLP)]),
        ["model.layers.*.mlp.gate"],
    ),
    # the mixer multiplies by these itself, past the layers
    "mamba": (
        ["in_proj"],
        [],
        [f"backbone.layers.*.mixer.{name}" for name in ("A_log", "conv1d", "dt_proj")]
        + [f"backbone.layers.*.mixer.{name}" for name in ("out_proj", "x_proj")],
    ),
}
MIXTURES = ["mixtral", "deepseek_v3", "gpt_oss"]
MORE = ["qwen2_moe", "llama4_text", "granitemoehybrid", "jamba", "zamba2"]


@pytest.mark.parametrize("family", CASES)
def test_targets_are_every_linear_layer_but_head_and_router(family: str) -> None:
    modules, parameters, left_out = CASES[family]
    model = model_of(family)
    places = lora_places(model)
    targets = peft_targets(model, places)
    assert targets == {"target_modules": modules, "target_parameters": parameters}
    assert in_short(places.left_out) == left_out


def test_shortest_ends_fit_what_is_wanted_alone() -> None:
    names = ["a.0.x", "a.1.x", "b.0.x", "b.0.y", "y"]
    assert shortest(["a.0.x", "a.1.x"], names) == ["a.0.x", "a.1.x"]  # b has an x, too
    assert shortest(["a.0.x", "a.1.x", "b.0.x"], names) == ["x"]
    assert shortest(["b.0.y"], names) == ["b.0.y"]  # not the y that stands alone
    assert shortest(["b.0.y"], names[:-1]) == ["y"]


def test_dropout_and_dora_go_without_parameters() -> None:
    model = model_of("deepseek_v3")
    plain = without_parameters(model, lora_places(model))
    assert peft_targets(model, plain) == {"target_modules": LATENT, "target_parameters": []}
    assert in_short(plain.left_out) == [
        f"model.layers.*.{name}"
        for name in (
            *("mlp.down_proj", "mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate"),
            *("mlp.gate_proj", *(f"mlp.shared_experts.{each}" for each in MLP), "mlp.up_proj"),
        )
    ]


def adapted_of(family: str) -> tuple[Any, Any]:
    """A family's model without and with a random adapter on all places."""
    model = model_of(family)
    base = copy.deepcopy(model)
    targets: Any = peft_targets(model, lora_places(model))
    lora = peft.LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **targets)
    adapted = peft.get_peft_model(model, lora).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in trained(adapted).values():
            weight.add_(torch.randn(weight.shape, generator=draw) * 0.05)
    return base, adapted


IDS = torch.tensor([[7, 8, 9, 10, 11, 12, 13, 14], [21, 22, 23, 24, 25, 26, 27, 28]])


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


def gradients_of(adapted: Any) -> dict[str, Tensor]:
    adapted.zero_grad()
    adapted(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {
        name: weight.grad.clone()
        for name, weight in trained(adapted).items()
        if weight.grad is not None and weight.grad.any()
    }


@pytest.mark.parametrize("family", fast(MIXTURES, [*MIXTURES, *MORE]))
def test_adapters_on_experts_are_adapters_as_others_are(family: str, tmp_path: Path) -> None:
    base, adapted = adapted_of(family)
    own, plain = logits_of(adapted), logits_of(base)
    assert (own - plain).abs().max() > 1e-2
    add_adapter(adapted, REFERENCE, adapted.peft_config[POLICY])
    with Acting(adapted, REFERENCE):
        assert not torch.allclose(logits_of(adapted), own, atol=1e-4)
    copy_adapter(adapted, POLICY, REFERENCE)
    with Acting(adapted, REFERENCE):
        torch.testing.assert_close(logits_of(adapted), own)
    with Acting(adapted):
        torch.testing.assert_close(logits_of(adapted), plain)

    gradients = gradients_of(adapted)
    assert gradients.keys() == trained(adapted).keys()  # none is there for nothing
    recompute_activations(adapted)
    torch.testing.assert_close(gradients_of(adapted), gradients)
    adapted.eval()

    adapted.save_pretrained(tmp_path, selected_adapters=[POLICY])
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(logits_of(loaded), own)
    merged = copy.deepcopy(adapted).merge_and_unload(adapter_names=[POLICY]).eval()
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits_of(again), own, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", names())
def test_peft_adapts_the_places_and_no_others(family: str) -> None:
    model = model_of(family)
    places = lora_places(model)
    _, adapted = adapted_of(family)
    rows = {name for name, _ in adapted.named_parameters() if ".lora_A." in name}
    layers = {name.split(".lora_A.")[0] for name in rows}
    assert len(rows) == len(places.linear) + len(places.experts)
    inner = {layer.removeprefix("base_model.model.").replace(".base_layer", "") for layer in layers}
    assert inner == {*places.linear, *(each.rpartition(".")[0] for each in places.experts)}
    assert not {name for name in places.linear if name.endswith(("lm_head", "score"))}
