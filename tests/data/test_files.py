"""Every way in which rows are kept gives the same rows, and what is not read is said."""

import csv
import datetime
import decimal
import gzip
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.files import (
    about_files,
    files_of,
    find,
    held_out_files_of,
    held_out_of,
    hub_of,
    is_local,
    read_raw,
)
from rlhf_cli.data.hub import HubName, hub_name
from rlhf_cli.data.raw import RowError

ROWS: list[dict[str, Any]] = [
    {"prompt": "a, b", "completion": 'say "x"\nand y'},
    {"prompt": "ü;\t", "completion": "[1]"},
    {"prompt": "\u2028", "completion": "{}"},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def as_csv(separator: str) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, ["prompt", "completion"], delimiter=separator)
    writer.writeheader()
    writer.writerows(ROWS)
    return stream.getvalue()


def zst(content: bytes) -> bytes:
    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


def parquet() -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), stream)
    return stream.getvalue()


def arrow(writer: Callable[..., Any]) -> bytes:
    stream, table = io.BytesIO(), pyarrow.Table.from_pylist(ROWS)
    with writer(stream, table.schema) as sink:
        sink.write_table(table, max_chunksize=2)
    return stream.getvalue()


PRETTY = json.dumps(ROWS, indent=1)
TEXTS = {
    "rows.jsonl": LINES,
    "rows.json": LINES,
    "rows.ndjson": LINES,
    "rows": LINES,
    "rows.txt": LINES,
    "rows.csv": as_csv(","),
    "named.csv": LINES,
    "rows.tsv": as_csv("\t"),
    "semicolons.csv": as_csv(";"),
    "tabs.csv": as_csv("\t"),
    "commas.tsv": as_csv(","),
    "blank.csv": "\n\n" + as_csv(","),
    "list.json": json.dumps(ROWS),
    "list.jsonl": PRETTY,
    "objects.jsonl": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "joined.jsonl": "".join(json.dumps(row) for row in ROWS),
    "held.json": json.dumps({"version": "1.1", "data": ROWS}),
    "held.jsonl": json.dumps({"data": ROWS, "tags": ["a"]}, indent=1),
    "indented.jsonl": "\n\n" + "".join(f"  {line}\n\n" for line in LINES.split("\n")),
}
KINDS: dict[str, bytes] = {
    **{name: text.encode() for name, text in TEXTS.items()},
    "mark.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "mark.csv": b"\xef\xbb\xbf" + as_csv(",").encode(),
    "mark.json": b"\xef\xbb\xbf" + PRETTY.encode(),
    "marks.jsonl": b"".join(b"\xef\xbb\xbf" + line for line in LINES.encode().splitlines(True)),
    "windows.jsonl": LINES.replace("\n", "\r\n").encode(),
    "windows.json": PRETTY.replace("\n", "\r\n").encode(),
    "rows.parquet": parquet(),
    "parquet.bin": parquet(),
    "rows.arrow": arrow(pyarrow.ipc.new_stream),
    "rows.feather": arrow(pyarrow.ipc.new_file),
    "rows.jsonl.gz": gzip.compress(LINES.encode()),
    "rows.csv.gz": gzip.compress(as_csv(",").encode()),
    "two.jsonl.gz": gzip.compress(LINES[:30].encode()) + gzip.compress(LINES[30:].encode()),
    "packed.jsonl": gzip.compress(LINES.encode()),
    "rows.json.zst": zst(PRETTY.encode()),
    "rows.tsv.zst": zst(as_csv("\t").encode()),
}


def put(file: Path, content: bytes | str = LINES) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def read(path: Any, limit: int | None = None) -> list[Any]:
    return [raw for raw, _ in read_raw(path, limit)]


def prompts(path: Any) -> list[str]:
    return [raw["prompt"] for raw in read(path)]


