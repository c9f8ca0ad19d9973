"""Positions and widths of a decoder from its config, whatever it calls them."""

from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.folders.cached import folder_of
from rlhf_cli.folders.geometry import Geometry, blocks_of, context_of

WIDTHS: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 99}
LLAMA: dict[str, Any] = {**WIDTHS, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"n_positions": 512, "n_ctx": 1024}, 512),
        ({"max_seq_len": 512, "attn_config": {"alibi": True}}, 512),
        ({"text_config": {"max_position_embeddings": 512}, "vision_config": {}}, 512),
        ({"thinker_config": {"text_config": {"n_positions": 512}}}, 512),
        ({"max_position_embeddings": None, "seq_length": 512}, 512),
        ({"max_position_embeddings": 512, "alibi": True}, None),
        ({"state_size": 16}, None),
        ({"max_position_embeddings": -1}, None),
    ],
)
def test_positions_have_many_names(config: dict[str, Any], context: int | None) -> None:
    assert context_of(config) == context


def test_stretched_rope_has_the_positions_of_its_factor() -> None:
    """YaRN as Qwen's cards say to add it; Llama 3.1's limit is stretched already."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert context_of({"max_position_embeddings": 32768, "rope_scaling": yarn}) == 131072
    llama3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    assert context_of({"max_position_embeddings": 131072, "rope_parameters": llama3}) == 131072


def test_a_learned_table_of_positions_is_as_long_as_it_is() -> None:
    shapes = {
        "transformer.wte.weight": (99, 64),
        "transformer.wpe.weight": (40, 64),
        "transformer.h.0.attn.relative_position.weight": (8, 64),
        "transformer.h.0.ln.weight": (64,),
    }
    assert context_of(LLAMA, shapes) == 40
    assert context_of({**LLAMA, "n_positions": 30}, shapes) == 30


@pytest.mark.parametrize(
    ("config", "geometry"),
    [
        (LLAMA, Geometry(2, 64, 64, 256, 99, 4, 2, False)),
        (
            {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99, "multi_query": True},
            Geometry(2, 64, 16, 256, 99, 4, 2, False),
        ),
        (
            {
                "d_model": 64,
                "n_layers": 2,
                "n_heads": 4,
                "vocab_size": 99,
                "attn_config": {"kv_n_heads": 2},
                "ffn_config": {"ffn_hidden_size": 96},
            },
            Geometry(2, 64, 32, 96, 99, 4, 2, False),
        ),
        ({**LLAMA, "intermediate_size": [32, 96]}, Geometry(2, 64, 64, 64, 99, 4, 2, False)),
        (
            {
                "model_dim": 64,
                "num_transformer_layers": 2,
                "vocab_size": 99,
                "head_dim": 16,
                "num_query_heads": [4, 8],
                "num_kv_heads": [1, 3],
            },
            Geometry(2, 64, 32, 256, 99, 6, 2, False),
        ),
        (
            {**LLAMA, "moe_intermediate_size": 32, "num_experts_per_tok": 3},
            Geometry(2, 64, 64, 96, 99, 4, 2, False),
        ),
        (
            {**WIDTHS, "layer_types": ["linear_attention", "conv", "full_attention"]},
            Geometry(3, 64, 64, 256, 99, 4, 1, False),
        ),
    ],
)
def test_widths_have_many_names_and_may_differ(config: dict[str, Any], geometry: Geometry) -> None:
    assert Geometry.of(config) == geometry
    assert blocks_of({"text_config": config}) == geometry.layers


@pytest.mark.parametrize(
    "config", [{}, WIDTHS, {**LLAMA, "vocab_size": [9]} | {"hidden_size": "wide"}]
)
def test_what_is_not_said_is_unknown(config: dict[str, Any]) -> None:
    with pytest.raises(KeyError):
        Geometry.of(config)


def test_a_state_space_has_no_known_widths() -> None:
    with pytest.raises(KeyError, match="state-space"):
        Geometry.of({**LLAMA, "mamba_d_state": 16})


def test_a_hub_id_is_found_where_its_download_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert folder_of("owner/name") == snapshot
    assert folder_of("owner/other") == Path("owner/other")
    assert folder_of("no hub id!") == Path("no hub id!")
