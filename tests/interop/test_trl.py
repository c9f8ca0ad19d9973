"""TRL's outputs are our inputs, and ours go on in its trainers."""

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_cli.commands import export
from rlhf_cli.data.items import Tokens
from rlhf_cli.folders.manifest import adapter_base
from rlhf_cli.models.tokenizers import load_tokenizer
from rlhf_cli.rewards.models import load_model_reward
from rlhf_cli.rollout.rollouts import Rollout
from tests.interop.made import LORA, ours, theirs
from tests.toys import FROZEN, data_of, hardware_of

pytestmark = [pytest.mark.interop, pytest.mark.usefixtures("inside")]
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def raw_scores(path: str, sequences: list[Tokens]) -> list[float]:
    """Our raw rewards of responses by a model."""
    tokenizer = load_tokenizer(path, FROZEN)
    settings = (FROZEN, data_of(), hardware_of(), tokenizer, torch.device("cpu"), None)
    rollouts = [Rollout(None, each, [], "eos", "") for each in sequences]  # type: ignore[arg-type]
    found: list[float] = load_model_reward(path, *settings).raw_of(rollouts).tolist()
    return found


def their_scores(path: str, sequences: list[Tokens]) -> list[float]:
    """What TRL's trainer computes: logits of the classifier, whose pad is that of its tokenizer."""
    base = adapter_base(path)
    model: Any = AutoModelForSequenceClassification.from_pretrained(base or path, num_labels=1)
    if base is not None:
        model = peft.PeftModel.from_pretrained(model, path)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        ids = [torch.tensor([[*each.prompt, *each.response]]) for each in sequences]
        return [model(each).logits.item() for each in ids]


@pytest.mark.parametrize("name", ["reward", "reward_lora"])
def test_its_reward_models_score_for_us_as_for_it(given: Path, name: str, tmp_path: Path) -> None:
    path = f"theirs/{name}"
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    prompt, response = (
        tokenizer(text, add_special_tokens=False).input_ids for text in ("Greet Ann:", " Hi Ann!")
    )
    sequences = [Tokens(prompt, [*response, tokenizer.eos_token_id]), Tokens(prompt, response)]
    expected = their_scores(path, sequences)
    assert raw_scores(path, sequences) == pytest.approx(expected, abs=1e-5)
    export.run([path, str(tmp_path / "whole")])
    assert raw_scores(str(tmp_path / "whole"), sequences) == pytest.approx(expected, abs=1e-5)
    assert their_scores(str(tmp_path / "whole"), sequences) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["sft_lora", "dpo", "dpo_lora"])
def test_its_policies_are_exported(given: Path, name: str, tmp_path: Path) -> None:
    path = f"theirs/{name}"
    export.run([path, str(tmp_path / "whole")])
    auto: Any = peft.AutoPeftModelForCausalLM if adapter_base(path) else AutoModelForCausalLM
    before, after = (
        auto.from_pretrained(path),
        AutoModelForCausalLM.from_pretrained(tmp_path / "whole"),
    )
    with torch.no_grad():
        assert torch.allclose(before(IDS).logits, after(IDS).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("sft", ["model=pretrained", "model.path=theirs/sft"]),
        ("reward", ["policy=theirs/sft"]),
        ("reward", ["policy=theirs/sft_lora", *LORA]),
        ("dpo", ["policy=theirs/sft_lora"]),
        ("dpo", ["policy=theirs/sft_lora", *LORA]),
        ("ppo", ["policy=theirs/dpo", "reward=theirs/reward"]),
        ("ppo", ["policy=theirs/dpo_lora", "reward=theirs/reward_lora", *LORA]),
        ("grpo", ["policy=theirs/sft", "reward=theirs/reward_lora", "algo.group_size=2"]),
    ],
)
def test_its_outputs_are_our_inputs(
    given: Path, stage: str, words: list[str], tmp_path: Path
) -> None:
    ours(stage, str(tmp_path / "out"), *words)
    assert (tmp_path / "out" / "stage.json").is_file()


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        *(("sft", "sft"), ("dpo", "sft"), ("dpo", "whole_dpo_lora"), ("reward", "sft")),
        *(("reward", "reward"), ("reward", "whole_reward_lora")),
    ],
)
def test_ours_go_on_in_its_trainers(made: Path, stage: str, name: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    loss = theirs(stage, f"ours/{name}", tmp_path)
    assert math.isfinite(loss) and loss < 10


def test_our_adapter_goes_on_in_its_trainer(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    model: Any = peft.AutoPeftModelForCausalLM.from_pretrained("ours/dpo_lora", is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained("ours/dpo_lora")
    loss = theirs("dpo", model, tmp_path, tokenizer=tokenizer)
    assert loss == pytest.approx(math.log(2), abs=0.1)  # what a policy has that is its reference
