"""Decoder and head of models of many families, tried against their plain forward."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.batches import collate
from rlhf_cli.data.items import Tokens
from rlhf_cli.models.adapters import trained
from rlhf_cli.models.decoder import find_parts, hidden_states, parts_of, trunk, unembed
from rlhf_cli.models.forward import token_logprobs
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.save import save_model
from rlhf_cli.runs.model_sizes import base_shapes, count, towers_of
from rlhf_cli.runs.role_sizes import roles_of
from tests.conftest import Cli
from tests.pace import slow
from tests.toys import bpe, composed, llama, model_of

T: Any = transformers
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIGHT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
PLACES = {"image_token_id": 4, "video_token_id": 5, "vision_start_token_id": 6}


def gemma4(**more: Any) -> Any:
    """As released: the soft cap is in the text config."""
    text = {
        **SMALL,
        **more,
        "vocab_size_per_layer_input": more.get("vocab_size", 40),
        "hidden_size_per_layer_input": 8,
        "head_dim": 8,
        "global_head_dim": 8,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "final_logit_softcapping": 3.0,
    }
    sight = {**SIGHT, "num_key_value_heads": 2, "head_dim": 8}
    places = {"image_token_id": 4, "boi_token_id": 5, "eoi_token_id": 6}
    return T.Gemma4Config(text_config=text, vision_config=sight, audio_config=None, **places)


def qwen3_vl(**more: Any) -> Any:
    """Positions in three dimensions."""
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    sight = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    text = {**SMALL, **more, "head_dim": 8, "rope_parameters": rope}
    return T.Qwen3VLConfig(text_config=text, vision_config=sight, **PLACES, vision_end_token_id=7)


def gemma3(**more: Any) -> Any:
    """Its wrapper wants to know which tokens are images, in training mode."""
    text = {**SMALL, **more, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    places = {"image_token_index": 4, "boi_token_index": 5, "eoi_token_index": 6}
    return T.Gemma3Config(text_config=text, vision_config=SIGHT, mm_tokens_per_image=4, **places)


def mistral3(**more: Any) -> Any:
    """A text model inside, a tower and a projector."""
    return T.Mistral3Config(
        text_config=T.MistralConfig(**{**SMALL, **more}),
        vision_config=T.PixtralVisionConfig(**SIGHT),
        image_token_index=4,
    )


CONFIGS: dict[str, Callable[..., Any]] = {
    "granite": lambda: T.GraniteConfig(**SMALL, logits_scaling=8.0, embedding_multiplier=3.0),
    "cohere": lambda: T.CohereConfig(**SMALL, logit_scale=0.0625),
    "gemma2": lambda: T.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=5.0),
    "layers_in_the_head": lambda: T.ModernBertDecoderConfig(**SMALL, global_attn_every_n_layers=2),
    "lying_prefix": lambda: T.Llama4TextConfig(
        **SMALL, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, num_experts_per_tok=1
    ),
    "routers": lambda: T.MixtralConfig(**SMALL, num_local_experts=2, output_router_logits=True),
    "narrow_states": lambda: T.OPTConfig(
        vocab_size=40, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=16, dropout=0.0, init_std=0.3, pad_token_id=1,
    ),
    "gemma4": gemma4,
    "gemma3": gemma3,
    "qwen3_vl": qwen3_vl,
    "mistral3": mistral3,
}  # fmt: skip
SEEING = ("gemma4", "gemma3", "qwen3_vl", "mistral3")
FEW = ("granite", "lying_prefix", "gemma4", "gemma3", "qwen3_vl")
OWN = ("granite", "cohere", "gemma2", "layers_in_the_head", "gemma4")


def model_like(family: str, **more: Any) -> Any:
    """A random instance whose logits are far from equal."""
    config = CONFIGS[family](**more)
    auto = T.AutoModelForImageTextToText if family in SEEING else T.AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight if weight.any() else torch.randn_like(weight) / 4)
    return model


SEQUENCE = Tokens([7, 8, 9], [20, 11, 30, 31, 12, 3])


def whole(model: Any, ids: Tensor, temperature: float) -> Tensor:
    """Log-probs by the plain forward: (T, V)."""
    return functional.log_softmax(model(input_ids=ids, use_cache=False).logits[0] / temperature, -1)


@pytest.mark.parametrize(
    "family",
    [pytest.param(each, marks=() if each in FEW else pytest.mark.slow) for each in CONFIGS],
)
def test_log_probs_and_gradients_are_those_of_the_plain_forward(family: str) -> None:
    model = model_like(family)
    find_parts(model)
    assert (parts_of(model).stands is not None) == (family in OWN)
    batch = collate([SEQUENCE])
    expected = whole(model, batch.ids, 0.7)[2:-1].gather(1, batch.ids[0, 3:, None])[:, 0]
    found = []
    for mode in (False, True):  # some wrappers want more in training mode
        model.train(mode)
        grid = token_logprobs(model, batch, chunk=2, temperature=0.7, with_entropy=True)
        ours = grid.logprobs[batch.response]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        found.append(gradients(model, (ours**2).sum()))
    theirs = gradients(model.eval(), (expected**2).sum())
    assert sum(each is not None for each in theirs) > 5
    rounding = 1e-5 * torch.stack([each.norm() for each in theirs if each is not None]).norm()
    for mine in found:
        for each, plain in zip(mine, theirs, strict=True):
            assert (each is None) == (plain is None)
            assert plain is None or (each - plain).norm() <= rounding


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


def test_a_copy_makes_its_logits_by_its_own_weights() -> None:
    """The reference is a deep copy of a policy that then moves."""
    model = model_like("granite")
    find_parts(model)
    batch = collate([SEQUENCE])
    reference = Reference(model)
    before = unembed(model, hidden_states(model, batch)[0])
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    states = hidden_states(model, batch)[0]
    torch.testing.assert_close(unembed(model, states), -before)
    torch.testing.assert_close(unembed(reference.model, states), before)


def test_logits_of_a_model_in_bfloat16_are_float32() -> None:
    model = model_like("granite")
    find_parts(model)
    states = hidden_states(model, collate([SEQUENCE]))[0]
    exact = model.lm_head(states) / 8
    ours = unembed(model.bfloat16(), states.bfloat16(), temperature=0.7)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, exact / 0.7, rtol=0.02, atol=0.02)


def test_a_cap_that_only_large_logits_feel_is_found() -> None:
    """Of a model that has just been built, logits are far below it: the probe looks further."""
    config = T.Gemma2Config(**{**SMALL, "initializer_range": 1e-3}, head_dim=8)
    model: Any = T.Gemma2ForCausalLM(config).eval()
    find_parts(model)
    states = torch.full((1, 32), 1e4)
    assert model.get_output_embeddings()(states).abs().max() > 30
    assert unembed(model, states).abs().max() <= 30


def test_an_unembedding_of_zeros_does_not_hide_what_follows_it() -> None:
    model = model_like("granite")
    nn.init.zeros_(model.lm_head.weight)
    find_parts(model)
    assert parts_of(model).stands == "model"


def test_logits_of_more_than_the_states_are_refused() -> None:
    model: Any = llama()
    find_parts(model)
    forward: Callable[..., Any] = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    model.forward = scaled
    with pytest.raises(UserError, match="LlamaForCausalLM makes its logits in a way"):
        find_parts(model)


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    config = T.BertConfig(**{**SMALL, "num_key_value_heads": None}, is_decoder=False)
    with pytest.raises(UserError, match="sees later tokens"):
        find_parts(T.BertLMHeadModel(config).eval())
    config.is_decoder = True
    find_parts(model := T.BertLMHeadModel(config).eval())
    assert trunk(model) is model.bert


# --------------------------------------------------------------------------- models that see


WRITTEN = (("mistral3", 0), ("gemma3", 2))


def folder_of(family: str, place: Path) -> Path:
    """A checkpoint as its makers release it, with a processor's file."""
    tokenizer = bpe()
    save_model(model_like(family, vocab_size=len(tokenizer)), tokenizer, place, merge=True)
    (place / "preprocessor_config.json").write_text('{"image_processor_type": "X", "size": 8}')
    return place