def line(prompt: str) -> str:
    return json.dumps({"prompt": prompt}) + "\n"


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    file = put(tmp_path / name, KINDS[name])
    assert read(str(file)) == ROWS
    assert read(str(file), 2) == ROWS[:2]


def test_a_dataset_that_was_saved(tmp_path: Path) -> None:
    """Its own shards in their order, and nothing that was computed from it."""
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    put(tmp_path / "one/cache-1.arrow", arrow(pyarrow.ipc.new_stream))
    assert read(str(tmp_path / "one")) == ROWS
    assert find(str(tmp_path / "one")).unused == [tmp_path / "one/cache-1.arrow"]
    parts = {"train": saved.select([0, 1]), "test": saved.select([2])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    assert read(str(tmp_path / "both")) == ROWS[:2]
    (held_out,) = held_out_files_of(str(tmp_path / "both"))
    assert read(str(held_out)) == ROWS[2:]
    (tmp_path / "one/data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002.arrow is missing"):
        read(str(tmp_path / "one"))


@pytest.mark.parametrize(
    ("content", "places"),
    [
        (LINES, ["1", "2", "3"]),
        ("\n" + LINES, ["2", "3", "4"]),
        (PRETTY, ["1", "2", "3"]),
        ("\n\n".join(json.dumps(row, indent=1) for row in ROWS), ["1", "6", "11"]),
        (as_csv(","), ["3", "4", "5"]),
    ],
)
def test_rows_have_places(content: str, places: list[str], tmp_path: Path) -> None:
    """Lines, the last of a row in CSV and the first of an object; of a list the place in it."""
    file = put(tmp_path / "rows.csv", content)
    assert [place for _, place in read_raw(str(file))] == [f"{file}:{each}" for each in places]


def test_long_cells(tmp_path: Path) -> None:
    long = "word " * 40_000
    file = put(tmp_path / "rows.csv", f"prompt,completion\na,{long}\n")
    assert read(str(file)) == [{"prompt": "a", "completion": long}]
    file = put(tmp_path / "rows.json", json.dumps([{"prompt": long * 10}, {"prompt": "b"}]))
    assert prompts(str(file)) == [long * 10, "b"]


def test_absent_cells_are_null(tmp_path: Path) -> None:
    file = put(tmp_path / "rows.csv", "prompt,answer,label\na\nb,,\n")
    assert read(str(file)) == [
        {"prompt": "a", "answer": None, "label": None},
        {"prompt": "b", "answer": "", "label": ""},
    ]


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("sep=;\nprompt;a\nx;y\n", ["prompt", "a"]),
        ('\ufeff"sep=|"\r\nprompt|a\r\nx|y\r\n', ["prompt", "a"]),
        ("prompt;completion;note, extra\nx;y;z\n", ["prompt", "completion", "note, extra"]),
        ("prompt\twhat, how, why\nx\ty\n", ["prompt", "what, how, why"]),
        ('id,"one; two; three"\nx,y\n', ["id", "one; two; three"]),
        ("\n\nprompt;a\nx;y\n", ["prompt", "a"]),
    ],
)
def test_what_separates_cells(content: str, names: list[str], tmp_path: Path) -> None:
    """Excel's first line says it, or else the header."""
    file = put(tmp_path / "rows.csv", content)
    ((row, place),) = read_raw(str(file))
    assert row == dict(zip(names, "xyz", strict=False))
    assert place == f"{file}:{content.count(chr(10))}"


def test_lines_within_cells_end_as_elsewhere(tmp_path: Path) -> None:
    file = put(tmp_path / "rows.csv", 'prompt,a\r\n"one\r\ntwo\rthree",x\r\n')
    assert read(str(file)) == [{"prompt": "one\ntwo\nthree", "a": "x"}]


