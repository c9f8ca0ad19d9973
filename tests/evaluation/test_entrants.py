"""Samples that a file has, and prompts that hold demonstrations."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.errors import UserError
from rlhf_cli.evaluation.entrants import given_samples


def written(folder: Path, *rows: dict[str, Any]) -> str:
    file = folder / "other.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def line(prompt: str, response: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, **more}


def test_what_policies_answered_is_grouped_by_prompt(tmp_path: Path) -> None:
    more = {"answer": "4", "row_chosen": "good", "reward": 1.0}
    rows = [
        line("p", "1", policy="a", **more),
        line("q", "2", policy="a"),
        line("p", "3", policy="a", finish_reason="length"),
        line("q", "4", policy="a"),
        line("p", "5", policy="b", temperature=1.0),
        line("p", "6", policy="b", temperature=0.0),  # the first temperature is read
        line("only b", "7", policy="b", temperature=1.0),
    ]
    found = given_samples(written(tmp_path, *rows))
    assert [row.prompt for row in found.prompts] == ["p"]
    assert found.responses == {"a": [[("1", True), ("3", False)]], "b": [[("5", True)]]}
    assert found.prompts[0].columns == {"answer": "4"}
    assert found.prompts[0].beside == {"chosen": "good"}


def test_a_file_of_one_policy_is_called_by_its_name(tmp_path: Path) -> None:
    assert list(given_samples(written(tmp_path, line("p", "x"))).responses) == ["other"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([line("p", "x"), line("p", "y"), line("q", "z")], "other has 1 to 2 responses"),
        ([line("p", "x", policy="a"), line("q", "y", policy="b")], "answered by all of a, b"),
        ([{"prompt": "p"}], ":1: needs prompt and response"),
        ([{"prompt": ["p"], "response": "x"}], ":1: column 'prompt' needs messages"),
    ],
)
def test_files_that_cannot_be_compared(
    rows: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        given_samples(written(tmp_path, *rows))
