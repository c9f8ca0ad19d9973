"""Columns: mapped, nested, null, unread; and thumbs as people write them."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.columns import unused_columns, unused_note
from rlhf_cli.data.kinds import Demonstration, Feedback, Preference, Prompt, Row, Text
from rlhf_cli.data.labels import note
from rlhf_cli.data.reading import Walk
from rlhf_cli.data.shapes.formats import reader_of
from rlhf_cli.data.sources import Source
from tests.toys import data_of

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def read(row: dict[str, Any], **columns: str) -> Row:
    return reader_of(data_of(columns=columns))(row, "f:1")


MAPPED: list[tuple[dict[str, Any], dict[str, str], Row, dict[str, Any]]] = [
    # row, data.columns, what it is, its other columns
    (
        {"title": "t", "text": "x"},
        {"prompt": "title", "completion": "text"},
        Demonstration("t", "x"),
        {},
    ),
    ({"text": "x", "n": 1}, {"prompt": "text"}, Prompt("x"), {"n": 1}),
    ({"title": "t", "text": "x"}, {"prompt": "title"}, Prompt("t"), {"text": "x"}),
    ({"prompt": "old", "title": "t"}, {"prompt": "title"}, Prompt("t"), {}),
    ({"messages": TALK[:1]}, {"prompt": "messages"}, Prompt(TALK[:1]), {}),
    (
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"completion": "chosen"},
        Demonstration("p", "a"),
        {"rejected": "b"},
    ),
    (
        {"prompt": "p", "a": "a", "b": "b", "messages": TALK},
        {"chosen": "a", "rejected": "b"},
        Preference("p", "a", "b"),
        {"messages": TALK},
    ),
    (
        {"prompt": "a", "completion": "b"},
        {"prompt": "completion", "completion": "prompt"},
        Demonstration("b", "a"),
        {},
    ),
    (
        {"prompt": "id 7", "messages": TALK},
        {"messages": "messages"},
        Demonstration(TALK[:1], "hello"),
        {"prompt": "id 7"},
    ),
    # paths
    (
        {"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}]},
        {"prompt": "info.post", "chosen": "summaries.1.text", "rejected": "summaries.0.text"},
        Preference("p", "b", "a"),
        {"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}]},
    ),
    ({"a.b": "p", "a": {"b": "q"}}, {"prompt": "a.b"}, Prompt("p"), {"a": {"b": "q"}}),
    ({"meta": '{"q": ["p"]}'}, {"prompt": "meta.q.0"}, Prompt("p"), {"meta": '{"q": ["p"]}'}),
    (
        {"messages": TALK},
        {"prompt": "messages.0.content", "completion": "messages.1.content"},
        Demonstration("hi", "hello"),
        {"messages": TALK},
    ),
    # a name of the user's own, for rules
    (
        {"prompt": "p", "reward_model": {"ground_truth": "7"}},
        {"answer": "reward_model.ground_truth"},
        Prompt("p"),
        {"answer": "7", "reward_model": {"ground_truth": "7"}},
    ),
    ({"prompt": "p", "x": {"y": None}}, {"answer": "x.y.z"}, Prompt("p"), {"x": {"y": None}}),
    ({"prompt": "p", "sys": None}, {"system": "sys"}, Prompt("p"), {}),
]


@pytest.mark.parametrize(("row", "columns", "expected", "beside"), MAPPED)
def test_a_mapping_wins(
    row: dict[str, Any], columns: dict[str, str], expected: Row, beside: dict[str, Any]
) -> None:
    found = read(row, **columns)
    assert found.columns == beside
    found.columns, expected.columns, found.source = {}, {}, ""
    assert getattr(expected, "learn_from", 0) in (0, getattr(found, "learn_from", 0))
    assert found == expected


SLIPS: list[tuple[dict[str, Any], dict[str, str], str]] = [
    (
        {"title": "t"},
        {"prompt": "titel"},
        "f:1: no column 'titel'; found title; did you mean title?",
    ),
    (
        {"info": {"post": "p"}},
        {"prompt": "info.pots"},
        "f:1: no key 'pots' in column 'info', for 'info.pots'; found post; did you mean post?",
    ),
    (
        {"info": {}},
        {"prompt": "inf.post"},
        "no column 'inf', for 'inf.post'; found info; did you mean",
    ),
    ({"s": [1]}, {"prompt": "s.3"}, "f:1: column 's' holds 1 values, without '3', for 's.3'"),
    ({"s": "x"}, {"prompt": "s.text"}, "column 's' holds str, without 'text', for 's.text'"),
    (
        {"title": "t"},
        {"promt": "title"},
        "data.columns.promt: data=rows reads no such column; did you mean data.columns.prompt?",
    ),
    ({"a": 1}, {"response": "a"}, "did you mean data.columns.responses?"),
]


@pytest.mark.parametrize(("row", "columns", "line"), SLIPS)
def test_a_slip_in_a_mapping(row: dict[str, Any], columns: dict[str, str], line: str) -> None:
    with pytest.raises(UserError) as caught:
        read(row, **columns)
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "completion": "c", "text": None}, Demonstration("p", "c")),
        ({"prompt": "p", "completion": "c", "messages": None}, Demonstration("p", "c")),
        (
            {"prompt": "p", "completion": "c", "label": False, "chosen": None, "rejected": None},
            Feedback("p", "c", False),
        ),
        (
            {"prompt": None, "chosen": TALK, "rejected": [TALK[0], {**TALK[1], "content": "no"}]},
            Preference(TALK[:1], "hello", "no"),
        ),
        ({"prompt": "p", "completion": "c", "text": "p c"}, Demonstration("p", "c")),
        # the empty cells of a CSV of mixed rows, and pandas' NaN
        (
            {"prompt": "p", "completion": "", "chosen": "a", "rejected": "b"},
            Preference("p", "a", "b"),
        ),
        ({"prompt": "", "text": "t", "chosen": ""}, Text("t")),
        ({"prompt": "p", "completion": "c", "label": "", "score": ""}, Demonstration("p", "c")),
        ({"prompt": "p", "completion": "c", "label": float("nan")}, Demonstration("p", "c")),
    ],
)
def test_a_null_column_is_not_there(row: dict[str, Any], expected: Row) -> None:
    found = read(row)
    found.columns, found.source = {}, ""
    assert found == expected


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"prompt": "p", "completion": ""}, "column 'completion' is empty"),
        ({"prompt": "p", "chosen": "a", "rejected": ""}, "column 'rejected' is empty"),
        ({"prompt": "", "completion": "c"}, "column 'prompt' is empty"),
        ({"prompt": None, "completion": "c"}, "no column 'prompt'; found completion"),
    ],
)
def test_what_is_empty_is_said(row: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        read(row)


GOOD = [True, 1, 1.0, "1.0", "1.00", "True", " yes", "GOOD", "thumbs up", "correct", "chosen", "+1"]
BAD = [False, 0, 0.0, "0.0", -1, -1.0, "-1", "no", "Bad", "thumbs_down", "rejected", "negative"]


@pytest.mark.parametrize("label", [*GOOD, *BAD])
def test_a_label(label: Any) -> None:
    found = read({"prompt": "p", "completion": "c", "label": label})
    assert isinstance(found, Feedback)
    assert found.label is (label in GOOD and not (isinstance(label, int) and label in (0, -1)))


@pytest.mark.parametrize("label", [2, 0.5, "maybe", "", [1], {"a": 1}, "2", -2, "1e999"])
def test_what_is_no_label_is_refused(label: Any) -> None:
    row = {"prompt": "p", "completion": "c", "label": label}
    if label == "":
        assert isinstance(read(row), Demonstration)
        return
    with pytest.raises(
        UserError, match=r"f:1: column 'label' holds .*, expected true or false, yes"
    ):
        read(row)


def test_labels_are_told_as_one_map() -> None:
    labels = ["0.0", "1.0", "0.0", None, "yes", "Yes"]
    rows = [read({"prompt": "p", "completion": "c", "label": label}) for label in labels]
    counts = Counter(row.spelling for row in rows if isinstance(row, Feedback))
    assert note(counts) == "labels: 1.0 (1) and yes (2) as good, 0.0 (2) as bad"
    assert note(Counter({"-1": 3, "": 4})) == "labels: -1 (3) as bad"
    with pytest.raises(UserError, match="holds -1, and 0 in 2 rows: 0 is bad beside 1 alone"):
        note(Counter({"-1": 1, "0": 2, "1": 5}))


def test_scores_alone_have_no_line_of_labels(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "p", "completion": "c", "score": 3}\n')
    walk = Walk(Source(str(file), "rows"), Feedback, data_of())
    assert len(list(walk)) == 1
    assert not any("labels" in line for line in walk.notes())


def test_a_bad_row_is_told_how_to_leave_it_out(tmp_path: Path) -> None:
    """But not a column that no row may have."""
    file = tmp_path / "rows.jsonl"
    for row, line in (
        ('{"prompt": "p", "completion": ""}', "is empty; data.bad_rows=drop leaves such rows out"),
        ('{"a": "p"}', "no column 'prompt'; found a"),
    ):
        file.write_text(row)
        with pytest.raises(UserError) as caught:
            list(Walk(Source(str(file), "rows"), Demonstration, data_of()))
        assert str(caught.value).endswith(line)


def test_columns_that_nothing_reads_are_counted() -> None:
    rows = [read({"prompt": "p", "id": n, "tools": [], "system": "s"}) for n in range(3)]
    rows.append(read({"prompt": "p", "chosen": "a", "rejected": "b", "id": 3, "label": "x"}))
    rows.append(read({"text": "t", "meta": {}}))
    columns = Counter(name for row in rows for name in row.columns)
    counts = unused_columns(columns, data_of())
    named = data_of(template="{id} {prompt}", columns={"answer": "meta.truth"})
    assert unused_columns(columns, named) == {"label": 1}
    assert counts == {"id": 4, "label": 1, "meta": 1}
    assert unused_note(counts, 4) == (
        "columns not read unless a reward or template names them: id, label (1 rows), meta (1 rows)"
    )
