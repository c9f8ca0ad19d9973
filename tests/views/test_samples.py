"""What of samples.jsonl goes into a page."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.runs.lineage import Node
from rlhf_cli.views import samples
from rlhf_cli.views.records import Record
from rlhf_cli.views.samples import CHARACTERS, OF_A_STEP, samples_of


def record(folder: Path, stage: str, lines: Iterable[Any], **config: Any) -> Record:
    """A run of a stage with these lines in samples.jsonl."""
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "samples.jsonl").write_text(text, encoding="utf-8")
    node = Node(folder, stage, None, "finished", 0, 1.0, 1.0, {}, [], None)
    return Record(folder, node, config)


def test_policies_side_by_side_by_prompt(tmp_path: Path) -> None:
    lines = [
        {"policy": policy, "temperature": 1.0, "prompt": prompt, "response": f"{policy} {prompt}"}
        | {
            "reward": reward / 100 - 12.34,
            "gold": None,
            "sample": 0,
            "tokens": ["a"],
            "kls": [0.123456],
        }
        for reward, policy in enumerate(["runs/demo/ppo", "runs/demo/sft"])
        for prompt in ("one", "two")
    ]
    lines += [{**lines[0], "temperature": 0.5}, {"response": 3}, [1]]  # type: ignore[list-item]
    one = record(tmp_path / "evaluate", "evaluate", lines, reference="runs/demo/sft")
    first, second = samples_of([one])
    assert first["title"].endswith("evaluate, temperature 1.0") and len(second["prompts"]) == 1
    assert [each["name"] for each in first["sources"]] == ["ppo", "sft"]
    assert first["reference"] == 1 and first["left_out"] == 0 and "reference" not in second
    assert [entry["prompt"] for entry in first["prompts"]] == [[{"text": "one"}], [{"text": "two"}]]
    answer = first["prompts"][0]["answers"][1][0]
    # scores are compared, and may differ by little of what they are
    told = {"text": "runs/demo/sft one", "reward": -12.33, "tokens": ["a"], "kls": [0.123]}
    assert answer == told


def test_the_last_steps_of_all_runs_come_first(tmp_path: Path) -> None:
    runs = []
    for name, steps in (("ppo", (1, 10, 20)), ("grpo", (1, 15))):
        lines = [
            {"step": step, "prompt": f"{step} {i}", "response": "", "reward": i, "kl": 1e-9}
            for step in steps
            for i in range(OF_A_STEP + 1)
        ]
        runs.append(record(tmp_path / name, name, lines))
    (shelf,) = samples_of(runs)
    assert shelf["title"] == "in training" and shelf["left_out"] == 5
    firsts = [next(iter(each["answers"].values()))[0] for each in shelf["prompts"]]
    assert list(dict.fromkeys(each["step"] for each in firsts)) == [20, 15, 10, 1]
    assert firsts[0]["kl"] == 1e-9
    size = len(json.dumps(shelf))
    (less,) = samples_of(runs, room=size // 2)
    assert 0.3 * size < len(json.dumps(less)) < 0.6 * size
    assert less["prompts"][0] == shelf["prompts"][0]
    assert less["left_out"] == 5 + answers(shelf) - answers(less)


def test_of_a_long_training_the_last_tokens_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "MOST_TOKENS", 20)
    lines = [
        {"step": step, "prompt": f"p{step}", "response": "ab", "tokens": ["a", "b"], "kls": [1, 2]}
        for step in range(100)
    ]
    (shelf,) = samples_of([record(tmp_path / "ppo", "ppo", lines)])
    shown = [entry["answers"][0][0] for entry in shelf["prompts"]]
    assert [each["step"] for each in shown if "kls" in each] == list(range(99, 89, -1))
    assert len(shown) == 100 and all(each["text"] == "ab" for each in shown)


def answers(shelf: dict[str, Any]) -> int:
    return sum(len(own) for entry in shelf["prompts"] for own in entry["answers"].values())


def test_odd_lines(tmp_path: Path) -> None:
    """Texts of megabytes, prompts that are dialogues, values of another shape, and no number."""
    lines = [
        {"prompt": [{"role": "user", "content": [{"type": "text"}]}, "x"], "response": "\ud800"},
        {"prompt": "p", "response": "ab" * 10**6, "tokens": ["a"], "kls": [1.0]},
        {"prompt": "p", "response": "r", "tokens": ["r"], "kls": [1.0, 2.0], "rewards": "no"},
        {"prompt": "p", "response": "r", "tokens": ["r"], "kls": [None], "reward": float("nan")},
        {"prompt": "p", "response": "r", "parts": {"a": 1.0, "b": None}, "finish_reason": "length"},
    ]
    (shelf,) = samples_of([record(tmp_path / "generate", "generate", lines)])
    json.dumps(shelf, allow_nan=False)
    dialogue, text = shelf["prompts"]
    asked = [{"text": '[{"type": "text"}]', "role": "user"}, {"text": "x"}]
    assert dialogue["prompt"] == asked and dialogue["answers"][0][0]["text"] == "\ud800"
    long, *others = text["answers"][0]
    assert long["cut"] == 2 * 10**6 - CHARACTERS and len(long["text"]) < CHARACTERS + 100
    assert "1,980,000 characters left out" in long["text"] and "tokens" not in long
    assert others == [
        {"text": "r"},
        {"text": "r", "tokens": ["r"], "kls": [None]},
        {"text": "r", "unended": True, "parts": {"a": 1.0, "b": None}},
    ]


def test_an_unfinished_evaluation_tells_whom_it_has_asked(tmp_path: Path) -> None:
    lines = [{"prompt": "p", "response": "r", "kept": {"policy": name}} for name in ("a/b", "a/c")]
    (shelf,) = samples_of([record(tmp_path / "e", "evaluate", lines)])
    assert [each["name"] for each in shelf["sources"]] == ["b", "c"]
    odd = [{"prompt": "p", "response": "r", "kept": 1}, {"prompt": "p", "response": "r"}]
    assert samples_of([record(tmp_path / "odd", "evaluate", odd)]) == []
    assert samples_of([record(tmp_path / "none", "ppo", [])]) == []
    steps = [{"prompt": "p", "response": "r", "step": step} for step in ([1], None, 2)]
    assert len(samples_of([record(tmp_path / "steps", "ppo", steps)])[0]["prompts"]) == 1
