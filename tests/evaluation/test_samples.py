"""The lines of generate: every prompt, every column, an id and a number, in order."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.kinds import Prompt, derive
from rlhf_cli.data.raw import Raw
from rlhf_cli.data.readers import as_row
from rlhf_cli.evaluation.entrants import given_samples
from rlhf_cli.evaluation.samples import generated_row, renamed
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.stages import generate
from tests.tiny import DATA

pytestmark = pytest.mark.usefixtures("inside")


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def answered(rows: list[Raw], out: Path, *more: str) -> list[dict[str, Any]]:
    """What generate writes for rows of a file."""
    file = out.with_name("prompts.jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["policy=runs/demo/sft", f"data.path={file}", f"out={out}", *more]
    generate.run(compose("generate", [*DATA, *words]))
    return lines_of(out)


def test_all_prompts_with_all_that_their_rows_say(tmp_path: Path) -> None:
    meta = {"tags": ["a", None], "weight": 0.123456789012345}
    rows: list[Raw] = [{"prompt": f"Greet {i}: ", "answer": i, "meta": meta} for i in range(50)]
    rows[3]["id"] = 1234567891
    rows[4] |= {"id": None, "reward": "mine", "row_reward": "too"}
    lines = answered(rows, tmp_path / "out", "algo.samples=2", "reward=length:5")
    assert len(lines) == 100
    assert [line["prompt"] for line in lines[::2]] == [row["prompt"] for row in rows]
    assert [line["sample"] for line in lines] == [0, 1] * 50
    assert [line["answer"] for line in lines[1::2]] == list(range(50))
    assert lines[0]["meta"] == meta  # to the last digit
    ids = [line["id"] for line in lines[::2]]
    assert ids[3] == 1234567891 and ids[49] == f"{tmp_path}/prompts.jsonl:50"
    assert len(set(ids)) == 50
    assert isinstance(lines[8]["reward"], float)
    assert (lines[8]["row_row_reward"], lines[8]["row_reward"]) == ("mine", "too")


def test_a_line_says_who_wrote_it_and_how(tmp_path: Path) -> None:
    """And not what its row says of another response, or of the weather."""
    rows: list[Raw] = [{"prompt": f"Greet {i}: ", "policy": "me", "temperature": i} for i in "12"]
    out = tmp_path / "out"
    lines = answered(rows, out, "policy=runs/demo/sft/", "algo.temperature=0.5")
    assert [line["policy"] for line in lines] == ["runs/demo/sft"] * 2
    assert [line["temperature"] for line in lines] == [0.5] * 2
    assert [(line["row_policy"], line["row_temperature"]) for line in lines] == [
        ("me", "1"),
        ("me", "2"),
    ]
    given = given_samples(str(out / "samples.jsonl"))
    assert (len(given.prompts), given.samples, given.temperature) == (2, 1, 0.5)
    assert list(given.responses) == ["runs/demo/sft"]


def test_samples_are_rows_of_a_later_stage(tmp_path: Path) -> None:
    """What a row said of another response is not taken for said of ours."""
    rows: list[Raw] = [
        {"prompt": f"Greet {i}: ", "completion": "Hi", "label": False, "note": i} for i in range(9)
    ]
    lines = answered(rows, tmp_path / "out")
    assert [line["row_label"] for line in lines] == [False] * 9
    line = {**lines[2], "completion": lines[2]["response"] or "-"}
    row = as_row(line, "samples.jsonl:3")
    assert type(row).__name__ == "Demonstration" and row.columns["note"] == 2


@pytest.mark.parametrize(
    ("raw", "beside"),
    [
        ({"completion": "a", "answer": 1}, {"row_completion": "a"}),
        ({"chosen": "a", "rejected": "b"}, {"row_chosen": "a", "row_rejected": "b"}),
        (
            {"completion": "a", "score": 2, "source": "web"},
            {"row_completion": "a", "row_score": 2.0, "row_source": "web"},
        ),
        (
            {"responses": ["a", "b"], "ranks": [2, 1]},
            {"row_responses": ["a", "b"], "row_ranks": [2, 1]},
        ),
        ({"steps": ["a"], "labels": [1]}, {"row_steps": ["a"], "row_labels": [1.0]}),
    ],
)
def test_what_is_said_beside_the_prompt(raw: Raw, beside: dict[str, Any]) -> None:
    (prompt,) = derive([as_row({"prompt": "p", **raw}, "f:1")], Prompt, "")
    columns = {"answer": 1} if "answer" in raw else {}
    assert renamed(prompt.columns, prompt.beside) == {**columns, **beside}


def test_values_that_json_has_no_word_for() -> None:
    import datetime

    row = Prompt("p", {"day": datetime.date(2024, 5, 1), "nan": float("nan")}, "f:1")
    line = generated_row(Rollout(row, Tokens([1], [2, 3], ""), [-0.5, -0.25], "eos", "hi"), 0)
    assert line["logprob"] == -0.75 and line["nan"] is None
    assert json.loads(json.dumps(line, default=str))["day"] == "2024-05-01"


def test_blocks_of_prompts_change_no_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Raw] = [{"prompt": f"Greet {i % 3}: "} for i in range(11)]
    whole = answered(rows, tmp_path / "whole", "algo.samples=2")
    monkeypatch.setattr(generate, "AT_ONCE", 4)
    parts = answered(rows, tmp_path / "parts", "algo.samples=2")
    assert [line["response"] for line in parts] == [line["response"] for line in whole]
    assert len({line["response"] for line in parts}) > 3
