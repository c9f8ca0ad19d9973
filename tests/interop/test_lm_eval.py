"""lm-eval reads our folders as they are, and gives the log-probs and choices that we give."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.data.items import Tokens
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.models.tokenizers import load_tokenizer
from tests.interop.made import NAMES
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


TASK = """
task: greetings
dataset_path: json
dataset_kwargs: {data_files: {test: choices.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
"""


def test_a_task(made: Path) -> None:
    """As its command line runs one: a file of choices, which `choices=FILE` asks as well.

    All choices have one length, so that it makes no difference how lengths are counted.
    """
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    rows: list[dict[str, Any]] = [
        {"prompt": f"Greet {name}:", "choices": [" Hi", " No", " 2 "], "answer": i % 3}
        for i, name in enumerate(NAMES)
    ]
    Path("choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("tasks").mkdir(exist_ok=True)
    Path("tasks/greetings.yaml").write_text(TASK)
    theirs = lm_eval.simple_evaluate(
        "hf",
        "pretrained=ours/sft,dtype=float32",
        tasks=["greetings"],
        task_manager=TaskManager(include_path="tasks", include_defaults=False),
        device="cpu",
        batch_size=8,
        bootstrap_iters=0,
    )
    accuracy = theirs["results"]["greetings"]["acc,none"]
    tokenizer = load_tokenizer("ours/sft", FROZEN)
    policy = load_policy("ours/sft", FROZEN, tokenizer, torch.device("cpu"))
    ids = [[tokenizer.encode(row["prompt"] + choice) for choice in row["choices"]] for row in rows]
    start = [tokenizer.encode(row["prompt"]) for row in rows]
    tokens = [
        Tokens(prompt, whole[len(prompt) :])
        for prompt, choices in zip(start, ids, strict=True)
        for whole in choices
    ]
    sums = torch.stack([each.sum() for each in logprobs_of(policy, tokens, hardware_of())])
    best = sums.view(-1, 3).argmax(-1).tolist()
    right = [choice == row["answer"] for choice, row in zip(best, rows, strict=True)]
    assert accuracy == pytest.approx(sum(right) / len(right))
