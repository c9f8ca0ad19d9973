"""Which models may read packed rows: a probe finds those that would be wrong without a word."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    LlamaForTokenClassification,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from rlhf_cli.data.packing import PACKED, PADDED, SHARED
from rlhf_cli.models import row_attention
from rlhf_cli.models.compiled import compile_blocks
from rlhf_cli.models.layouts import found_layout, layout_of
from tests.model_families import FAMILIES, model_of
from tests.models.test_answers import LANGUAGE_MODELS, VOCABULARY, scorer, small
from tests.toys import hardware_of, llama

# Attention of their own, chunks that no layout tells of, or states that run along the row.
OTHERS = {"gptj", "codegen", "gpt_neo", "bloom", "mpt", "falcon", "xglm", "mamba", "falcon_mamba"}
OTHERS |= {"mamba2", "qwen3_next", "qwen3_5_text", "qwen3_5", "lfm2", "falcon_h1", "jamba", "bamba"}
OTHERS |= {"zamba2", "nemotron_h", "granitemoehybrid", "recurrent_gemma", "llama4_text", "llama4"}


@pytest.mark.parametrize("make", LANGUAGE_MODELS)
def test_decoders_pack_and_share(make: Callable[[], nn.Module]) -> None:
    assert found_layout(make()) == (SHARED, "")


def test_scorers_pack_and_share() -> None:
    adapters = peft.LoraConfig(target_modules="all-linear", exclude_modules=["score"])
    adapted = peft.get_peft_model(scorer(LlamaForTokenClassification), adapters)
    for model in (scorer(), adapted):
        assert found_layout(model) == (SHARED, "")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_pack(family: str) -> None:
    layout, why = found_layout(model_of(family))
    assert layout == (PADDED if family in OTHERS else SHARED), why


def test_states_and_other_attention_stay_padded() -> None:
    eager = llama(VOCABULARY, attn_implementation="eager")
    layout, why = found_layout(eager)
    assert layout == PADDED and "model.attention=eager" in why
    state_space = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1
    )
    layout, why = found_layout(MambaForCausalLM(state_space))
    assert layout == PADDED and "see each other" in why


def test_a_window_beyond_the_probe_is_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(MistralConfig, sliding_window=4096)
    model = MistralForCausalLM(config).eval()
    assert found_layout(model) == (SHARED, "")
    assert config.sliding_window == 4096
    attend = row_attention.attend

    def without_window(*args: Any, **kwargs: Any) -> Any:
        return attend(*args, **{**kwargs, "sliding_window": None})

    names = AttentionInterface._global_mapping
    monkeypatch.setitem(names, row_attention.NAME, without_window)
    assert found_layout(model)[0] == PADDED


def test_a_model_with_positions_of_its_own_stays_padded() -> None:
    model = llama(VOCABULARY)
    forward = model.model.forward

    def counted(**inputs: Any) -> Any:
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
        return forward(**inputs)

    model.model.forward = counted
    # rotations go by distances: what only shifts a sequence leaves no trace, what moves a response
    # away from its prompt does
    assert found_layout(model)[0] == PACKED


def test_a_wrong_gradient_is_found() -> None:
    """Its states are right."""
    model = llama(VOCABULARY)
    forward = model.model.forward

    def leaking(**inputs: Any) -> Any:
        output = forward(**inputs)
        hidden = output.last_hidden_state
        if inputs["attention_mask"] is None:
            mean = hidden.mean(1, keepdim=True)
            output.last_hidden_state = hidden + mean - mean.detach()
        return output

    model.model.forward = leaking
    assert found_layout(model)[0] == PADDED


def test_what_keeps_rows_padded_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    model = llama(VOCABULARY)
    forward = model.model.forward

    def strict(**inputs: Any) -> Any:
        if inputs["attention_mask"] is None:
            raise ValueError("a mask is needed\nand more")
        return forward(**inputs)

    model.model.forward = strict
    for _ in range(2):
        assert layout_of(model, hardware_of()) == PADDED
    said = capsys.readouterr().err
    assert said.splitlines() == ["note: rows of LlamaForCausalLM stay padded: a mask is needed"]
    assert layout_of(llama(), hardware_of(packing="false")) == PADDED
    assert layout_of(llama(), hardware_of(share_prompts=False)) == PACKED


def test_compiled_blocks_are_tried_as_they_are_written() -> None:
    """Without a compiler passes will run so, too; with one a trial is not worth its time."""

    def refuses(graph: Any, inputs: Any) -> Any:
        raise ValueError("no compiler here")

    model = llama(VOCABULARY)
    compile_blocks(model, refuses)
    assert found_layout(model) == (SHARED, "")


def test_a_probe_leaves_the_random_state_and_the_mode_alone() -> None:
    model = llama(VOCABULARY).train()
    state = torch.random.get_rng_state()
    found_layout(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(weight.grad is None for weight in model.parameters())
