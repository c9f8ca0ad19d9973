"""Reward models of others that take EOS for padding, as TRL trains those without a pad token."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification

from rlhf_cli.data.items import Tokens
from rlhf_cli.models.tokenizers import load_tokenizer
from rlhf_cli.rewards.models import load_model_reward
from rlhf_cli.rollout.rollouts import Rollout
from tests.toys import FROZEN, bpe, data_of, hardware_of, llama

CPU = torch.device("cpu")


@pytest.mark.parametrize("pad", ["eos, by config", "eos, by tokenizer", "its own"])
def test_a_score_stands_where_the_model_puts_it(pad: str, tmp_path: Path) -> None:
    tokenizer = bpe()
    eos = tokenizer.eos_token_id
    config = llama(len(tokenizer)).config
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    if pad == "eos, by tokenizer":
        tokenizer.pad_token = tokenizer.eos_token
    if pad == "eos, by config":
        config.pad_token_id = eos
    torch.manual_seed(0)
    theirs: Any = LlamaForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    path = str(tmp_path)
    own = load_tokenizer(path, FROZEN)
    reward = load_model_reward(path, FROZEN, data_of(), hardware_of(), own, CPU, None)
    sequences = [Tokens([1, 7, 8], [9, 10, eos]), Tokens([1, 7, 8], [9, 10]), Tokens([1, 7], [eos])]
    rollouts = [Rollout(None, each, [], "eos", "") for each in sequences]  # type: ignore[arg-type]
    scores = reward.raw_of(rollouts)
    theirs.config.pad_token_id = eos if pad.startswith("eos") else own.pad_token_id
    with torch.no_grad():
        expected = [
            theirs(torch.tensor([[*each.prompt, *each.response]])).logits.item()
            for each in sequences
        ]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert (expected[0] == pytest.approx(expected[1])) == pad.startswith("eos")