ROW_FAULTS: dict[str, tuple[str, bytes | str, int, str]] = {
    "more cells": ("rows.csv", "prompt\na\nb, c\nd\n", 3, "more cells than columns: 2, and"),
    "tabs": ("rows.tsv", "prompt\tanswer\na\tb\nc\td\te\nf\tg\n", 3, "a cell with tabs in it"),
    "header again": ("rows.csv", "prompt,x\na,b\nprompt,x\nc,d\n", 3, "the header once more"),
    "quotes": ("rows.csv", 'prompt,x\na,b\n"c\nc" c,d\ne,f\n', 4, "the row begins on line 3"),
    "name twice": (
        "rows.jsonl",
        '{"a": 1}\n{"b": {"c": 1, "c": 1}}\n{"a": 2}\n',
        2,
        "the object names 'c' twice",
    ),
    "NaN": ("rows.jsonl", '{"a": 1}\n{"a": NaN}\n{"a": 2}\n', 2, "the object holds NaN, which is"),
    "NaN in a list": ("rows.json", '[{"a": 1},\n{"a": -Infinity},\n{"a": 2}]', 2, "-Infinity"),
    "half an object": ("rows.jsonl", '{"a": 1}\n{"a": \n{"a": 2}\n', 2, "not JSON: Expecting"),
    "commas": ("rows.jsonl", '{"a": 1}\n{"a": 1},\n{"a": 2}\n', 2, "not JSON: Extra data"),
    "two on a line": ("rows.jsonl", '{"a": 1}\n{"a": 2}[3]\n{"a": 4}\n', 2, "not JSON: Extra data"),
    "cut line": ("rows.jsonl", '{"a": 1}\n{"a": 2, "b\n{"a": 4}\n', 2, "not JSON: Unterminated"),
    "bytes": ("rows.json", b'[{"a": "b"}, {"a": "\xe4"}, {"a": "c"}]', 2, "not text in UTF-8"),
    "no object": ("rows.json", '[{"a": 1}, [2], {"a": 3}]', 2, "expected an object, got list"),
}


@pytest.mark.parametrize("name", ROW_FAULTS)
def test_a_row_that_cannot_be_read_is_one_of_three(name: str, tmp_path: Path) -> None:
    called, content, number, why = ROW_FAULTS[name]
    file = put(tmp_path / called, content)
    rows = list(read_raw(str(file)))
    (at,) = [i for i, (raw, _) in enumerate(rows) if isinstance(raw, RowError)]
    assert len(rows) == 3 and at == 1
    assert rows[at][1] == f"{file}:{number}"
    assert str(rows[at][0]).startswith(f"{file}:{number}: ") and why in str(rows[at][0])


def test_a_first_line_that_was_cut(tmp_path: Path) -> None:
    """What follows is read line by line, as no object goes on there."""
    file = put(tmp_path / "rows.jsonl", '{"a": 1,\n{"a": 2}\n')
    fault, row = read(str(file))
    assert isinstance(fault, RowError) and row == {"a": 2}


