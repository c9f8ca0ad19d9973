"""Every family through every stage, in full and with LoRA, on its tiny instance.

A family's chain runs once and is judged by what it left: log-probs in a batch are those of a row
alone, what was written is what plain transformers reads, and greedy responses are those of
transformers. A stage that cannot do a family says so in one line, which REFUSED expects.
"""

import contextlib
import copy
import importlib
import json
import re
import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.data.items import Tokens
from rlhf_cli.folders.manifest import adapter_base
from rlhf_cli.models.load import language_class, load_policy
from rlhf_cli.models.score import logprobs_of, scores_of
from rlhf_cli.models.scorers import load_scorer
from rlhf_cli.models.tokenizers import load_tokenizer
from tests.model_families import build, names
from tests.toys import FROZEN, hardware_of

CPU = torch.device("cpu")
STAGES = ("sft", "reward", "dpo", "ppo", "grpo", "generate", "evaluate")
DEFAULT = ("llama3",)  # in the fast tests
WORDS = [
    *("data=jsonl", "data.path=rows.jsonl", "data.eval_rows=2", "data.max_prompt_tokens=24"),
    *("data.max_response_tokens=8", "data.long_responses=cut", "data.template='{prompt}'"),
    *("hardware.threads=1", "overwrite=true"),
]
TRAIN = [*WORDS, "algo.lr=1e-3", "algo.warmup_steps=0", "algo.batch_size=4"]
EPOCHS = [*TRAIN, "algo.max_steps=1", "algo.eval_every=1", "algo.keep=last"]
LONGER = ["algo.lr=5e-3", "algo.epochs=20", "algo.max_steps=20", "algo.eval_every=4"]
LONGER += ["algo.keep=best"]
ONLINE = [*TRAIN, "algo.steps=1", "algo.minibatch_size=4", "algo.show_every=9", "algo.epochs=1"]
LORA = ["model.lora_rank=2", "model.merge_lora=false"]
WORDS_OF = {
    "sft": ["model=pretrained", "model.path=base", *EPOCHS],
    # enough to be no coin, which ppo would refuse
    "reward": ["policy=sft", *EPOCHS, *LONGER],
    "dpo": ["policy=sft", *EPOCHS],
    "ppo": ["policy=sft", "reward=reward", *ONLINE],
    "grpo": ["policy=sft", "reward=regex:a", "algo.group_size=2", *ONLINE],
    "generate": ["policy=sft", "algo.temperature=0", *WORDS],
    "evaluate": [
        "policy=ppo",
        "reference=sft",
        "reward=reward",
        "algo.samples=1",
        "algo.max_tokens=4",
        *WORDS,
    ],
}
SEQUENCES = [
    Tokens([5 + i, 9, 30][: 1 + i % 3], [11 + i, *range(12, 13 + 5 * i)]) for i in range(4)
]

# Which stage says in one line that it cannot do a family, and what: (family, stage, how) -> words.
REFUSED: dict[tuple[str, str, str], str] = {}


# whole or as an adapter in turn, since test_lora_places.py has adapters of all of them
CASES = [
    pytest.param(name, how, marks=[] if name in DEFAULT else [pytest.mark.slow])
    for i, name in enumerate(names())
    for how in ("full", "lora")
    if name in DEFAULT or how == ("full", "lora")[i % 2]
]


@pytest.mark.parametrize(("family", "how"), CASES)
def test_a_family_goes_through_all_stages(
    family: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a sixth of the time, and the same for every family
    monkeypatch.setattr("rlhf_cli.evaluation.report.reliability_picture", lambda *_: None)
    build(family, tmp_path / "base")
    rows = [
        {"prompt": f"Greet {name}: ", "chosen": f"Hi {name}!", "rejected": "No no, go away."}
        for name in ("Ann", "Bo", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    faults: dict[str, str] = {}
    with contextlib.chdir(tmp_path):
        for stage in STAGES:
            expected = REFUSED.get((family, stage, how))
            fault = _fault(partial(run, stage, how), expected)
            if fault is None and expected is None and stage in JUDGED:
                fault = _fault(JUDGED[stage], None)
            if fault is not None:
                faults[stage] = fault
    assert not faults, "\n".join(f"{stage}: {fault}" for stage, fault in faults.items())


def _fault(work: Callable[[], Any], expected: str | None) -> str | None:
    """What is wrong with how a piece of work ends."""
    try:
        work()
    except UserError as error:
        if expected is not None and re.search(expected, str(error)):
            return None
        return f"UserError: {error}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({where.name}, {Path(where.filename).name})"
    return None if expected is None else f"it was to say {expected}"


def run(stage: str, how: str) -> None:
    cfg = copy.deepcopy(config_of(stage, how))  # a run fills in what it leaves open
    importlib.import_module(f"rlhf_cli.stages.{stage}").run(cfg)


@cache
def config_of(stage: str, how: str) -> Any:
    """That of a stage, the same for every family: paths are relative."""
    adapted = LORA if how == "lora" and stage not in ("generate", "evaluate") else []
    return compose(stage, [*WORDS_OF[stage], *adapted, f"out={stage}"])


# --------------------------------------------------------------------------- what is judged


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def plain_of(folder: str) -> Any:
    """What transformers reads from a folder, in the class that its config (or its base's) names."""
    auto = language_class(adapter_base(folder) or folder, FROZEN)
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def policy_agrees(folder: str) -> None:
    """Padded as alone, and as plain transformers computes it from what was written."""
    tokenizer = load_tokenizer(folder, FROZEN)
    model = load_policy(folder, FROZEN, tokenizer, CPU)
    together = logprobs_of(model, SEQUENCES, hardware_of(share_prompts=False))
    alone = [logprobs_of(model, [each], hardware_of())[0] for each in SEQUENCES]
    close(torch.cat(together), torch.cat(alone))
    plain: Any = plain_of(folder)
    for ours, each in zip(together, SEQUENCES, strict=True):
        ids = torch.tensor([each.prompt + each.response])
        with torch.no_grad():
            logits = plain(input_ids=ids).logits[0, len(each.prompt) - 1 : -1].float()
        close(ours, logits.log_softmax(-1).gather(-1, ids[0, len(each.prompt) :, None])[:, 0])


def scorer_agrees() -> None:
    tokenizer = load_tokenizer("reward", FROZEN)
    scorer = load_scorer("reward", FROZEN, tokenizer, CPU)
    together = scores_of(scorer, SEQUENCES, hardware_of(share_prompts=False))
    close(together, torch.cat([scores_of(scorer, [each], hardware_of()) for each in SEQUENCES]))


def greedy_agrees() -> None:
    """Responses at temperature 0 are those of transformers' generate, without padding."""
    plain: Any = plain_of("sft")
    tokenizer = load_tokenizer("sft", FROZEN)
    samples = [json.loads(line) for line in Path("generate/samples.jsonl").read_text().splitlines()]
    assert samples
    for sample in samples:
        ids = tokenizer(sample["prompt"], return_tensors="pt").input_ids
        with torch.no_grad():
            found = plain.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        text = tokenizer.decode(found, skip_special_tokens=True)
        assert sample["response"] == text, (sample["response"], text)


JUDGED = {
    "sft": lambda: policy_agrees("sft"),
    "dpo": lambda: policy_agrees("dpo"),
    "grpo": lambda: policy_agrees("grpo"),
    "reward": scorer_agrees,
    "generate": greedy_agrees,
}
