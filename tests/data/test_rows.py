"""Rows from files: every shape, every fault by its place, and a hold-out that shares no prompt."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.kinds import Demonstration, Preference, Prompt, Ranking, Text, pairs_of
from rlhf_cli.data.rows import hold_out, read_rows, read_split, read_texts
from tests.toys import data_of

USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "hello"}
OTHER = {"role": "assistant", "content": "go"}
HH = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: tell\n\nAssistant:"


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def read(file: Path, kind: type, **data: Any) -> list[Any]:
    return read_rows(data_of(**data), str(file), kind, [])


SHAPES: list[tuple[Any, type, Any]] = [
    ({"prompt": "p", "completion": "c"}, Demonstration, Demonstration("p", "c")),
    ({"messages": [USER, REPLY]}, Demonstration, Demonstration([USER], "hello")),
    ({"prompt": [USER], "completion": [REPLY]}, Demonstration, Demonstration([USER], "hello")),
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
        {"prompt": "p", "responses": ["a", "b"], "scores": [2, 1]},  # higher is better
        Preference,
        Preference("p", "a", "b"),
    ),
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
    rows = read_rows(data_of(bad_rows="drop"), str(file), Prompt, notes)
    assert [row.prompt for row in rows] == ["a"]
    (note,) = notes
    assert "1 prompt rows" in note
    assert "2 dropped: column 'prompt' is empty" in note
    assert "1 dropped: no column 'prompt'; found x" in note


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
        ("rows.json", b'{"prompt": "p"}', "expected a list of objects"),
        ("rows.json", b"[1", "not JSON"),
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


def test_every_stage_holds_out_the_same_prompts(tmp_path: Path) -> None:
    """A row that makes no pair, or six, must not shift who is held out."""
    rows = [
        {
            "prompt": f"p{i}",
            "responses": ["a", "b", "c"],
            "ranks": [1, 1, 1] if i == 7 else [1, 2, 3],
        }
        for i in range(40)
    ]
    data = data_of(path=str(write(tmp_path / "rows.jsonl", *rows)), eval_rows=10)
    trained_on = {row.prompt for row in read_split(data, Preference).train}
    held_out = {row.prompt for row in read_split(data, Prompt).held_out}
    assert len(held_out) == 10
    assert not trained_on & held_out


def test_too_few_rows_to_hold_out() -> None:
    with pytest.raises(UserError, match="holding out 3 of 3 prompts leaves none to train on"):
        hold_out([Prompt(str(i)) for i in range(3)], 3, "x.jsonl")


def test_limits_and_an_own_evaluation_file(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", *({"prompt": str(i)} for i in range(9)))
    unseen = write(tmp_path / "eval.jsonl", {"prompt": "e"})
    data = data_of(path=str(file), eval_path=str(unseen), max_rows=4)
    split = read_split(data, Prompt)
    assert [row.prompt for row in split.train] == ["0", "1", "2", "3"]
    assert [row.prompt for row in split.held_out] == ["e"]
    assert "rows.jsonl: 9" in split.notes[0] and "eval.jsonl: 1" in split.notes[-1]


def test_plain_text_comes_from_its_own_file(tmp_path: Path) -> None:
    file = write(tmp_path / "text.jsonl", *({"text": f"t{i}"} for i in range(5)))
    data = data_of(format="hh", text_path=str(file), eval_rows=1)  # whatever the rows' format
    split = read_texts(data)
    assert len(split.train) == 4 and len(split.held_out) == 1
    assert read_texts(data_of()).train == []


def test_pairs_of_a_ranking() -> None:
    row = Ranking("p", ["c", "a", "b", "b2"], [3, 1, 2, 2])
    pairs = [(pair.chosen, pair.rejected) for pair in pairs_of(row)]
    assert sorted(pairs) == [("a", "b"), ("a", "b2"), ("a", "c"), ("b", "c"), ("b2", "c")]
