"""What lines of samples.jsonl tell of single tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.config.compose import compose
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.token_texts import TokenTexts
from rlhf_cli.evaluation.token_values import TokenLines
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.stages import evaluate
from tests.tiny import DATA, run_stage
from tests.toys import bpe


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def response(*ids: int) -> Rollout:
    return Rollout(Prompt("p", {}, "f:1"), Tokens([1], list(ids), ""), [-0.5] * len(ids), "eos", "")


def test_texts_of_tokens_are_the_text_and_what_ended_it() -> None:
    tokenizer = bpe()
    text = "So  é\n  日本 👩‍🚀, a"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    told = TokenTexts(tokenizer, special=True).of([*ids, tokenizer.eos_token_id])
    assert "".join(told) == text + tokenizer.eos_token and len(told) == len(ids) + 1
    assert "" in told  # a part of a character
    astronaut = tokenizer("👩", add_special_tokens=False).input_ids
    assert TokenTexts(tokenizer).of(astronaut[:-1])[-1] == "\ufffd"  # cut inside a character


def test_few_enough_tokens_have_columns() -> None:
    lines = TokenLines(bpe()).of(
        [response(7, 8, 9), response(7, 8, 9), response(9)],
        [{"kls": torch.tensor([0.123456, 2.0, -3.0])}, {"kls": None}, {"kls": None}],
        at_most=5,
    )
    assert lines[0]["kls"] == [0.12346, 2.0, -3.0] and lines[0]["logprobs"] == [-0.5] * 3
    assert lines[1].keys() == {"tokens", "logprobs"} and len(lines[1]["tokens"]) == 2  # type: ignore[arg-type]
    assert lines[2] == {}
    given = Rollout(Prompt("p", {}, "f:1"), Tokens([1], [7], ""), [], "eos", "")  # of a file
    assert TokenLines(bpe()).of([given], [{"kls": None}]) == [{}]


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_training_tells_of_its_tokens(stage: str, tmp_path: Path) -> None:
    """KLs and rewards add up to those of the response; advantages are those of its group."""
    words = ["algo.steps=2", "algo.show_every=1", "algo.kl_in=reward", "policy=runs/demo/sft"]
    if stage == "grpo":
        words += ["algo.kl_estimator=k1", "reward=0.1*length:2 + regex:a"]
    log = run_stage(stage, tmp_path, *words)
    lines = lines_of(tmp_path)
    for line in lines:
        kl_coef = log[line["step"] - 1]["kl_coef"]
        count = len(line["tokens"])
        assert all(len(line[name]) == count for name in ("logprobs", "kls", "rewards"))
        assert "".join(line["tokens"]).startswith(line["response"])
        assert sum(line["kls"]) == pytest.approx(line["kl"], abs=2e-3)
        whole = sum(line["rewards"]) + kl_coef * line["kl"]
        assert whole == pytest.approx(line["reward"], abs=2e-3)
    assert any(abs(value) > 1e-3 for line in lines[8:] for value in line["kls"])
    learnt = [line for line in lines if "advantages" in line]
    assert learnt and all(len(line["advantages"]) == len(line["tokens"]) for line in learnt)
    if stage == "grpo":  # one advantage for a whole response, 0 on average in its group
        assert all(len(set(line["advantages"])) == 1 for line in learnt)
        for start in range(0, len(lines), 3):
            group = [line["advantages"][0] for line in lines[start : start + 3]]
            assert sum(group) == pytest.approx(0, abs=1e-3)


@pytest.mark.usefixtures("inside")
def test_evaluate_tells_of_the_first_response_to_each_prompt(tmp_path: Path) -> None:
    words = ["policy=runs/demo/adapter", "baselines=[runs/demo/sft]", "reference=runs/demo/sft"]
    sizes = ["algo.prompts=3", "algo.samples=2", "algo.max_tokens=6"]
    judges = ["reward=length:2", "gold=null"]
    evaluate.run(compose("evaluate", [*DATA, *words, *sizes, *judges, f"out={tmp_path}"]))
    lines = lines_of(tmp_path)
    assert [line["sample"] for line in lines if "kls" in line] == [0] * 6
    assert all(("kls" in line) == (line["sample"] == 0) for line in lines)
    policy = json.loads((tmp_path / "report.json").read_text())["policies"]["runs/demo/adapter"]
    assert policy["kl"]["mean"] > 0
    assert any(any(line["kls"]) for line in lines[:6:2])
    assert not any(any(line["kls"]) for line in lines[6::2])  # the reference itself
