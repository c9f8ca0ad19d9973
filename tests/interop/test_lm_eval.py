"""The loader of lm-eval for Hugging Face models gives the log-probs that we give."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.data.items import Tokens
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.models.tokenizers import load_tokenizer
from tests.toys import FROZEN, hardware_of

pytestmark = [pytest.mark.interop, pytest.mark.usefixtures("inside")]
CONTEXT, CONTINUATION = "Greet Ann:", " Hi Ann!"


@pytest.mark.parametrize("name", ["sft", "dpo_lora", "whole_dpo_lora"])
def test_loglikelihood(made: Path, name: str) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    path = Path("ours", name)
    settings: dict[str, Any] = {"pretrained": str(path)}
    if (adapter := path / "adapter_config.json").is_file():
        base = json.loads(adapter.read_text())["base_model_name_or_path"]
        settings = {"pretrained": base, "peft": str(path)}
    model = huggingface.HFLM(device="cpu", batch_size=2, dtype="float32", **settings)
    request = Instance("loglikelihood", {}, (CONTEXT, CONTINUATION), 0)
    ((theirs, _),) = model.loglikelihood([request], disable_tqdm=True)
    context, continuation = model._encode_pair(CONTEXT, CONTINUATION)
    tokenizer = load_tokenizer(str(path), FROZEN)
    policy = load_policy(str(path), FROZEN, tokenizer, torch.device("cpu"))
    (ours,) = logprobs_of(policy, [Tokens(context, continuation)], hardware_of())
    assert theirs == pytest.approx(ours.sum().item(), abs=1e-3)
    stop = Instance("generate_until", {}, (CONTEXT, {"until": ["\n"], "max_gen_toks": 3}), 0)
    assert isinstance(model.generate_until([stop], disable_tqdm=True)[0], str)
