"""Context distillation: what a model says under a prefix is learnt, and said without it."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.data.batches import collate
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.templates import under
from rlhf_cli.models.forward import distillation_kl
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.tokenizers import load_tokenizer
from rlhf_cli.stages import generate, sft
from tests.tiny import DATA, words_of

START = ["model=pretrained", "model.path=runs/demo/sft", "model.dropout=0", "algo=distill"]


@pytest.fixture(autouse=True)
def inside(chain: Path) -> Iterator[None]:
    """Work in the chain's folder, as a user would."""
    with contextlib.chdir(chain):
        yield


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    file = tmp_path / "prefix.txt"
    file.write_text("Hi!\n")
    return file


def distilled(out: Path, prefix: Path, *more: str) -> list[dict[str, float]]:
    schedule = [
        word for word in words_of("sft") if not word.startswith(("model.", "algo.text_mix"))
    ]
    words = [*schedule, *START, "algo.epochs=20", "algo.max_steps=60", "algo.eval_every=20"]
    words += [
        "algo.warmup_steps=1",
        "hardware.save_every=20",
        f"data.prefix={prefix}",
        f"out={out}",
    ]
    sft.run(compose("sft", [*words, *more]))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("more", [[], ["model.lora_rank=4", "algo.lr=2e-2"]], ids=["full", "lora"])
def test_what_the_prefix_does_is_learnt(more: list[str], tmp_path: Path, prefix: Path) -> None:
    rows = distilled(tmp_path / "out", prefix, *more)
    assert rows[0]["loss"] > 0
    kls = [row["eval/kl"] for row in rows if "eval/kl" in row]
    assert kls[-1] < rows[0]["loss"] / 3
    assert json.loads((tmp_path / "out/stage.json").read_text())["checks"]["reference_unchanged"]


def test_the_kl_is_that_of_both_distributions(tmp_path: Path) -> None:
    """Against the sum over the vocabulary, in chunks, of unequal prompts and with gradient."""
    cfg = compose("dpo", [*DATA, "policy=runs/demo/sft", "out=new"])
    tokenizer = load_tokenizer(cfg.policy, cfg.model)
    model = load_policy(cfg.policy, cfg.model, tokenizer, torch.device("cpu"))
    own = [Tokens([5, 6], [7, 8, 9]), Tokens([5], [6, 7], loss=[False, True])]
    theirs = [Tokens([11, 12, 5, 6], [7, 8, 9]), Tokens([11, 5], [6, 7], loss=[False, True])]
    reference = Reference(model)
    found = distillation_kl(model, collate(own), reference, collate(theirs), chunk=2)
    expected = []
    for ours, other in zip(own, theirs, strict=True):
        logits = [
            model(torch.tensor([each.prompt + each.response])).logits[0].log_softmax(-1)
            for each in (ours, other)
        ]
        for i in range(len(ours.response)):
            if ours.loss is None or ours.loss[i]:
                p, q = (
                    rows[len(each.prompt) + i - 1]
                    for rows, each in zip(reversed(logits), (other, ours), strict=True)
                )
                expected.append((p.exp() * (p - q)).sum().item())
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    found.sum().backward()
    assert any(
        weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters()
    )
    same = distillation_kl(model, collate(own), reference, collate(own), chunk=64)
    assert same.abs().max().item() < 1e-6


def test_rows_that_are_sampled_under_a_prefix_are_without_it(tmp_path: Path, prefix: Path) -> None:
    words = [*DATA, "policy=runs/demo/sft", "algo.prompts=4", "algo.temperature=0"]
    words += ["reward=runs/demo/reward"]
    found = {}
    for name, more in (("plain", []), ("prefixed", [f"data.prefix={prefix}"])):
        out = generate.run(compose("generate", [*words, *more, f"out={tmp_path / name}"]))
        found[name] = [
            json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()
        ]
    plain, prefixed = found["plain"], found["prefixed"]
    assert [row["prompt"] for row in plain] == [row["prompt"] for row in prefixed]
    assert [row["prompt_tokens"] for row in plain] == [row["prompt_tokens"] for row in prefixed]
    assert [row["response"] for row in plain] != [row["response"] for row in prefixed]
    assert all(math.isfinite(row["reward"]) for row in prefixed)


def test_a_prefix_is_the_start_of_the_system_message() -> None:
    user = {"role": "user", "content": "Hi"}
    assert under("Be kind.\n", [user]) == [{"role": "system", "content": "Be kind."}, user]
    system = {"role": "system", "content": "Be short."}
    both = {"role": "system", "content": "Be kind.\n\nBe short."}
    assert under("Be kind.\n", [system, user]) == [both, user]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["data.prefix=null"], "algo.loss=distill learns what a prefix does: give data.prefix"),
        (["data.prefix=nowhere.txt"], "data.prefix=nowhere.txt: No such file"),
        (["model.dropout=0.1"], "set model.dropout=0"),
        (["algo.text_mix=0.5"], "set algo.text_mix=0"),
        (["algo.loss=nll"], "data.prefix is for generate and for sft algo=distill"),
    ],
)
def test_what_cannot_be_distilled(
    words: list[str], complaint: str, tmp_path: Path, prefix: Path
) -> None:
    with pytest.raises(UserError, match=complaint):
        distilled(tmp_path / "out", prefix, *words)
    assert not (tmp_path / "out").exists()