@pytest.mark.parametrize(
    ("family", "rank"),
    [("qwen3_vl", 0), *(slow(*each) for each in WRITTEN)],
)
def test_towers_are_frozen_and_written_back(family: str, rank: int, tmp_path: Path) -> None:
    place = folder_of(family, tmp_path / "in")
    config = model_of(lora_rank=rank, lora_alpha=4.0)
    policy = load_policy(str(place), config, bpe(), CPU)
    moved = trained(policy)
    assert moved and not any("vis" in name or "projector" in name for name in moved)
    with torch.no_grad():
        for weight in moved.values():
            weight.add_(0.1)
    save_model(policy, bpe(), tmp_path / "out", merge=True)
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("in", "out"))
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "vis" in name or "projector" in name} | (
        {name for name in before if "norm" in name or "embed_tokens" in name} if rank else set()
    )
    said = [json.loads((tmp_path / s / "config.json").read_text()) for s in ("in", "out")]
    assert said[0]["architectures"] == said[1]["architectures"]
    files = [(tmp_path / side / "preprocessor_config.json").read_bytes() for side in ("in", "out")]
    assert files[0] == files[1]


def test_towers_count_as_weights_and_not_as_trained(tmp_path: Path) -> None:
    place = folder_of("qwen3_vl", tmp_path / "in")
    cfg = composed("dpo", "data=jsonl", "data.path=rows.jsonl", f"policy={place}")
    shapes = base_shapes(str(place))
    held, training = roles_of(cfg, shapes)
    model = load_policy(str(place), model_of(), bpe(), CPU)
    assert training["policy"] == sum(each.numel() for each in trained(model).values())
    assert held["policy"] == sum(each.numel() for each in model.parameters())
    assert held["reference"] == training["policy"] == held["policy"] - count(towers_of(shapes))


