"""Multiple-choice rows: what is read, what is refused, and whose log-prob is asked."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.errors import UserError
from rlhf_cli.evaluation.choices import by_chance, questions_of

GOOD: dict[str, Any] = {"prompt": "2 + 2 = ", "choices": ["3", "4"], "answer": "4"}


def written(folder: Path, *rows: dict[str, Any]) -> str:
    file = folder / "choices.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_an_answer_is_a_text_or_a_number(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        GOOD,
        {**GOOD, "choices": ["a", "b", "c", "d"], "answer": 2, "topic": "x"},
    ]
    found = questions_of(written(tmp_path, *rows))
    assert [question.answer for question in found] == [1, 2]
    assert found[1].row.columns == {"topic": "x"}
    assert by_chance(found) == (1 / 2 + 1 / 4) / 2


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"answer": "5"}, ":1: answer must be one of choices"),
        ({"answer": 2}, "got 2"),
        ({"answer": True}, "got True"),
        ({"choices": ["4", "4"]}, "answer must be one of choices"),
        ({"choices": ["4"]}, "a list of two texts or more"),
        ({"choices": "34"}, "a list of two texts or more"),
        ({"prompt": None}, "needs prompt"),
    ],
)
def test_a_row_that_asks_nothing_is_refused(
    change: dict[str, Any], line: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=line):
        questions_of(written(tmp_path, {**GOOD, **change}))
