"""What is told of attention before a model is loaded is what the loaded model does."""

from pathlib import Path

import pytest
import torch

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.models import FrozenModel
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.tokenizers import load_tokenizer
from rlhf_cli.runs.attention import attention_lines, has_sdpa, predicted_attention
from rlhf_cli.runs.memory_estimate import parts_of
from tests.model_families import build, model_of, names

WORDS = ["data=jsonl", "data.path=rows.jsonl", "data.max_prompt_tokens=24"]
WORDS += ["data.max_response_tokens=8"]


@pytest.mark.parametrize("family", names())
def test_what_is_read_of_a_family_is_what_it_does(family: str) -> None:
    decoder = model_of(family).config.get_text_config()
    assert has_sdpa(decoder.model_type) == (decoder._attn_implementation == "sdpa")


def test_a_family_without_sdpa_is_said_and_counted(tmp_path: Path) -> None:
    """gptj: 4 heads, 2 blocks; a micro-batch of 8 x 2 rows of up to 32 tokens."""
    build("gptj", tmp_path / "gptj")
    words = [*WORDS, "algo.batch_size=8"]
    cfg = compose("dpo", [*words, f"policy={tmp_path / 'gptj'}"])
    assert predicted_attention(cfg) == "eager"
    assert attention_lines("eager", "auto") == [
        "model.attention: eager (the family has no sdpa; it holds tokens x tokens of every head)"
    ]
    update = parts_of(cfg)[1]
    assert update["attention between 512 tokens and up to 32 each"] == 4 * 4 * 512 * 32 * (2 + 2)
    build("llama", tmp_path / "llama")
    words.append(f"policy={tmp_path / 'llama'}")
    assert len(parts_of(compose("dpo", words))[1]) == len(update) - 1
    assert predicted_attention(compose("dpo", [*words, "model.attention=eager"])) == "eager"


@pytest.mark.parametrize(
    ("family", "attention", "says"),
    [
        ("llama", "flash_attention_2", "flash_attention_2 needs a GPU; auto does without one"),
        ("llama", "flex_attention", "flex_attention needs a GPU; auto does without one"),
        ("gptj", "sdpa", "with model.attention=sdpa: GPTJForCausalLM does not support"),
    ],
)
def test_what_cannot_be_is_refused(family: str, attention: str, says: str, tmp_path: Path) -> None:
    build(family, tmp_path)
    config = FrozenModel("auto", False, attention)
    tokenizer = load_tokenizer(str(tmp_path), config)
    with pytest.raises(UserError, match=says):
        load_policy(str(tmp_path), config, tokenizer, torch.device("cpu"))


def test_eager_attention_computes_the_same(tmp_path: Path) -> None:
    build("llama", tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = []
    for attention in ("auto", "eager"):
        config = FrozenModel("float32", False, attention)
        tokenizer = load_tokenizer(str(tmp_path), config)
        model = load_policy(str(tmp_path), config, tokenizer, torch.device("cpu"))
        logits.append(model(input_ids=ids).logits)
    torch.testing.assert_close(*logits)