FILE_FAULTS: dict[str, tuple[str, bytes, str]] = {
    "empty": ("rows.jsonl", b"", "is empty"),
    "empty within": ("rows.jsonl.gz", gzip.compress(b""), "the file has no rows"),
    "cut gz": ("rows.jsonl.gz", gzip.compress(LINES.encode())[:-9], "cut or damaged"),
    "no gz": ("rows.jsonl.gz", b"\x1f\x8b and so on", "cut or damaged"),
    "cut zst": ("rows.jsonl.zst", zst(os.urandom(1000))[:-9], "cut or damaged"),
    "no zst": ("rows.jsonl.zst", b"\x28\xb5\x2f\xfd and so on", "cut or damaged"),
    "Parquet in gz": ("rows.parquet.gz", gzip.compress(parquet()), "packed once more: unpack it"),
    "cut Parquet": ("rows.parquet", parquet()[:-9], "not Parquet"),
    "no Parquet": ("rows.parquet", LINES.encode(), "not Parquet"),
    "cut Arrow": ("rows.arrow", arrow(pyarrow.ipc.new_stream)[:300], "not Arrow"),
    "pointer": ("rows.parquet", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "page": ("rows.jsonl", b"<!DOCTYPE html>", "a web page"),
    "UTF-16": ("rows.jsonl", LINES.encode("utf-16"), "UTF-16; save it as UTF-8"),
    "UTF-16 unsaid": ("rows.csv", as_csv(",").encode("utf-16-be"), "UTF-16; save it as UTF-8"),
    "UTF-32": ("rows.csv", as_csv(",").encode("utf-32"), "UTF-32; save it as UTF-8"),
    "sheet": ("rows.csv", b"PK\x03\x04...", "export it as CSV"),
    "tar": ("rows.tar.gz", gzip.compress(b"x" * 257 + b"ustar"), "a tar archive"),
    "text": ("rows.txt", b"Once upon a time", "neither JSON, CSV"),
    "picture": ("rows", b"\x89PNG\r\n\x1a\n", "neither JSON, CSV"),
    "cut list": (
        "rows.json",
        PRETTY.encode()[:-2],
        r"rows.json:\d+: not JSON: the list ends within",
    ),
    "two lists": ("rows.json", b"[{}]\n[{}]", "rows.json:2: not JSON: more follows the list"),
    "no comma": ("rows.json", b"[{}\n{}]", "rows.json:2: not JSON: Expecting ','"),
    "cut object": ("rows.json", b'{\n"a": 1,\n"b": 2\n', r"rows.json:\d: not JSON"),
    "lists": (
        "rows.json",
        b'{"a": [{"b": 1}], "c": [{"b": 1}]}',
        r"several lists of objects \(a, c",
    ),
    "column twice": ("rows.csv", b"prompt,a,a\n1,2,3\n", "the header names 'a' twice"),
    "header only": ("rows.csv", b"prompt,a\n", "the file has no rows"),
}


@pytest.mark.parametrize("name", FILE_FAULTS)
def test_a_file_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    called, content, why = FILE_FAULTS[name]
    file = put(tmp_path / called, content)
    with pytest.raises(UserError, match=why) as caught:
        read(str(file))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]},
        {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"from": "gpt", "value": "b"}]},
        {"instruction": "a", "completions": [{"response": "b"}, {"response": "c"}]},
        {"prompt": "a", "solutions": [{"text": "b"}]},
        {"a": 1},
        {"a": []},
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_the_only_row_of_a_file_is_no_list_of_rows(
    row: dict[str, Any], indent: int | None, tmp_path: Path
) -> None:
    assert read(str(put(tmp_path / "rows.json", json.dumps(row, indent=indent)))) == [row]


def test_an_object_of_dialogues_is_a_list_of_rows(tmp_path: Path) -> None:
    rows = [{"id": 1, "conversations": [{"from": "human", "value": "a"}]}]
    assert read(str(put(tmp_path / "rows.json", json.dumps({"conversations": rows})))) == rows


TYPES = {
    "day": (datetime.date(2024, 2, 3), "2024-02-03"),
    "time": (datetime.datetime(2024, 2, 3, 4, 5, 6), "2024-02-03T04:05:06"),
    "price": (decimal.Decimal("1.50"), 1.5),
    "count": (decimal.Decimal("2.00"), 2),
    "bytes": ("ü".encode(), "ü"),
    "turns": ([{"role": "user", "at": datetime.date(2024, 1, 1)}], None),
    "nothing": (None, None),
}