def test_the_reference_shares_the_towers(tmp_path: Path) -> None:
    policy: Any = load_policy(str(folder_of("mistral3", tmp_path)), model_of(), bpe(), CPU)
    reference: Any = Reference(policy)
    ours, theirs = policy.model.vision_tower, reference.model.model.vision_tower
    assert next(theirs.parameters()) is next(ours.parameters())
    assert copy.deepcopy(policy).towers == ["model.vision_tower", "model.multi_modal_projector"]


def test_weights_that_the_class_has_no_place_for_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Qwen 3.5's checkpoints predict several tokens at once; its class passes over that part."""
    place = folder_of("mistral3", tmp_path)
    weights = load_file(place / "model.safetensors")
    weights["mtp.layers.0.proj.weight"] = torch.ones(2, 2)
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    load_policy(str(place), model_of(), bpe(), CPU)
    assert "no place for 1 of its weights, such as mtp.layers.0" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_that_sees_goes_through_a_stage(cli: Cli, tmp_path: Path) -> None:
    folder_of("gemma4", tmp_path / "in")
    rows = [{"prompt": f"{n}", "chosen": "a b", "rejected": "c"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data=jsonl", "data.path=rows.jsonl", "data.eval_rows=2", "algo.batch_size=4"]
    done = cli("dpo", "policy=in", *words, "algo.epochs=1", "algo.warmup_steps=0", "out=out")
    assert done.returncode == 0, done.stderr
    assert "text alone is learnt; frozen: model.vision_tower, model.embed_vision" in done.stderr
    model = T.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(model) is T.Gemma4ForConditionalGeneration
    assert (tmp_path / "out/preprocessor_config.json").is_file()
