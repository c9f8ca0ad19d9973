"""Tiny random models of real families, each with a tokenizer made as that family's is.

`build(family, path)` writes one as its makers would: config, weights, tokenizer and a generation
config with all ids that end a response. The same family has the same bytes every time.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from tests.families import state_of

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# --------------------------------------------------------------------------- tokenizers


@dataclass(frozen=True)
class Vocabulary:
    """What a family's tokenizer calls its special tokens, and what it puts before a text.

    starts: tokens before every text; stops: those that end a response, where EOS is not the only
    one; named: further arguments of the tokenizer's class.
    """

    backend: str
    eos: str
    bos: str | None = None
    pad: str | None = None
    starts: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)


VOCABULARIES = {
    # neither a pad token nor another unknown one than EOS
    "gpt2": Vocabulary(
        "gpt2", "<|endoftext|>", "<|endoftext|>", named={"unk_token": "<|endoftext|>"}
    ),
    "neox": Vocabulary("gpt2", "<|endoftext|>", pad="<|padding|>"),
    "llama2": Vocabulary("llama2", "</s>", "<s>", starts=("<s>",), named={"unk_token": "<unk>"}),
    "llama3": Vocabulary(
        "llama3",
        "<|eot_id|>",
        "<|begin_of_text|>",
        starts=("<|begin_of_text|>",),
        stops=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    "chatml": Vocabulary(
        "llama3",
        "<|im_end|>",
        pad="<|endoftext|>",
        stops=("<|im_end|>", "<|endoftext|>"),
        more=("<|im_start|>",),
    ),
    "gemma": Vocabulary(
        "llama2",
        "<eos>",
        "<bos>",
        "<pad>",
        starts=("<bos>",),
        stops=("<eos>", "<end_of_turn>"),
        more=("<start_of_turn>",),
        named={"unk_token": "<unk>"},
    ),
    "phi3": Vocabulary(
        "llama2",
        "<|endoftext|>",
        "<s>",
        "<|endoftext|>",
        stops=("<|endoftext|>", "<|assistant|>", "<|end|>"),
        more=("<|user|>",),
        named={"unk_token": "<unk>"},
    ),
    # two tokens before every text, and a turn of the user's ends a response
    "glm": Vocabulary(
        "llama3",
        "<|endoftext|>",
        pad="<|endoftext|>",
        starts=("[gMASK]", "<sop>"),
        stops=("<|endoftext|>", "<|user|>", "<|observation|>"),
        more=("<|assistant|>",),
    ),
}


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer of VOCABULARIES; do not change it in place."""
    told = VOCABULARIES[name]
    backend = Tokenizer.from_str(state_of(told.backend))
    tokens = (told.eos, told.bos, told.pad, *told.starts, *told.stops, *told.more)
    special = [each for each in dict.fromkeys(tokens) if each is not None]
    backend.add_special_tokens([AddedToken(each, special=True) for each in special])
    if told.starts:
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join([*told.starts, "$A"]),
            special_tokens=[(each, backend.token_to_id(each)) for each in told.starts],
        )
    ends = {"eos_token": told.eos, "bos_token": told.bos, "pad_token": told.pad}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: token for name, token in ends.items() if token is not None},
        **told.named,
    )
    tokenizer.chat_template = CHATML if name == "chatml" else None
    return tokenizer


# --------------------------------------------------------------------------- families

Settings = dict[str, Any]
SPREAD = 0.2  # of random weights, so that distributions are far from uniform
SIZE: Settings = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": SPREAD,
}
GPT: Settings = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
GPT |= {"initializer_range": SPREAD}
HEAD: Settings = {"head_dim": 8}
WINDOW: Settings = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}
EXPERTS: Settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS: Settings = {"num_local_experts": 4, "num_experts_per_tok": 2}
LINEAR: Settings = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
LATENT: Settings = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
MAMBA: Settings = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
SIGHT: Settings = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@dataclass(frozen=True)
class Family:
    """A class of config, its settings beside the vocabulary, and its tokenizer.

    vocabulary_keys: all that the config calls the size of the vocabulary.
    """

    config: Callable[..., Any]
    settings: Settings
    tokenizer: str = "gpt2"
    vocabulary_keys: tuple[str, ...] = ("vocab_size",)


def seeing(
    config: str, text: str, text_settings: Settings, sight: Settings, **more: Any
) -> Callable[..., Any]:
    """What makes the config of a model that reads pictures, around that of its decoder."""

    def make(vocab_size: int, **ends: Any) -> Any:
        inner = getattr(hf, text)(vocab_size=vocab_size, **text_settings, **ends)
        return getattr(hf, config)(text_config=inner, vision_config=dict(sight), **more)

    return make


