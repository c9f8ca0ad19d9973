"""transformers' pipelines and peft's loaders take what our stages and `export` write."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from rlhf_cli.data.items import Tokens
from tests.interop.test_trl import IDS, raw_scores

pytestmark = [pytest.mark.interop, pytest.mark.usefixtures("inside")]


@pytest.mark.parametrize("name", ["sft", "dpo_lora", "whole_dpo_lora"])
def test_text_generation(made: Path, name: str) -> None:
    generate: Any = pipeline("text-generation", f"ours/{name}", device="cpu")
    settings = {"max_new_tokens": 3, "do_sample": False, "return_full_text": False}
    (found,) = generate("Greet Ann:", **settings)
    if name == "whole_dpo_lora":  # the same as the adapter on its base
        adapted: Any = pipeline("text-generation", "ours/dpo_lora", device="cpu")
        assert adapted("Greet Ann:", **settings) == [found]
    if generate.tokenizer.chat_template is not None:
        (answer,) = generate([{"role": "user", "content": "Hi"}], **settings)
        assert isinstance(answer["generated_text"], str)


@pytest.mark.parametrize("name", ["reward", "whole_reward_lora"])
def test_text_classification_gives_scores(made: Path, name: str) -> None:
    """Raw ones, also of a padded batch: no sigmoid is put on top."""
    path = f"ours/{name}"
    score: Any = pipeline("text-classification", path, device="cpu")
    texts = ["Greet Ann: Hi Ann!", "Greet Bo: No, never, not at all."]
    found = [each["score"] for each in score(texts, batch_size=2)]
    ids = [AutoTokenizer.from_pretrained(path)(text).input_ids for text in texts]
    ours = raw_scores(path, [Tokens(each[:-1], each[-1:]) for each in ids])
    assert found == pytest.approx(ours, abs=1e-5)


def test_peft_loads_our_adapters(made: Path) -> None:
    """A head's rows are in no adapter's config, so that peft is told how many labels there are."""
    adapted: Any = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        "ours/reward_lora", num_labels=1
    )
    whole: Any = AutoModelForSequenceClassification.from_pretrained("ours/whole_reward_lora")
    with torch.no_grad():
        assert torch.allclose(adapted(IDS).logits, whole(IDS).logits, atol=1e-5)
    policy: Any = peft.AutoPeftModelForCausalLM.from_pretrained("ours/dpo_lora", is_trainable=True)
    policy(IDS, labels=IDS).loss.backward()
    assert all(w.grad is not None for n, w in policy.named_parameters() if "lora_" in n)
