"""What generate picks from its samples, as rows that sft, reward and dpo read as they are."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.evaluation.picked import Candidate, candidates, pair_of
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.stages import dpo, generate, sft
from tests.tiny import DATA, words_of

pytestmark = pytest.mark.usefixtures("inside")

ROW = Prompt("Say hello.", {"answer": 1}, "rows.jsonl:1", {"rejected": "Go.", "chosen": "Hello!"})


def rollout(text: str, finish_reason: str = "eos") -> Rollout:
    return Rollout(ROW, Tokens([1], [2], ""), [-1.0], finish_reason, text)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_best_are_whole_known_and_different() -> None:
    texts = ["b", "a", "cut", " ", "a", "unknown", "c"]
    rollouts = [rollout(text, "length" if text == "cut" else "eos") for text in texts]
    found = candidates(rollouts, [1.0, 3.0, 9.0, 8.0, 3.0, None, 1.0])
    assert found == [Candidate("a", 3.0), Candidate("b", 1.0), Candidate("c", 1.0)]
    assert [each.text for each in candidates(rollouts, None)] == ["b", "a", "unknown", "c"]


@pytest.mark.parametrize(
    ("how", "found", "pair"),
    [
        ("best_worst", [("a", 2.0), ("b", 1.5), ("c", 0.5)], ("a", "c", {"margin": 1.5})),
        ("best_worst", [("a", 2.0), ("b", 2.0)], None),  # nothing tells them apart
        ("best_worst", [], None),
        ("above_row", [("a", 2.0), ("b", 1.0)], ("a", "Go.", {})),
        ("below_row", [("a", 2.0), ("b", 1.0)], ("Hello!", "b", {})),
        ("below_row", [("a", None), ("b", None)], ("Hello!", "b", {})),
        ("below_row", [("Hello!", 2.0), ("b", 1.0)], None),  # the policy says the same
    ],
)
def test_a_pair(how: str, found: list[tuple[str, float | None]], pair: Any) -> None:
    made = list(pair_of(how, [Candidate(*each) for each in found], ROW))
    assert made == ([] if pair is None else [pair])


def generated(out: Path, *more: str) -> Path:
    words = [*DATA, "policy=runs/demo/sft", "reward=length:3", "algo.samples=6", f"out={out}"]
    return generate.run(compose("generate", [*words, *more]))


def test_what_is_picked_is_learnt_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Greet {i}: "}) + "\n" for i in range(20)))
    picks = ["algo.keep_best=2", "algo.pairs=best_worst", f"data.path={file}"]
    out = generated(tmp_path / "picked", *picks)
    samples: dict[str, list[float]] = {}
    for line in lines_of(out / "samples.jsonl"):
        if line["finish_reason"] == "eos" and line["response"].strip():
            samples.setdefault(line["prompt"], []).append(line["reward"])
    shown = lines_of(out / "demonstrations.jsonl")
    best: dict[str, float] = {}
    for row in shown:
        best[row["prompt"]] = max(row["reward"], best.get(row["prompt"], row["reward"]))
    assert best == pytest.approx({prompt: max(each) for prompt, each in samples.items()})
    pairs = lines_of(out / "preferences.jsonl")
    margins = {prompt: max(each) - min(each) for prompt, each in samples.items()}
    assert {row["prompt"]: row["margin"] for row in pairs} == pytest.approx(
        {prompt: margin for prompt, margin in margins.items() if margin > 0}, abs=1e-5
    )
    metrics = json.loads((out / "stage.json").read_text())["metrics"]
    assert (metrics["demonstrations"], metrics["preferences"]) == (len(shown), len(pairs))
    files = json.loads((out / "stage.json").read_text())["files"]
    assert {"demonstrations.jsonl", "preferences.jsonl"} <= files.keys()
    for stage, run, name in (("sft", sft.run, "demonstrations"), ("dpo", dpo.run, "preferences")):
        data = [f"data.path={out}/{name}.jsonl", "data.eval_rows=2", "algo.batch_size=4"]
        words = [*words_of(stage), *data, "algo.max_steps=1", f"out={tmp_path / stage}"]
        run(compose(stage, words))


def test_a_row_without_the_other_side_is_told_before_anything_is_sampled(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Say hello."}\n{"prompt": "Say bye."}\n')
    with pytest.raises(UserError, match=r"prompts.jsonl:1: algo.pairs=above_row takes one side"):
        generated(tmp_path / "out", "algo.pairs=above_row", f"data.path={file}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["algo.keep_best=1", "reward=null"], "algo.keep_best=1 picks by reward"),
        (["algo.pairs=best_worst", "reward=null"], "algo.pairs=best_worst picks by reward"),
        (["algo.keep_best=7"], "algo.keep_best=7 of algo.samples=6"),
        (["algo.pairs=best_worst", "algo.samples=1"], "algo.samples=1 gives one"),
    ],
)
def test_what_cannot_be_picked(words: list[str], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=complaint):
        generated(tmp_path, *words)