def test_types_that_json_has_not(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([{name: value for name, (value, _) in TYPES.items()}])
    pairs = pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    labels = pyarrow.array(["good"]).dictionary_encode()
    table = table.append_column("pairs", pairs).append_column("labels", labels)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    (row,) = read(str(tmp_path / "rows.parquet"))
    wanted = {name: value for name, (_, value) in TYPES.items()}
    wanted["turns"] = [{"role": "user", "at": "2024-01-01"}]
    assert row == {**wanted, "pairs": {"a": 1}, "labels": "good"}
    assert json.loads(json.dumps(row)) == row
    pictures = pyarrow.Table.from_pylist([{"a": b"ok"}, {"a": b"\x89PNG"}])
    pyarrow.parquet.write_table(pictures, tmp_path / "rows.parquet")
    good, bad = read(str(tmp_path / "rows.parquet"))
    assert good == {"a": "ok"} and "rows.parquet:2: column 'a' holds bytes" in str(bad)


# --------------------------------------------------------------------------- which files


def test_a_folder_is_read_with_the_folders_in_it(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.jsonl", "a/deep/y.jsonl.gz", "c.json"):
        content = line(name).encode()
        put(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    for name in ("README.md", "a/dataset_info.json", ".hidden.jsonl", ".git/x.jsonl", "_SUCCESS"):
        put(tmp_path / name)
    put(tmp_path / "run/config.yaml", "# rlhf-cli sft\n")
    put(tmp_path / "run/samples.jsonl")
    for name in ("notes.md", "a/picture.png"):
        put(tmp_path / name, b"\x89PNG")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "a/again").symlink_to(tmp_path)
    assert prompts(str(tmp_path)) == ["a/deep/y.jsonl.gz", "a/z.jsonl", "b.jsonl", "c.json"]
    unused = [str(file.relative_to(tmp_path)) for file in find(str(tmp_path)).unused]
    assert unused == ["a/picture.png", "notes.md", "run"]
    assert about_files(str(tmp_path), True) == [
        f"{tmp_path}: not read: a/picture.png, notes.md, run"
    ]


SPLITS = {
    "files": (["train.jsonl", "test.jsonl"], ["train.jsonl"], ["test.jsonl"]),
    "folders": (
        ["train/a.csv", "train/b.csv", "valid/a.csv"],
        ["train/a.csv", "train/b.csv"],
        None,
    ),
    "shards": (
        ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-0.jsonl"],
        ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
        ["data/test-0.jsonl"],
    ),
    "three": (["dev.jsonl", "test.jsonl", "train.jsonl"], ["train.jsonl"], ["dev.jsonl"]),
    "no name": (["rows.jsonl", "rows.eval.jsonl"], ["rows.jsonl"], ["rows.eval.jsonl"]),
    "others": (
        ["more.jsonl", "a_test.jsonl", "a_train.jsonl"],
        ["a_train.jsonl"],
        ["a_test.jsonl"],
    ),
    "train only": (["train.jsonl", "more.jsonl"], ["more.jsonl", "train.jsonl"], []),
    "test only": (["a/test.jsonl", "b/test.jsonl"], ["a/test.jsonl", "b/test.jsonl"], []),
    "words": (["latest.jsonl", "contrain.jsonl"], ["contrain.jsonl", "latest.jsonl"], []),
    "both in a name": (["train_test.jsonl", "x.jsonl"], ["train_test.jsonl", "x.jsonl"], []),
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_folder_with_splits(name: str, tmp_path: Path) -> None:
    there, train, held_out = SPLITS[name]
    for each in there:
        put(tmp_path / each, "prompt\na\n" if each.endswith("csv") else line(each))
    held_out = ["valid/a.csv"] if held_out is None else held_out

    def names(files: list[Path]) -> list[str]:
        return [str(file.relative_to(tmp_path)) for file in files]

    path = str(tmp_path)
    assert names(files_of(path)) == train
    assert names(held_out_files_of(path)) == held_out
    left = sorted({*there} - {*train} - {*held_out})
    assert names(find(path).unused) == left
    whole = [str(tmp_path / each) for each in held_out] or None
    assert held_out_of(path, None) == whole
    assert held_out_of(str(tmp_path / there[0]), path) == (whole or path)
    said = " ".join(about_files(path, False))
    assert all(Path(each).name in said for each in [*left, *held_out])


def test_patterns_lists_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("b.jsonl", "a.jsonl", "c[1].jsonl", "sub/d.jsonl", "sub/e/f.jsonl", "part-0"):
        put(tmp_path / name, line(name))
    put(tmp_path / "README.md")
    assert prompts("*.jsonl") == ["a.jsonl", "b.jsonl", "c[1].jsonl"]
    assert prompts("c[1].jsonl") == ["c[1].jsonl"]  # a file of that name before a pattern
    assert prompts("**/[d-f].jsonl") == ["sub/d.jsonl", "sub/e/f.jsonl"]
    assert prompts("s*") == prompts("sub") == prompts("~/sub/") == ["sub/d.jsonl", "sub/e/f.jsonl"]
    assert prompts("p*") == ["part-0"]
    assert prompts("~/a.jsonl") == ["a.jsonl"]
    assert prompts(["b.jsonl", "~/a.jsonl", "sub"])[:2] == ["b.jsonl", "a.jsonl"]
    assert len(prompts("[!c]*")) == 5  # what is known to be no data is passed over
    for wrong, why in {
        "x*.jsonl": "no file fits x",
        "x.jsonl": "no such file: x.jsonl",
        "~/x.jsonl": "no such file: ~/x.jsonl",
        "": "a path to rows is empty",
    }.items():
        with pytest.raises(UserError, match=why):
            read(wrong)
        if wrong:
            with pytest.raises(UserError, match=why):
                read(["a.jsonl", wrong])
    with pytest.raises(UserError, match="a path to rows is empty"):
        read([])


def test_no_file_is_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "a.jsonl", line("a"))
    put(tmp_path / "b.jsonl", line("b"))
    for paths in (["a.jsonl", "*.jsonl"], ["./a.jsonl", "a.jsonl"], ["a.jsonl", "."]):
        with pytest.raises(UserError, match="a.jsonl is named twice"):
            read(paths)
    (tmp_path / "c.jsonl").symlink_to("a.jsonl")
    with pytest.raises(UserError, match="a.jsonl and c.jsonl hold the same rows"):
        read(".")
    (tmp_path / "c.jsonl").unlink()
    put(tmp_path / "a.jsonl.gz", gzip.compress(line("a").encode()))
    with pytest.raises(UserError, match="a.jsonl and a.jsonl.gz hold the same rows"):
        read("*")


# --------------------------------------------------------------------------- elsewhere


def test_lines_of_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON objects are rows with all columns; other lines are prompts; each fault is its line's."""
    content = (
        b'\xef\xbb\xbf{"prompt": "a", "answer": 1}\r\nTell me {x}\n{x} is\n\n\xff\n{"prompt": "b\n'
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "ascii"))
    rows = list(read_raw("-"))
    assert [raw for raw, _ in rows[:3]] == [
        {"prompt": "a", "answer": 1},
        *({"prompt": prompt} for prompt in ("Tell me {x}", "{x} is")),
    ]
    assert str(rows[3][0]) == "stdin:5: not text in UTF-8"
    assert str(rows[4][0]).startswith("stdin:6: not JSON: ")
    assert [place for _, place in rows] == [f"stdin:{number}" for number in (1, 2, 3, 5, 6)]


def test_lines_of_windows_on_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own standard input does not translate them."""
    stream = io.TextIOWrapper(io.BytesIO(b"a b\r\nc \r\n"), newline="\n")
    monkeypatch.setattr(sys, "stdin", stream)
    assert [raw for raw, _ in read_raw("-")] == [{"prompt": "a b"}, {"prompt": "c "}]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("owner/name", ("owner/name", None, None, None)),
        ("owner/name:main", ("owner/name", None, "main", None)),
        ("owner/name:main:test", ("owner/name", None, "main", "test")),
        ("owner/name::train[:10%]", ("owner/name", None, None, "train[:10%]")),
        ("owner/name@refs/pr/1:main:test", ("owner/name", "refs/pr/1", "main", "test")),
    ],
)
def test_names_of_the_hub(name: str, parts: tuple[str | None, ...]) -> None:
    found = hub_name(name)
    assert found == HubName(*parts) and str(found) == name  # type: ignore[arg-type]


def test_what_is_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "here/rows.jsonl")
    assert hub_of("owner/name") and not is_local("owner/name")
    for local in (
        "here/name",
        "owner/rows.jsonl.gz",
        "./owner/name",
        "a/b/c",
        "rows",
        "runs/x",
    ):
        assert is_local(local)
    assert is_local(["owner/name"])
    assert not is_local("-")


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*words: Any, **more: Any) -> Any:
        asked.append((*words, more))
        return datasets.Dataset.from_list([*ROWS])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(read_raw("owner/name@v2:main:test", 2))
    assert rows == [(row, f"owner/name@v2:main:test:{i}") for i, row in enumerate(ROWS[:2], 1)]
    assert read("owner/name") == ROWS
    assert asked == [
        ("owner/name", "main", {"split": "test", "revision": "v2", "streaming": False}),
        ("owner/name", None, {"split": "train", "revision": None, "streaming": False}),
    ]


def test_a_dataset_of_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come from what the library gives as an iterable, and are the same."""

    def load(*names: Any, streaming: bool, **more: Any) -> Any:
        assert streaming
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [row for row, _ in read_raw("owner/name", streaming=True)] == ROWS


def test_keys_that_other_rows_have_are_not_there_as_null(tmp_path: Path) -> None:
    """Parquet has one type for all rows: within a column what is null was not given."""
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    other = {"role": "assistant", "tool_calls": [{"name": "g", "arguments": {"y": "b"}}]}
    rows = [{"messages": [call], "id": None}, {"messages": [other], "id": 2}]
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert read(str(file)) == rows


@pytest.mark.parametrize(
    ("path", "splits", "held_out"),
    [
        ("owner/name", ["train", "test"], "owner/name::test"),
        ("owner/name@v2:main", ["test", "train", "validation"], "owner/name@v2:main:validation"),
        ("owner/name", ["train"], None),
        ("owner/name::train", ["train", "test"], None),
    ],
)
def test_the_held_out_split_of_the_hub(
    path: str, splits: list[str], held_out: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *a, **b: splits)
    assert held_out_of(path, None) == held_out
    assert held_out_of(path, "other/name") == "other/name"


# --------------------------------------------------------------------------- any rows

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=5,
)


