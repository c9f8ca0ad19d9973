"""Rows from files: every shape, every fault by its place, and a hold-out that shares no prompt."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.data.held_out import hash_of, hold_out, identity
from rlhf_cli.data.kinds import (
    Demonstration,
    Feedback,
    Preference,
    Prompt,
    Ranking,
    Stepwise,
    Text,
)
from rlhf_cli.data.rows import Rows, read_split
from tests.toys import all_rows, composed, data_of

USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "hello"}
OTHER = {"role": "assistant", "content": "go"}
HH = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: tell\n\nAssistant:"


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


read = all_rows


SHAPES: list[tuple[Any, type, Any]] = [
    ({"prompt": "p", "completion": "c"}, Demonstration, Demonstration("p", "c")),
    ({"messages": [USER, REPLY]}, Demonstration, Demonstration([USER], "hello")),
    (
        {"prompt": [USER], "completion": [REPLY]},
        Demonstration,
        Demonstration([USER], "hello", learn_from=1),
    ),
    ({"text": "t"}, Text, Text("t")),
    ({"text": "t"}, Demonstration, Text("t")),  # sft trains on all of it
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, Preference, Preference("p", "a", "b")),
    (
        {"chosen": [USER, REPLY], "rejected": [USER, OTHER]},
        Preference,
        Preference([USER], "hello", "go"),
    ),
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, Demonstration, Demonstration("p", "a")),
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, Prompt, Prompt("p")),
    ({"prompt": "p", "answer": "7"}, Prompt, Prompt("p", {"answer": "7"})),
    ({"prompt": "p", "completion": "c", "n": 2}, Prompt, Prompt("p", {"n": 2})),
    (
        {"prompt": "p", "responses": ["a", "b"], "ranks": [2, 1]},
        Ranking,
        Ranking("p", ["a", "b"], [2.0, 1.0]),
    ),
    (
        {"prompt": "p", "responses": ["a", "b"], "scores": [1.5, 2], "source": "web"},
        Ranking,  # higher is better
        Ranking("p", ["a", "b"], [-1.5, -2], group="web"),
    ),
    (
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 0.5, "source": "web"},
        Preference,
        Preference("p", "a", "b", margin=0.5, group="web"),
    ),
    (
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": None, "source": None},
        Preference,
        Preference("p", "a", "b"),
    ),
    (
        {"prompt": "p", "completion": "c", "label": True, "source": 3},
        Feedback,
        Feedback("p", "c", True, group="3"),
    ),
    ({"prompt": "p", "completion": "c", "label": 0}, Feedback, Feedback("p", "c", False)),
    (
        {"prompt": "p", "completion": "c", "label": "True", "score": -2},
        Feedback,
        Feedback("p", "c", True, -2.0),
    ),
    (
        {"prompt": "p", "completion": "c", "score": 2.5, "label": None, "answer": "7"},
        Feedback,
        Feedback("p", "c", None, 2.5, columns={"answer": "7"}),
    ),
    ({"messages": [USER, REPLY], "label": 1}, Feedback, Feedback([USER], "hello", True)),
    (
        {"prompt": "p", "completion": "c", "label": True, "answer": "7"},
        Prompt,
        Prompt("p", {"answer": "7"}),
    ),
    ({"prompt": "p", "completion": "c", "label": True}, Demonstration, Demonstration("p", "c")),
    ({"prompt": "p", "completion": "c", "label": None}, Demonstration, Demonstration("p", "c")),
    (
        {"prompt": "p", "steps": ["a", "b", "c"], "labels": [True, 0, 0.25]},
        Stepwise,
        Stepwise("p", ["a", "b", "c"], [1.0, 0.0, 0.25]),
    ),
    (
        {"prompt": "p", "steps": ["a", "b"], "labels": [1, 0.5]},
        Demonstration,
        Demonstration("p", "a\nb"),
    ),
    ({"prompt": "p", "steps": ["a"], "labels": [0]}, Prompt, Prompt("p")),
    ({"prompt": "p", "steps": 4}, Prompt, Prompt("p", {"steps": 4})),
    (
        {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [3, 1, 2]},
        Demonstration,
        Demonstration("p", "b"),
    ),
]


@pytest.mark.parametrize(("row", "kind", "expected"), SHAPES)
def test_a_shape_of_row(row: Any, kind: type, expected: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", row)
    found = read(file, kind)[0]
    assert found.source == f"{file}:1"
    found.source = ""
    if isinstance(found, Demonstration):
        found.columns = {}
    assert found == expected


FAULTS: list[tuple[str, type, str, str]] = [
    # row, kind asked for, format, what the line must say after FILE:2
    ('{"prompt": "p"', Prompt, "rows", "not JSON"),
    ("[1, 2]", Prompt, "rows", "expected an object, got list"),
    ('{"question": "p", "b": 1}', Prompt, "rows", "no column 'prompt'; found question, b"),
    ('{"prompt": null}', Prompt, "rows", "no column 'prompt'"),
    ('{"prompt": "  "}', Prompt, "rows", "column 'prompt' is empty"),
    ('{"prompt": 3}', Prompt, "rows", "column 'prompt' holds int, expected text"),
    ('{"prompt": [{"role": "user"}]}', Prompt, "rows", "column 'prompt' needs messages with role"),
    ('{"prompt": "p", "completion": ""}', Demonstration, "rows", "column 'completion' is empty"),
    ('{"prompt": "p", "chosen": "a"}', Preference, "rows", "no column 'rejected'"),
    (
        json.dumps({"chosen": [USER, REPLY], "rejected": [REPLY, OTHER]}),
        Preference,
        "rows",
        "chosen and rejected differ before their last message",
    ),
    (json.dumps({"messages": [USER]}), Demonstration, "rows", "must end in a reply"),
    (json.dumps({"messages": [REPLY, USER]}), Demonstration, "rows", "must end in a reply"),
    ('{"prompt": "p", "responses": ["a"], "ranks": [1]}', Ranking, "rows", "2 or more responses"),
    (
        '{"prompt": "p", "responses": ["a", "b"], "ranks": [1]}',
        Ranking,
        "rows",
        "column 'ranks' needs one number for each of 2",
    ),
    (
        '{"prompt": "p", "responses": ["a", "b"], "scores": [1, "x"]}',
        Ranking,
        "rows",
        "column 'scores' must hold numbers",
    ),
    ('{"prompt": "p", "responses": ["a", ""], "ranks": [1, 2]}', Ranking, "rows", "is empty"),
    (
        '{"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1e999]}',
        Ranking,
        "rows",
        "column 'ranks' must hold numbers",
    ),
    (
        '{"prompt": "p", "responses": "a, b", "ranks": [1, 2]}',
        Ranking,
        "rows",
        "column 'responses' holds str, expected a list",
    ),
    (
        '{"prompt": "p", "chosen": "a", "rejected": "b", "margin": -1}',
        Preference,
        "rows",
        "column 'margin' holds -1, expected 0 or more",
    ),
    (
        '{"prompt": "p", "chosen": "a", "rejected": "b", "margin": "wide"}',
        Preference,
        "rows",
        "column 'margin' holds 'wide', expected a number",
    ),
    (
        '{"prompt": "p", "chosen": "a", "rejected": "b", "p": 1.2}',
        Preference,
        "rows",
        "column 'p' holds 1.2, expected a chance from 0 to 1",
    ),
    (
        '{"prompt": "p", "chosen": "a", "rejected": "b", "source": ["x"]}',
        Preference,
        "rows",
        "column 'source' holds list, expected text",
    ),
    (
        '{"prompt": "p", "completion": "c", "label": true, "score": "high"}',
        Feedback,
        "rows",
        "column 'score' holds 'high', expected a number",
    ),
    (
        '{"prompt": "p", "steps": ["a", "b"], "labels": [1]}',
        Stepwise,
        "rows",
        "column 'labels' holds 1 for 2 steps",
    ),
    (
        '{"prompt": "p", "steps": ["a", " "], "labels": [1, 1]}',
        Stepwise,
        "rows",
        "'steps' is empty",
    ),
    ('{"prompt": "p", "steps": [], "labels": []}', Stepwise, "rows", "'steps' is empty"),
    (
        '{"prompt": "p", "steps": ["a"], "labels": [-1]}',
        Stepwise,
        "rows",
        "column 'labels' holds -1, expected true, false or a number from 0 (wrong) to 1 (right)",
    ),
    ('{"prompt": "p", "steps": ["a"], "labels": ["x"]}', Stepwise, "rows", "'labels' holds 'x'"),
    (
        '{"prompt": "p", "completion": "c", "label": "maybe"}',
        Feedback,
        "rows",
        "column 'label' holds 'maybe', expected true or false, yes or no, good or bad, 1 or 0",
    ),
    (
        '{"question": "q", "a": {"solution": "s"}}',
        Feedback,
        "gsm8k_solutions",
        "no column with {solution, is_correct}; found question, a",
    ),
    (
        '{"question": "q", "a": {"solution": "s", "is_correct": "no idea"}}',
        Feedback,
        "gsm8k_solutions",
        "column 'a.is_correct' holds 'no idea', expected true or false",
    ),
    (
        '{"question": "q", "a": {"solution": 7, "is_correct": true}}',
        Feedback,
        "gsm8k_solutions",
        "column 'a.solution' holds int, expected text",
    ),
    ('{"prompt": "p"}', Preference, "rows", "this is a prompt row; needed: preference rows"),
    ('{"text": "t"}', Prompt, "rows", "this is a text row; needed: prompt rows"),
    (json.dumps({"chosen": "a", "rejected": "b"}), Preference, "hh", "do not share a dialogue"),
    (
        json.dumps({"chosen": f"{HH} a", "rejected": f"x{HH} b"}),
        Preference,
        "hh",
        "do not share a dialogue",
    ),
    (json.dumps({"chosen": HH, "rejected": f"{HH} b"}), Preference, "hh", "'chosen' is empty"),
    ('{"question": "q", "answer": "4"}', Demonstration, "gsm8k", "column 'answer' has no '#### N'"),
]


@pytest.mark.parametrize(("line", "kind", "format", "said"), FAULTS)
def test_a_fault_is_named_by_its_place(
    line: str, kind: type, format: str, said: str, tmp_path: Path
) -> None:
    good = {"rows": json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"})}
    good["hh"] = json.dumps({"chosen": f"{HH} a", "rejected": f"{HH} b"})
    good["gsm8k"] = json.dumps({"question": "q", "answer": "a #### 4"})
    if kind is Ranking:
        good["rows"] = json.dumps({"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]})
    if kind is Feedback:
        good["rows"] = json.dumps({"prompt": "p", "completion": "c", "label": True})
        solution = {"solution": "s", "is_correct": True}
        good["gsm8k_solutions"] = json.dumps({"question": "q", "a": solution})
    if kind is Stepwise:
        good["rows"] = json.dumps({"prompt": "p", "steps": ["a"], "labels": [1]})
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{good[format]}\n{line}\n")
    with pytest.raises(UserError) as caught:
        read(file, kind, format=format)
    assert str(caught.value).startswith(f"{file}:2: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_blank_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('\n{"prompt": "a"}\n\n{"prompt": ""}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:4: "):
        read(file, Prompt)


def test_bad_rows_can_be_dropped_and_are_counted(tmp_path: Path) -> None:
    file = write(
        tmp_path / "rows.jsonl", {"prompt": "a"}, {"prompt": ""}, {"prompt": " "}, {"x": 1}
    )
    notes: list[str] = []
    rows = all_rows(file, Prompt, notes, bad_rows="drop")
    assert [row.prompt for row in rows] == ["a"]
    (note,) = notes
    assert "1 prompt rows" in note
    assert "2 dropped: column 'prompt' is empty" in note
    assert "1 dropped: no column 'prompt'; found x" in note


def test_a_file_of_bad_rows_only(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", {"prompt": ""}, {"prompt": ""})
    with pytest.raises(UserError) as caught:
        read_split(data_of(path=str(file), bad_rows="drop"), Prompt)
    assert str(caught.value) == (
        f"{file}: no usable prompt row ({{prompt}}); {file}: no rows, "
        "2 dropped: column 'prompt' is empty (rows.jsonl:1, rows.jsonl:2)"
    )


UNREADABLE = {
    "a cut last line": (b'{"prompt": "a"}\n{"prompt": "b"}\n{"prom', "not JSON", [3]),
    "a line in another encoding": (
        b'{"prompt": "a"}\n{"prompt": "\xe4"}\n{"prompt": "b"}\n',
        "not text in UTF-8",
        [2],
    ),
    "half of a character": (b'{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "\xc3', "not text", [3]),
    "no object": (b'{"prompt": "a"}\n[1]\n"x"\n{"prompt": "b"}\n', "expected an object", [2, 3]),
    "zero bytes": (b'{"prompt": "a"}\n\n\0\0\0\n{"prompt": "b"}\n', "not JSON", [3]),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_lines_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    """Named by number, or dropped by number; those after them are read."""
    content, why, numbers = UNREADABLE[name]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"rows\.jsonl:{numbers[0]}: {why}"):
        read(file, Prompt)
    notes: list[str] = []
    rows = all_rows(file, Prompt, notes, bad_rows="drop")
    assert [row.prompt for row in rows] == ["a", "b"]
    assert "2 prompt rows" in notes[0] and why in notes[0]
    assert all(f"rows.jsonl:{number}" in notes[0] for number in numbers)


@pytest.mark.parametrize(
    ("rest", "why", "number"),
    [
        (b'"c', "the file ends within a quoted cell", 4),
        (b"\xe4\r\n", "not text in UTF-8", 4),
        (b"c,\xe4\r\n", "not text in UTF-8", 4),
    ],
)
def test_rows_of_csv_that_cannot_be_read(
    rest: bytes, why: str, number: int, tmp_path: Path
) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b'prompt\r\n"a\r\n"\r\n' + rest)
    with pytest.raises(UserError, match=rf"rows\.csv:{number}: {why}"):
        read(file, Prompt)
    file.write_bytes(file.read_bytes().replace(rest, b"b\r\n" + rest))
    notes: list[str] = []
    rows = all_rows(file, Prompt, notes, bad_rows="drop")
    assert [row.prompt for row in rows] == ["a\n", "b"]
    assert f"1 dropped: {why} (rows.csv:{number + 1})" in notes[0]


def test_a_few_of_many_dropped_rows_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", {"prompt": "a"}, *[{"prompt": ""}] * 7)
    notes: list[str] = []
    all_rows(file, Prompt, notes, bad_rows="drop")
    places = ", ".join(f"rows.jsonl:{number}" for number in range(2, 7))
    assert f"7 dropped: column 'prompt' is empty ({places} and 2 more)" in notes[0]


def test_hh_is_split_before_the_last_reply(tmp_path: Path) -> None:
    file = write(tmp_path / "hh.jsonl", {"chosen": f"{HH} a", "rejected": f"{HH} b"})
    (row,) = read(file, Preference, format="hh")
    assert (row.prompt, row.chosen, row.rejected) == (HH, " a", " b")


def test_gsm8k_has_an_answer_in_every_role(tmp_path: Path) -> None:
    file = write(tmp_path / "g.jsonl", {"question": "q", "answer": "2 * 21 = 42\n#### 42"})
    (shown,) = read(file, Demonstration, format="gsm8k")
    (asked,) = read(file, Prompt, format="gsm8k")
    assert shown.completion.endswith("#### 42")
    assert (asked.prompt, asked.columns["answer"]) == ("q", "42")


SOLUTIONS = {
    "question": "q",
    "ground_truth": "A: 4",
    "small": {"is_correct": False, "solution": "2 + 2 = 5\nA: 5"},
    "empty": {"is_correct": True, "solution": " "},
    "large": {"is_correct": True, "solution": "2 + 2 = 4\nA: 4"},
}


def test_gsm8k_solutions_are_a_row_each(tmp_path: Path) -> None:
    """And an empty one is no reason to drop the others."""
    file = write(tmp_path / "s.jsonl", SOLUTIONS, SOLUTIONS | {"question": "q2"})
    with pytest.raises(UserError, match=r"s\.jsonl:1: column 'empty\.solution' is empty"):
        read(file, Feedback, format="gsm8k_solutions")
    notes: list[str] = []
    rows = all_rows(file, Feedback, notes, format="gsm8k_solutions", bad_rows="drop")
    truth = {"ground_truth": "A: 4"}
    assert rows[:2] == [
        Feedback("q", "2 + 2 = 5\nA: 5", False, None, f"{file}:1", "small", truth),
        Feedback("q", "2 + 2 = 4\nA: 4", True, None, f"{file}:1", "large", truth),
    ]
    assert [row.prompt for row in rows] == ["q", "q", "q2", "q2"]
    dropped = "2 dropped: column 'empty.solution' is empty (s.jsonl:1, s.jsonl:2)"
    assert notes[0] == f"{file}: 4 feedback rows, {dropped}"
    assert notes[1] == "labels: true (2) as good, false (2) as bad"
    held = read_split(
        data_of(format="gsm8k_solutions", bad_rows="drop", path=str(file), eval_rows=1), Feedback
    )
    assert len({row.prompt for row in held.held_out}) == 1 and len(held.held_out) == 2


FEEDBACK_CSV = """prompt,completion,label,score,source
p,a,true,,web
p,b,FALSE,2.5,
p,c,,-1,
p,d,1,0,
p,e,0,,
"""


def test_judgements_in_csv(tmp_path: Path) -> None:
    """Cells are text, and an empty one says nothing."""
    file = tmp_path / "rows.csv"
    file.write_text(FEEDBACK_CSV)
    found = [(row.label, row.score, row.group) for row in read(file, Feedback)]
    assert found == [
        (True, None, "web"),
        (False, 2.5, ""),
        (None, -1.0, ""),
        (True, 0.0, ""),
        (False, None, ""),
    ]
    file.write_text("prompt,chosen,rejected,margin\np,a,b,0.5\np,a,b,\n")
    assert [row.margin for row in read(file, Preference)] == [0.5, None]
    file.write_text('prompt,steps,labels\np,"[""a"", ""b""]","[true, 0.5]"\n')
    (row,) = read(file, Stepwise)
    assert (row.steps, row.labels) == (["a", "b"], [1.0, 0.5])
    file.write_text("prompt,steps,labels\np,first,1\n")
    with pytest.raises(UserError, match=r"rows\.csv:2: column 'steps' holds str, expected a list"):
        read(file, Stepwise)


def test_a_margin_of_full_dialogues(tmp_path: Path) -> None:
    row = {"chosen": [USER, REPLY], "rejected": [USER, OTHER], "margin": 2}
    (found,) = read(write(tmp_path / "rows.jsonl", row), Preference)
    assert found.margin == 2


ROWS = [{"prompt": "a, b", "completion": 'say "x"\nand y'}, {"prompt": "ü", "completion": "c"}]


def as_csv() -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, ["prompt", "completion"])
    writer.writeheader()
    writer.writerows(ROWS)
    return stream.getvalue()


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_file_format_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    elif suffix == "csv":
        file.write_text(as_csv(), encoding="utf-8")
    elif suffix == "json":
        file.write_text(json.dumps(ROWS))
    else:
        write(file, *ROWS)
    found = read(file, Demonstration)
    assert [{"prompt": row.prompt, "completion": row.completion} for row in found] == ROWS
    folder = read(tmp_path, Demonstration)
    assert folder == found


def test_a_folder_is_read_file_by_file_in_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.jsonl", {"prompt": name})
    (tmp_path / "notes.md").write_text("not rows")
    assert [row.prompt for row in read(tmp_path, Prompt)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.json", b'[{"prompt": "p"}', "not JSON: the list ends within"),
        ("rows.jsonl", b"\xff\xfe\x00", "not a text file in UTF-8"),
        ("rows.jsonl", b"\n\n", "the file has no rows"),
        ("rows.parquet", b"PAR1", "not Parquet"),
    ],
)
def test_a_broken_file_is_named(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read(tmp_path / name, Prompt)
    assert str(tmp_path / name) in str(caught.value)


def test_columns_are_renamed(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", {"q": "p", "prompt": "other"})
    assert read(file, Prompt, columns={"prompt": "q"})[0].prompt == "p"
    with pytest.raises(UserError, match="no column 'z'; found q, prompt"):
        read(file, Prompt, columns={"prompt": "z"})


def test_the_hold_out_shares_no_prompt(tmp_path: Path) -> None:
    """Several rows to a prompt stay together, and every run holds out the same."""
    rows = [{"prompt": f"p{i % 13}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(60)]
    file = write(tmp_path / "rows.jsonl", *rows)
    data = data_of(path=str(file), eval_rows=3)
    split = read_split(data, Preference)
    train, held = ({row.prompt for row in side} for side in (split.train, split.held_out))
    assert not train & held
    assert len(split.train) + len(split.held_out) == 60
    assert len(held) == 3
    assert [row.chosen for row in split.train] == sorted(
        (row.chosen for row in split.train), key=lambda text: int(text[1:])
    )
    assert read_split(data, Preference) == split
    prompts = read_split(data, Prompt)
    assert {row.prompt for row in prompts.held_out} == held  # the same for every stage


def test_white_space_makes_no_other_prompt() -> None:
    """A copy with a line break more is on the side of its twin; so are dialogues and texts."""
    words = [f"Mia asks: {i}?" for i in range(12)]
    spaced = [f"  {word} ".replace(" ", " \n ") for word in words]
    for rows in (
        [Prompt(text) for text in words + spaced],
        [Prompt([{"role": "user", "content": text}]) for text in words + spaced],
        [Text(text) for text in words + spaced],
    ):
        of = np.array([hash_of(identity(row)) for row in rows], np.uint64)
        held, seen = hold_out(of, of, 0.1, 4, "rows.jsonl")
        assert held.sum() == 8 and (held == seen).all()
        assert (held[:12] == held[12:]).all()


def test_what_a_template_wrote_around_a_text_makes_no_other_text() -> None:
    bare, written = Text("Once. <b>Bold</b> words"), Text("<s> Once. <b>Bold</b> words</s>\n")
    assert identity(bare) == identity(written) != identity(Text("Once. Bold words"))


RANKINGS = [
    {"prompt": f"p{i}", "responses": ["a", "b", "c"], "ranks": [1, 1, 1] if i == 7 else [1, 2, 3]}
    for i in range(40)
]
JUDGED = [
    {"prompt": f"p{i % 20}", "completion": f"c{i}", "label": i % 3 > 0, "score": i}
    for i in range(100)
]
PAIRED = ["ranking_to_preference"]


@pytest.mark.parametrize(
    ("rows", "convert", "kind"),
    [
        (RANKINGS, PAIRED, Preference),
        (JUDGED, ["feedback_to_ranking"], Ranking),
        (JUDGED, ["feedback_to_ranking", *PAIRED], Preference),
        (JUDGED, ["feedback_to_stepwise"], Stepwise),
    ],
)
def test_every_stage_holds_out_the_same_prompts(
    rows: list[Any], convert: list[str], kind: type, tmp_path: Path
) -> None:
    """A row that makes no pair, or six, must not shift who is held out."""
    path = str(write(tmp_path / "rows.jsonl", *rows))
    data = data_of(path=path, eval_rows=10, convert=convert)
    converted = read_split(data, kind)
    asked = {row.prompt for row in read_split(data, Prompt).held_out}
    assert len(asked) == 10
    assert not asked & {row.prompt for row in converted.train}
    assert {row.prompt for row in converted.held_out} == asked - {"p7" if rows is RANKINGS else ""}
    assert not asked & {row.prompt for row in read_split(data, Demonstration).train}


def test_conversions_are_told_for_both_sides(tmp_path: Path) -> None:
    path = str(write(tmp_path / "rows.jsonl", *RANKINGS))
    split = read_split(data_of(path=path, eval_rows=10, convert=PAIRED), Preference)
    assert len(split.train) + len(split.held_out) == 39 * 3
    (told,) = [note for note in split.notes if "ranking_to_preference" in note]
    assert told.endswith(": 117 preference rows from 40 ranking rows, 3 ties dropped")
    unseen = write(tmp_path / "eval.jsonl", RANKINGS[0])
    data = data_of(path=path, eval_path=str(unseen), max_rows=2, convert=PAIRED)
    split = read_split(data, Preference)
    assert split.notes[:3] == [
        f"{path}: 2 ranking rows",
        "the first 2 are used",
        "ranking_to_preference: 6 preference rows from 2 ranking rows",
    ]
    assert f"{unseen}: 1 ranking rows" in split.notes
    assert len(split.held_out) == 3


def test_conversions_leave_prompts_and_demonstrations_alone(tmp_path: Path) -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    file = write(tmp_path / "rows.jsonl", pair)
    for kind in (Demonstration, Prompt):
        assert len(read(file, kind, convert=["preference_to_feedback"])) == 1
    assert len(read(file, Feedback, convert=["preference_to_feedback"])) == 2


@pytest.mark.parametrize(
    ("row", "kind", "convert", "said"),
    [
        (
            RANKINGS[0],
            Preference,
            [],
            ":1: this is a ranking row; needed: preference rows ({prompt, chosen, rejected}); "
            "data.convert=[ranking_to_preference] makes them",
        ),
        (
            JUDGED[0],
            Preference,
            [],
            "; data.convert=[feedback_to_ranking,ranking_to_preference] makes them",
        ),
        (
            RANKINGS[0],
            Ranking,
            PAIRED,
            ":1: this is a ranking row, and a preference row after "
            "data.convert=[ranking_to_preference]; needed: ranking rows "
            "({prompt, responses, ranks}); data.convert=[] keeps them",
        ),
        (
            RANKINGS[0],
            Preference,
            ["feedback_to_ranking", *PAIRED],
            "data.convert: feedback_to_ranking found no feedback rows in FILE",
        ),
        (
            RANKINGS[7],
            Preference,
            PAIRED,
            "FILE: no usable preference row ({prompt, chosen, rejected}); FILE: 1 ranking rows; "
            "ranking_to_preference: 0 preference rows from 1 ranking rows, 3 ties dropped",
        ),
        (
            JUDGED[0],
            Demonstration,
            [],
            "FILE: no usable demonstration row ({prompt, completion} or {text}); FILE: 1 feedback "
            "rows; labels: false (1) as bad; 0 demonstration rows from 1 rows: none with a thumbs",
        ),
    ],
)
def test_a_conversion_that_is_missing_or_wrong(
    row: Any, kind: type, convert: list[str], said: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "rows.jsonl", row)
    with pytest.raises(UserError) as caught:
        read(file, kind, convert=convert)
    assert said.replace("FILE", str(file)) in str(caught.value)


def test_a_prompt_row_has_no_conversion(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", {"prompt": "p"})
    with pytest.raises(UserError) as caught:
        read(file, Preference)
    assert str(caught.value).endswith("({prompt, chosen, rejected})")


def test_demonstrations_left_out_are_told(tmp_path: Path) -> None:
    path = str(write(tmp_path / "rows.jsonl", *JUDGED))
    split = read_split(data_of(path=path, eval_rows=10), Demonstration)
    assert 0 < len(split.train) < 50
    assert any(
        note.startswith("66 demonstration rows from 100 rows: none with") for note in split.notes
    )


@pytest.mark.parametrize(
    ("kind", "convert"),
    [
        (Preference, []),
        (Ranking, []),
        (Feedback, []),
        (Stepwise, []),
        (Preference, PAIRED),
        (Feedback, ["preference_to_feedback"]),
        (Ranking, ["feedback_to_ranking"]),
        (Stepwise, ["feedback_to_stepwise"]),
        (Demonstration, PAIRED),
        (Prompt, ["feedback_to_stepwise"]),
    ],
)
def test_the_demo_has_rows_for_every_conversion(kind: type, convert: list[str]) -> None:
    data = composed("dpo").data
    split = read_split(replace(data, convert=convert), kind)
    assert split.train and all(isinstance(row, kind) for row in split.train + split.held_out)
    assert not {row.prompt for row in split.train} & {row.prompt for row in split.held_out}
    if convert and kind not in (Demonstration, Prompt):
        assert any(note.startswith(f"{convert[0]}: ") for note in split.notes)
    if convert == PAIRED and kind is Preference:
        assert "ranking_to_preference: 3600 preference rows from 600 ranking rows" in split.notes


def test_doubtful_pairs_are_dropped_on_both_sides(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": f"a{i}", "rejected": "longer"} for i in range(8)]
    rows += [{"prompt": f"p{i}", "chosen": "x", "rejected": "x"} for i in range(8)]
    path = str(write(tmp_path / "rows.jsonl", *rows))
    data = data_of(path=path, eval_rows=3)
    kept = read_split(data, Preference)
    assert (len(kept.train), len(kept.held_out)) == (10, 6)
    assert any(note.startswith("8 of 16 rows judge a text against itself") for note in kept.notes)
    dropped = read_split(replace(data, doubtful_pairs="drop"), Preference)
    assert (len(dropped.train), len(dropped.held_out)) == (5, 3)
    assert "8 of 16 rows judge a text against itself: dropped" in dropped.notes
    with pytest.raises(UserError, match=r"rows\.jsonl:9: one of 8 rows that judge a text against"):
        read_split(replace(data, doubtful_pairs="error"), Preference)
    same = str(write(tmp_path / "same.jsonl", *rows[8:]))
    with pytest.raises(UserError, match=r"same\.jsonl: data.doubtful_pairs=drop leaves none of 8"):
        read_split(replace(data, path=same, doubtful_pairs="drop"), Preference)
    assert read_split(replace(data, doubtful_pairs="error"), Prompt).train  # no pairs are asked for


def test_too_few_rows_to_hold_out() -> None:
    of = np.array([1, 2, 3], np.uint64)
    with pytest.raises(UserError, match=r"holding out 3 of 3 .* set data\.eval_rows"):
        hold_out(of, of, 0.1, 3, "x.jsonl")
    with pytest.raises(UserError, match=r"holding out 1 of 1 .* give data\.eval_path"):
        hold_out(of[:1], of[:1], 0.1, None, "x.jsonl")


def test_rows_that_come_later_move_no_prompt_to_the_other_side(tmp_path: Path) -> None:
    """By share: what was held out stays so, and what was learnt from too."""
    rows = [{"prompt": f"question {i}"} for i in range(600)]
    file = write(tmp_path / "rows.jsonl", *rows[:300])
    data = data_of(path=str(file), eval_share=0.1)
    before = read_split(data, Prompt)
    write(file, *rows)
    after = read_split(data, Prompt)
    for side in ("train", "held_out"):
        old, new = ({row.prompt for row in getattr(split, side)} for split in (before, after))
        assert old <= new
    assert 15 <= len(before.held_out) <= 45
    assert {row.prompt for row in Rows(data).held_out(Prompt).held_out} == {
        row.prompt for row in after.held_out
    }


def test_of_a_large_share_a_part_is_looked_at() -> None:
    of = np.arange(10_000, dtype=np.uint64) * np.uint64(2**64 // 10_000)
    held, seen = hold_out(of, of, 0.1, None, "x.jsonl")
    assert (held.sum(), seen.sum()) == (1001, 200)
    assert (seen <= held).all() and not seen[200:].any()


def test_limits_and_an_own_evaluation_file(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", *({"prompt": str(i)} for i in range(9)))
    unseen = write(tmp_path / "eval.jsonl", {"prompt": "e"})
    data = data_of(path=str(file), eval_path=str(unseen), max_rows=4)
    split = read_split(data, Prompt)
    assert [row.prompt for row in split.train] == ["0", "1", "2", "3"]
    assert [row.prompt for row in split.held_out] == ["e"]
    assert "rows.jsonl: 4" in split.notes[0] and "eval.jsonl: 1" in split.notes[-1]


def test_plain_text_comes_from_its_own_file(tmp_path: Path) -> None:
    file = write(tmp_path / "text.jsonl", *({"text": f"t{i}"} for i in range(5)))
    data = data_of(format="hh", text_path=str(file), eval_rows=1)  # whatever the rows' format
    split = Rows(data).texts()
    assert len(split.train) == 4 and len(split.held_out) == 1
    assert Rows(data_of()).texts().train == []


@pytest.mark.parametrize(
    "judged",
    [
        {"chosen": "a", "rejected": "b", "margin": 1},
        {"responses": ["a", "b"], "scores": [2, 1]},
        {"steps": ["a"], "labels": [1]},
        {"completion": "a"},
    ],
)
def test_a_prompt_keeps_the_columns_that_rules_read(judged: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"p{i}", "answer": str(i), **judged} for i in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = compose("ppo", ["data=jsonl", f"data.path={file}", "data.eval_rows=1"]).data
    prompts = read_split(data, Prompt).train
    assert [row.columns for row in prompts] == [{"answer": row.prompt[1:]} for row in prompts]
