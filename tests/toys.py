"""Models, tokenizers and configs so small that what they must do is known exactly."""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_cli.config.compose import compose
from rlhf_cli.config.schema.data import Data
from rlhf_cli.config.schema.hardware import Hardware
from rlhf_cli.config.schema.models import FrozenModel, Model
from rlhf_cli.config.schema.stages import PpoConfig
from rlhf_cli.data.batches import Batch
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.reading import Walk
from rlhf_cli.data.rows import walked
from rlhf_cli.data.sources import Source
from rlhf_cli.models.score import Items, logprobs_of
from rlhf_cli.models.scratch import learn_tokenizer

WORDS = (
    "the cat sat on a mat and the dog ran to the red boat while a small bird sang a song",
    "Question: what is two plus two? Answer: four. 0 1 2 3 4 5 6 7 8 9",
)
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@cache
def composed(stage: str, *words: str) -> Any:
    """A typed config; do not change it in place."""
    return compose(stage, list(words))


def data_of(**changes: Any) -> Data:
    """A data config of plain rows, with changes."""
    data = composed("dpo", "data=jsonl", "data.path=rows.jsonl").data
    return replace(data, **{"template": "{prompt}", **changes})


def hardware_of(**changes: Any) -> Hardware:
    """A hardware config, with changes."""
    hardware: Hardware = composed("dpo").hardware
    return replace(hardware, **changes)


def model_of(**changes: Any) -> Model:
    """A model config, with changes."""
    model: Model = composed("dpo").model
    return replace(model, **changes)


def run_of(**data: Any) -> PpoConfig:
    """The config of a stage with a reward, on plain rows with changes."""
    cfg: PpoConfig = composed("ppo")
    return replace(cfg, data=data_of(**data))


# Where stages run that are not told: hardware.device=auto.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FROZEN = FrozenModel(dtype="float32", trust_remote_code=False, attention="auto")


def bpe(chat: bool = False) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer of models from scratch; with a chat template if asked for."""
    tokenizer = learn_tokenizer(list(WORDS), 300)
    if chat:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]}
        )
        tokenizer.chat_template = CHAT
    return tokenizer


def characters(first: int = 90, size: int = 40) -> PreTrainedTokenizerFast:
    """One id per character, id = ord - first; no BOS, EOS is 1, pad is 0."""
    names = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    vocabulary = names | {chr(id + first): id for id in range(3, size)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def llama(vocabulary: int = 23, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random decoder whose distributions are far from uniform."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.4,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **changes,
    }
    model: LlamaForCausalLM = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    return model


def grid_of(ids: Tensor, attention: Tensor, response: Tensor) -> Batch:
    """Whole sequences in a row each, with pads on either side: (B, T) each."""
    places = torch.arange(ids.shape[1])  # (T,)
    last = (places * attention).amax(-1, keepdim=True)  # (B, 1)
    in_row = torch.minimum(places, last)  # (B, T)
    rows = ids.shape[1] * torch.arange(len(ids))[:, None]  # (B, 1)
    return Batch(
        ids,
        positions=(attention.long().cumsum(-1) - 1).clamp(min=0),  # from the first real token
        attention=attention,
        at=rows + in_row,
        before=rows + (in_row - 1).clamp(min=0),
        response=response,
        stands_for=attention.long(),
        scored=response.flatten().nonzero()[:, 0],
    )


def bigram(table: Tensor) -> LlamaForCausalLM:
    """A decoder whose next-token logits are the table's row of the last token.

    Attention and MLP add nothing; the embedding of token i is a multiple of the i-th unit vector,
    which the last norm brings to length 1; the unembedding holds the table.
    """
    size = len(table)
    width = -(-size // 8) * 8  # four heads of even width
    model = llama(size, hidden_size=width, num_hidden_layers=1, rms_norm_eps=1e-12)
    block = model.model.layers[0]
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, width))
        model.model.norm.weight.fill_(width**-0.5)
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :size] = table.T
    return model


class GivenLogits(nn.Module):
    """A language model that answers any batch with the logits it was given, (B, T, V)."""

    base_model_prefix = "model"

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.float())
        self.config: Any = None

    def model(self, **inputs: Tensor) -> Any:
        """The trunk: its last hidden states are the logits."""
        return type("Output", (), {"last_hidden_state": self.logits})

    def get_output_embeddings(self) -> nn.Module:
        """The unembedding: none."""
        return nn.Identity()


def sequences_of(count: int, vocabulary: int = 23, seed: int = 0) -> list[Tokens]:
    """Random sequences of different lengths that end with EOS."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        drawn: list[int] = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        return drawn

    return [Tokens([1, *ids(i % 4)], [*ids((i * 3) % 7), 2]) for i in range(1, count + 1)]


def all_rows(file: object, kind: type, notes: list[str] | None = None, **data: Any) -> list[Any]:
    """All rows of one file as rows of a kind; `notes` gets what is said of them."""
    settings = data_of(**data)
    source = Source(str(file), settings.format, settings.columns, settings.max_rows)
    rows, _, said = walked(Walk(source, kind, settings))
    if notes is not None:
        notes += said
    return rows


def mean_nll(model: nn.Module, items: Items, hardware: Hardware) -> float:
    """Mean negative log-likelihood per response token, in nats."""
    return -torch.cat(logprobs_of(model, items, hardware)).double().mean().item()