@settings(max_examples=30)
@given(
    rows=st.lists(st.dictionaries(st.just("prompt") | st.text(max_size=3), VALUES), min_size=2),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 30),
)
def test_any_rows_in_any_json(
    rows: list[Any], indent: int | None, ascii_only: bool, chunk: int, tmp_path_factory: Any
) -> None:
    """However they are written, and wherever a chunk ends."""
    file = tmp_path_factory.mktemp("any") / "rows.json"
    written = [json.dumps(row, indent=indent, ensure_ascii=ascii_only) for row in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf_cli.data.json_rows.CHUNK", chunk)
        for text in ("\n".join(written), "[" + ",\n".join(written) + "]", "\n\n\t".join(written)):
            file.write_text(text, encoding="utf-8")
            assert read(str(file)) == rows


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(KINDS)),
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), max_size=3),
    kept=st.none() | st.integers(1, 400),
)
def test_any_damage_is_one_line(
    name: str, flips: list[tuple[int, int]], kept: int | None, tmp_path_factory: Any
) -> None:
    content = bytearray(KINDS[name])
    for place, bits in flips:
        content[place % len(content)] ^= bits
    file = put(tmp_path_factory.mktemp("any") / name, bytes(content[:kept]))
    try:
        assert all(isinstance(raw, dict | RowError) for raw in read(str(file)))
    except UserError as error:
        assert name in str(error) and "\n" not in str(error)
