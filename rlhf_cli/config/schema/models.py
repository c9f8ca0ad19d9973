"""Keys of the group model: what is loaded or built, and what of it is trained."""

from dataclasses import dataclass
from typing import Any

from rlhf_cli.config.schema.keys import AUTO, key

SDPA, EAGER = "sdpa", "eager"
ATTENTIONS = (AUTO, SDPA, EAGER, "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass
class FrozenModel:
    """How weights are held by a stage that does not train them."""

    dtype: str = key(
        "Type that a model computes in; what is trained keeps float32 masters. auto: bfloat16 on "
        "a GPU that has it, but float32 for models as small as the demo's.",
        choices=("auto", "float32", "bfloat16"),
    )
    trust_remote_code: bool = key("Run Python code that a model folder brings along.")
    attention: str = key(
        "How attention is computed; auto is transformers' choice: sdpa, or eager, which holds "
        "tokens x tokens of every head, where a family has no sdpa. Reward models keep auto.",
        choices=ATTENTIONS,
    )


@dataclass
class Model(FrozenModel):
    """How the weights of `policy=` are adapted by a stage."""

    lora_rank: int = key(
        "Rank of the LoRA adapter that is trained; 0 trains all weights. One that goes on keeps "
        "its own.",
        ge=0,
    )
    lora_alpha: float = key("LoRA scale: the update is multiplied by alpha / rank.", gt=0)
    lora_targets: Any = key(
        "Layers that get LoRA matrices: all-linear (all but head and router), a list of names, or "
        "a regular expression that whole names match.",
        texts=True,
        regex=True,
        used_by="model.lora_rank>0",
        unused="all-linear",
    )
    use_rslora: bool = key(
        "Scale by alpha / sqrt(rank), as rsLoRA does (2312.03732).",
        used_by="model.lora_rank>0",
        unused=False,
    )
    use_dora: bool = key(
        "DoRA: lengths of weight rows are trained beside their directions (2402.09353).",
        used_by="model.lora_rank>0",
        unused=False,
    )
    modules_to_save: list[str] = key(
        "Modules trained whole beside LoRA, by name, as [embed_tokens, lm_head].",
        used_by="model.lora_rank>0",
        unused=[],
    )
    adapter: str | None = key(
        "Where policy (sft: path) is an adapter: continue trains it, stack trains a fresh one over "
        "it, merge puts it into the weights first. null: continue if lora_rank > 0, else merge.",
        choices=("continue", "stack", "merge"),
    )
    quantize: str | None = key(
        "Hold the frozen base in 4 bits (nf4) or 8 (int8), as QLoRA does (2305.14314); needs the "
        "extra qlora.",
        choices=("nf4", "int8"),
        used_by="model.lora_rank>0",
    )
    merge_lora: bool = key("Write merged weights (true) or an adapter folder (false).")
    frozen_layers: int = key(
        "Embeddings and this many of the lowest decoder blocks are not trained, nor an unembedding "
        "that is tied to them; policy and reference share them. 0 trains all.",
        ge=0,
    )
    router_aux_coef: float | None = key(
        "Weight of the loss that balances the load of experts (2101.03961 eq. 4); null is what the "
        "model's config says, where that asks for it by output_router_logits.",
        ge=0,
    )
    save_dtype: str = key(
        "Type of the weights that are written; source: the one that they came in.",
        choices=("source", "float32", "bfloat16", "float16"),
    )


@dataclass
class SftModel(Model):
    """Where sft starts: a pretrained model, or a small decoder built from scratch."""

    path: str | None = key(
        "Hub id or folder of a pretrained model; null builds one from scratch.", role="policy"
    )
    size: str | None = key("Which of model.sizes, in a family's option, model.path is.")
    sizes: dict[str, str] = key("Hub ids of a family's option, by how large the models are.")
    dropout: float = key("Residual dropout while sft trains; InstructGPT used 0.2.", ge=0, lt=1)
    lora_dropout: float = key(
        "Dropout of what enters the LoRA matrices, in the updates of sft alone.",
        ge=0,
        lt=1,
        used_by="model.lora_rank>0",
        unused=0.0,
    )
    vocab_size: int | None = key(
        "Tokens of the BPE that is learned.", ge=260, used_by="model.path=null", needed=True
    )
    hidden_size: int | None = key(
        "Width; doubling costs four times the time.", ge=8, used_by="model.path=null", needed=True
    )
    layers: int | None = key("Decoder blocks.", ge=1, used_by="model.path=null", needed=True)
    heads: int | None = key(
        "Attention heads; must divide hidden_size.", ge=1, used_by="model.path=null", needed=True
    )
    context: int | None = key(
        "Longest sequence in tokens.", ge=8, used_by="model.path=null", needed=True
    )