GEMMA_3N: Settings = {
    **SIZE,
    **HEAD,
    "num_hidden_layers": 4,
    "intermediate_size": [48, 48, 32, 32],
    "hidden_size_per_layer_input": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0] * 4,
    "altup_num_inputs": 2,
}
GEMMA_4: Settings = {
    **SIZE,
    **HEAD,
    **WINDOW,
    "hidden_size_per_layer_input": 8,
    "global_head_dim": 8,
    "num_kv_shared_layers": 0,
    "final_logit_softcapping": 3.0,
}
PER_LAYER = ("vocab_size", "vocab_size_per_layer_input")
LLAMA_4: Settings = {
    **SIZE,
    **HEAD,
    "intermediate_size_mlp": 48,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 64,
}
LFM: Settings = {**SIZE, "layer_types": ["conv", "full_attention"]}
MAMBA_ALONE: Settings = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}

FAMILIES: dict[str, Family] = {
    # learned positions, or none
    "gpt2": Family(hf.GPT2Config, GPT),
    "gpt_bigcode": Family(hf.GPTBigCodeConfig, GPT),
    "gptj": Family(hf.GPTJConfig, {**GPT, "rotary_dim": 4}),
    "codegen": Family(hf.CodeGenConfig, {**GPT, "rotary_dim": 4}),
    "gpt_neo": Family(
        hf.GPTNeoConfig,
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "initializer_range": SPREAD,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 6,
            "max_position_embeddings": 128,
        },
    ),
    "opt": Family(
        hf.OPTConfig,
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 32,
            "init_std": SPREAD,
        },
    ),
    "bloom": Family(
        hf.BloomConfig,
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": SPREAD},
        "neox",
    ),
    "mpt": Family(
        hf.MptConfig,
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "expansion_ratio": 2}
        | {"initializer_range": SPREAD},
    ),
    "falcon": Family(hf.FalconConfig, {**SIZE, "alibi": False}),
    "gpt_neox": Family(hf.GPTNeoXConfig, SIZE, "neox"),
    "biogpt": Family(hf.BioGptConfig, {**SIZE, "scale_embedding": False}, "neox"),
    "xglm": Family(
        hf.XGLMConfig,
        {
            "d_model": 32,
            "ffn_dim": 48,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 128,
            "init_std": SPREAD,
        },
        "llama2",
    ),
    # decoders as Llama
    "llama": Family(hf.LlamaConfig, SIZE, "llama2"),
    "llama3": Family(hf.LlamaConfig, {**SIZE, "tie_word_embeddings": True}, "llama3"),
    "mistral": Family(hf.MistralConfig, {**SIZE, "sliding_window": 6}, "llama2"),
    "ministral": Family(hf.MinistralConfig, {**SIZE, **HEAD, **WINDOW}, "llama2"),
    "qwen2": Family(hf.Qwen2Config, SIZE, "chatml"),
    "qwen3": Family(hf.Qwen3Config, {**SIZE, **HEAD}, "chatml"),
    "smollm3": Family(hf.SmolLM3Config, {**SIZE, "no_rope_layers": [1, 0]}, "chatml"),
    "olmo": Family(hf.OlmoConfig, SIZE, "neox"),
    "olmo2": Family(hf.Olmo2Config, SIZE, "neox"),
    "olmo3": Family(hf.Olmo3Config, {**SIZE, **WINDOW}, "neox"),
    "stablelm": Family(hf.StableLmConfig, SIZE, "neox"),
    "starcoder2": Family(hf.Starcoder2Config, {**SIZE, "sliding_window": 6}),
    "phi": Family(hf.PhiConfig, SIZE),
    "phi3": Family(hf.Phi3Config, SIZE, "phi3"),
    "glm": Family(hf.GlmConfig, {**SIZE, **HEAD}, "glm"),
    "glm4": Family(hf.Glm4Config, {**SIZE, **HEAD}, "glm"),
    "ernie4_5": Family(hf.Ernie4_5Config, {**SIZE, **HEAD}, "llama2"),
    "exaone4": Family(hf.Exaone4Config, {**SIZE, **WINDOW}, "neox"),
    "nemotron": Family(hf.NemotronConfig, SIZE, "llama2"),
    "helium": Family(hf.HeliumConfig, {**SIZE, **HEAD}, "llama2"),
    "seed_oss": Family(hf.SeedOssConfig, {**SIZE, **HEAD}, "neox"),
    "apertus": Family(hf.ApertusConfig, SIZE, "llama2"),
    "modernbert_decoder": Family(
        hf.ModernBertDecoderConfig,
        {**SIZE, "local_attention": 6, "global_attn_every_n_layers": 2},
        "gemma",
    ),
    # logits that are scaled or capped
    "gemma": Family(hf.GemmaConfig, {**SIZE, **HEAD}, "gemma"),
    "gemma2": Family(hf.Gemma2Config, {**SIZE, **HEAD, **WINDOW}, "gemma"),
    "gemma3_text": Family(hf.Gemma3TextConfig, {**SIZE, **HEAD, **WINDOW}, "gemma"),
    "gemma3n_text": Family(hf.Gemma3nTextConfig, GEMMA_3N, "gemma", PER_LAYER),
    "gemma4_text": Family(hf.Gemma4TextConfig, GEMMA_4, "gemma", PER_LAYER),
    "granite": Family(
        hf.GraniteConfig,
        {
            **SIZE,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.0625,
        },
    ),
    "cohere": Family(hf.CohereConfig, {**SIZE, "logit_scale": 0.0625}, "neox"),
    "cohere2": Family(hf.Cohere2Config, {**SIZE, **WINDOW, "logit_scale": 0.0625}, "neox"),
    # mixtures of experts
    "mixtral": Family(hf.MixtralConfig, {**SIZE, **LOCAL_EXPERTS}, "llama2"),
    "phimoe": Family(hf.PhimoeConfig, {**SIZE, **LOCAL_EXPERTS}, "phi3"),
    "qwen2_moe": Family(
        hf.Qwen2MoeConfig, {**SIZE, **EXPERTS, "shared_expert_intermediate_size": 16}, "chatml"
    ),
    "qwen3_moe": Family(hf.Qwen3MoeConfig, {**SIZE, **EXPERTS, **HEAD}, "chatml"),
    "olmoe": Family(hf.OlmoeConfig, {**SIZE, "num_experts": 4, "num_experts_per_tok": 2}, "neox"),
    "granitemoe": Family(hf.GraniteMoeConfig, {**SIZE, **LOCAL_EXPERTS, "logits_scaling": 4.0}),
    "gpt_oss": Family(hf.GptOssConfig, {**SIZE, **HEAD, **WINDOW, **LOCAL_EXPERTS}, "chatml"),
    "deepseek_v2": Family(
        hf.DeepseekV2Config, {**SIZE, **LATENT, "n_group": 1, "topk_group": 1}, "llama2"
    ),
    "deepseek_v3": Family(
        hf.DeepseekV3Config, {**SIZE, **LATENT, "n_group": 2, "topk_group": 2}, "chatml"
    ),
    "llama4_text": Family(
        hf.Llama4TextConfig,
        LLAMA_4,
        "llama3",
    ),
    "glm4_moe": Family(
        hf.Glm4MoeConfig,
        {
            **SIZE,
            **HEAD,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
        "glm",
    ),
    "aria_text": Family(
        hf.AriaTextConfig,
        {**SIZE, "intermediate_size": 16, "moe_num_experts": 4, "moe_topk": 2}
        | {"moe_num_shared_experts": 1},
        "llama2",
    ),
    "hunyuan_v1_moe": Family(
        hf.HunYuanMoEV1Config, {**SIZE, **HEAD, "num_experts": 4, "moe_topk": [2, 2]}, "chatml"
    ),
    # a block has two layers of attention, and counts as two in its config
    "longcat_flash": Family(
        hf.LongcatFlashConfig,
        {
            **SIZE,
            **LATENT,
            "num_hidden_layers": 4,
            "num_layers": 2,
            "head_dim": 4,
            "ffn_hidden_size": 32,
            "expert_ffn_hidden_size": 16,
            "zero_expert_num": 2,
            "moe_topk": 2,
        },
        "chatml",
    ),
    "dbrx": Family(
        hf.DbrxConfig,
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {
                "ffn_hidden_size": 32,
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "hidden_size": 32,
            },
            "initializer_range": SPREAD,
        },
    ),
    # state that runs along the row
    "mamba": Family(hf.MambaConfig, MAMBA_ALONE, "neox"),
    "falcon_mamba": Family(hf.FalconMambaConfig, MAMBA_ALONE, "neox"),
    "mamba2": Family(
        hf.Mamba2Config,
        {**MAMBA_ALONE, "num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 8},
        "neox",
    ),
    "qwen3_next": Family(
        hf.Qwen3NextConfig,
        {**SIZE, **HEAD, **LINEAR, **EXPERTS, "shared_expert_intermediate_size": 16},
        "chatml",
    ),
    "qwen3_5_text": Family(hf.Qwen3_5TextConfig, {**SIZE, **HEAD, **LINEAR}, "chatml"),
    "lfm2": Family(hf.Lfm2Config, LFM, "chatml"),
    "falcon_h1": Family(
        hf.FalconH1Config,
        {**SIZE, **MAMBA, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
        "neox",
    ),
    "jamba": Family(
        hf.JambaConfig,
        {
            **SIZE,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        "llama2",
    ),
    "bamba": Family(hf.BambaConfig, {**SIZE, **MAMBA, "attn_layer_indices": [1]}, "llama3"),
    "zamba2": Family(
        hf.Zamba2Config,
        {
            **SIZE,
            "num_key_value_heads": 4,
            "num_hidden_layers": 3,
            "use_mem_rope": True,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "hybrid_layer_ids": [1],
            "mamba_d_state": 8,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "num_mem_blocks": 1,
            "adapter_rank": 4,
            "use_mamba_kernels": False,
        },
        "llama2",
    ),
    "nemotron_h": Family(
        hf.NemotronHConfig,
        {
            **SIZE,
            **HEAD,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "layers_block_type": ["mamba", "attention", "mlp"],
            "num_hidden_layers": 3,
            "use_mamba_kernels": False,
        },
        "llama2",
    ),
    "granitemoehybrid": Family(
        hf.GraniteMoeHybridConfig,
        {
            **SIZE,
            **MAMBA,
            **LOCAL_EXPERTS,
            "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": 16,
            "logits_scaling": 4.0,
        },
    ),
    "recurrent_gemma": Family(
        hf.RecurrentGemmaConfig,
        {
            **SIZE,
            "num_hidden_layers": 3,
            "lru_width": 32,
            "attention_window_size": 16,
            "block_types": ["recurrent", "recurrent", "attention"],
        },
        "gemma",
    ),
    # decoders that also see
    "gemma3": Family(
        seeing(
            *("Gemma3Config", "Gemma3TextConfig", {**SIZE, **HEAD, **WINDOW}),
            {**SIGHT, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
            image_token_index=4,
            boi_token_index=5,
            eoi_token_index=6,
        ),
        {},
        "gemma",
    ),
    "mistral3": Family(
        seeing(
            *("Mistral3Config", "MistralConfig", SIZE),
            {**SIGHT, "model_type": "pixtral", "image_size": 28, "patch_size": 14},
            image_token_index=4,
        ),
        {},
        "llama2",
    ),
    # AutoModel knows of nothing smaller than the whole language model
    "llama4": Family(
        seeing(
            *("Llama4Config", "Llama4TextConfig", LLAMA_4),
            {**SIGHT, "image_size": 28, "patch_size": 14, "intermediate_size": 64}
            | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
            image_token_index=4,
        ),
        {},
        "llama3",
    ),
    "qwen2_5_vl": Family(
        seeing(
            *("Qwen2_5_VLConfig", "Qwen2_5_VLTextConfig"),
            {**SIZE, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
            | {"out_hidden_size": 32, "fullatt_block_indexes": [0]},
            image_token_id=4,
            video_token_id=5,
            vision_start_token_id=6,
            vision_end_token_id=7,
        ),
        {},
        "chatml",
    ),
    "qwen3_5": Family(
        seeing(
            *("Qwen3_5Config", "Qwen3_5TextConfig", {**SIZE, **HEAD, **LINEAR}),
            {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
            | {"out_hidden_size": 32},
            image_token_id=4,
            video_token_id=5,
            vision_start_token_id=6,
            vision_end_token_id=7,
        ),
        {},
        "chatml",
    ),
}


def build(family: str, path: str | Path, **changes: Any) -> None:
    """Write a family's tiny model and its tokenizer to a folder.

    Args:
        changes: settings of its config that are to be others.
    """
    if changes:
        _write(family, Path(path), changes)
    else:
        shutil.copytree(_written(family), path, dirs_exist_ok=True)


@cache
def _written(family: str) -> Path:
    """A folder of the family that is made once in this process."""
    folder = Path(_made().name) / family
    _write(family, folder, {})
    return folder


@cache
def _made() -> tempfile.TemporaryDirectory[str]:
    """Where they are, until this process ends."""
    return tempfile.TemporaryDirectory()


def _write(family: str, folder: Path, changes: Settings) -> None:
    tokenizer = tokenizer_of(FAMILIES[family].tokenizer)
    model = model_of(family, **changes)
    stops = VOCABULARIES[FAMILIES[family].tokenizer].stops
    ids = tokenizer.convert_tokens_to_ids(list(stops)) if stops else tokenizer.eos_token_id
    model.generation_config = hf.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ids, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def model_of(family: str, **changes: Any) -> Any:
    """The model of a family with random weights, in float32 and evaluation mode."""
    told = FAMILIES[family]
    tokenizer = tokenizer_of(told.tokenizer)
    ids = {f"{each}_token_id": getattr(tokenizer, f"{each}_token_id") for each in _ENDS}
    sizes = {name: len(tokenizer) for name in told.vocabulary_keys}
    config = told.config(**{**told.settings, **ids, **sizes, **changes})
    torch.manual_seed(0)
    sees = hasattr(config, "vision_config")
    kind = hf.AutoModelForImageTextToText if sees else hf.AutoModelForCausalLM
    return kind.from_config(config).float().eval()


_ENDS = ("bos", "eos", "pad")


def names() -> list[str]:
    """All families."""
    return list(FAMILIES)
