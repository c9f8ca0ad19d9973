"""Whatever a file of rows holds, it is read or refused in one line."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.stages import Run
from rlhf_cli.data.held_out import identity
from rlhf_cli.data.kinds import Demonstration, Prompt, Text, row_kind
from rlhf_cli.data.rows import Rows, read_split
from rlhf_cli.data.shapes.formats import reader_of
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.rewards.rules import rule_of
from rlhf_cli.runs.data_checks import check_rows
from tests.toys import bpe, composed, data_of

ANY = settings(
    deadline=timedelta(seconds=5),  # an example that hangs fails
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FEW, MANY = 60, 150

USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "demonstration": [{"prompt": "p", "completion": "c"}, {"messages": [USER, REPLY]}],
    "text": [{"text": "t"}],
    "prompt": [{"prompt": "p", "answer": "7"}, {"prompt": [USER], "answer": 7}],
    "preference": [
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1.5, "source": "s"},
        {"chosen": [USER, REPLY], "rejected": [USER, {**REPLY, "content": "no"}]},
    ],
    "ranking": [
        {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 2, 2]},
        {"prompt": "p", "responses": ["a", "b"], "scores": [0.5, -1]},
    ],
    "feedback": [
        {"prompt": "p", "completion": "c", "label": True, "score": 2},
        {"prompt": "p", "completion": "d", "label": "false"},
    ],
    "steps": [{"prompt": "p", "steps": ["a", "b"], "labels": [1, 0.5]}],
    "hh": [{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}],
    "gsm8k": [{"question": "q", "answer": "so\n#### 4"}],
    "gsm8k_solutions": [{"question": "q", "m": {"solution": "a", "is_correct": True}}],
}
STAGES: dict[str, tuple[str, ...]] = {
    "demonstration": ("sft", "model.context=1024"),
    "text": ("sft", "model.context=1024"),
    "prompt": ("grpo", "reward=numeric_answer:0.1"),
    "preference": ("reward", "algo.row_margin=true"),
    "ranking": ("reward", "algo=kwise"),
    "feedback": ("dpo", "algo=kto"),
    "steps": ("reward", "algo=process"),
    "hh": ("dpo",),
    "gsm8k": ("grpo",),
    "gsm8k_solutions": ("reward", "algo=pointwise"),
}
FORMATS = {"hh", "gsm8k", "gsm8k_solutions"}

TEXT = st.text(st.characters(), max_size=8) | st.sampled_from(
    ["\ud800", "\0", "nan", "1e999", "[" * 2000, "﷽", "\u2028", "[NaN]", "[[1], 2]", '["a", 3]']
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**30, -(10**400), 2**63, -1, 0])
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            TEXT | st.sampled_from(["role", "content", "solution"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, rows: list[dict[str, Any]]) -> list[Any]:
    """Good rows with a few changes: another value somewhere, a key gone, a row of another shape."""
    made: list[Any] = json.loads(json.dumps([draw(st.sampled_from(rows)) for _ in range(4)]))
    for number, row in enumerate(made[:3]):
        row |= {"prompt": f"p{number}"} if isinstance(row.get("prompt"), str) else {}
        for _ in range(draw(st.integers(0, 2))):
            spot: Any = row
            while isinstance(spot, dict | list) and spot:
                key = draw(
                    st.sampled_from(list(spot) if isinstance(spot, dict) else [*range(len(spot))])
                )
                if isinstance(spot[key], dict | list) and spot[key] and draw(st.booleans()):
                    spot = spot[key]
                    continue
                if isinstance(spot, dict) and draw(st.integers(0, 3)) == 0:
                    del spot[key]
                else:
                    spot[key] = draw(VALUES)
                break
    if draw(st.integers(0, 5)) == 0:
        made[1] = draw(VALUES)
    return made


ANSWER = {"response": "a", "overall_score": 3, "fine-grained_score": 2.5}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CALLS: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0}
STEP = {
    "completions": [{"text": "s", "rating": -1}, {"text": "t", "rating": 1}],
    "human_completion": None,
    "chosen_completion": 1,
}
SAID = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
PUBLISHED: dict[str, list[dict[str, Any]]] = {
    "rows": [
        *(row for name in ROWS if name not in FORMATS for row in ROWS[name]),
        {"messages": [USER, CALLS, {"role": "tool", "content": "x", "name": "f"}, REPLY]},
        {"prompt": "hi", "completion": [USER, REPLY], "system": "s", "tools": [CALL], "weight": 1},
        {"prompt": [USER], "chosen": REPLY, "rejected": [{**REPLY, "content": ["n", "o"]}]},
    ],
    "alpaca": [{"instruction": "i", "input": "j", "output": "o", "history": [["q", "a"]]}],
    "sharegpt": [
        {"conversations": SAID, "system": "s", "tools": "[]"},
        {"conversations": SAID[:1], "chosen": SAID[1], "rejected": SAID[1]},
    ],
    "messages": [{"messages": [USER, REPLY], "label": 1}],
    "ultrafeedback": [
        {"instruction": "i", "completions": [ANSWER, ANSWER]},
        {
            "chosen": [USER, REPLY],
            "rejected": [USER, REPLY],
            "score_chosen": 2,
            "score_rejected": 1,
        },
    ],
    "helpsteer": [
        {"prompt": "p", "response": "r", "helpfulness": 3},
        {"context": [USER], "response1": "a", "response2": "b", "overall_preference": -2},
    ],
    "kto": [{"prompt": [USER], "completion": [REPLY], "label": False}],
    "prm800k": [
        {"question": {"problem": "q"}, "label": {"steps": [STEP, STEP], "finish_reason": "x"}},
        {"prompt": "p", "completions": ["a"], "labels": [True]},
        {"input": "q Step 1: a \u043a\u0438", "label": "q Step 1: a +", "task": "t"},
    ],
    "tldr": [{"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}],
    "stack_exchange": [{"question": "q", "answers": [{"text": "a", "pm_score": 1}] * 2}],
    "verl": [{"prompt": [USER], "reward_model": {"ground_truth": "7"}, "data_source": "s"}],
    "text": [{"text": "t"}],
}


def as_jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_csv(rows: list[Any]) -> str:
    rows = [row for row in rows if isinstance(row, dict)]
    stream = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(stream, names)
    writer.writeheader()
    for row in rows:
        cells = {
            name: json.dumps(value) if isinstance(value, dict | list) else value
            for name, value in row.items()
        }
        writer.writerow(cells)
    return stream.getvalue()


WRITERS: dict[str, Callable[[list[Any]], str]] = {
    "jsonl": as_jsonl,
    "json": json.dumps,
    "csv": as_csv,
}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One for all examples."""
    return bpe(chat=True)


def used_or_refused(name: str, file: Path, **data: Any) -> None:
    """Read, check, encode and judge the rows of a file as a stage does."""
    stage, *words = STAGES[name]
    cfg: Run = composed(stage, "data=jsonl", "data.path=x", *words)
    shape = name if name in FORMATS else "rows"
    join = "" if name == "gsm8k_solutions" else "\n"
    limits = {"long_prompts": "cut", "eval_rows": 1, "step_join": join}
    cfg = replace(cfg, data=data_of(path=str(file), format=shape, **{**limits, **data}))
    try:
        check_rows(cfg, Rows(cfg.data))
        kind = Text if name == "text" else row_kind(cfg)
        rows = read_split(cfg.data, kind).train
        encoder = Encoder(tokenizer(), cfg.data)
        if kind is Prompt:
            encoder.prompts(rows)
            rule = rule_of("exact_answer")
            assert rule is not None
            for row in rows:
                rule.score(row, "#### 7")
        elif kind in (Demonstration, Text):
            encoder.demonstrations(rows)
        else:
            encoder.answers(rows)
    except UserError as error:
        assert str(file.name) in str(error)


def check_bytes(name: str, suffix: str, content: bytes, folder: Path) -> None:
    file = folder / f"rows.{suffix}"
    file.write_bytes(content)
    used_or_refused(name, file)
    used_or_refused(name, file, bad_rows="drop")


def check_changed(name: str, data: st.DataObject, folder: Path) -> None:
    rows = data.draw(changed(ROWS[name]))
    for suffix, written in WRITERS.items():
        content = written(rows).encode(errors="surrogatepass")
        check_bytes(name, suffix, content, folder)


def check_flipped(flips: list[tuple[int, int]], folder: Path) -> None:
    rows = [{"prompt": f"p{i}", "completion": "c" * i, "label": i % 2} for i in range(50)]
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    content = bytearray(stream.getvalue())
    for place, bits in flips:
        content[place % len(content)] ^= bits
    check_bytes("feedback", "parquet", bytes(content), folder)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
@settings(ANY, max_examples=FEW)
@given(content=st.binary(max_size=200))
@example(content='{"prompt": "ä"}\n'.encode("utf-16"))
@example(content=b'{"prompt": "a\\u0000", "completion": "b"}\n' * 3)
@example(content=b"\0" * 100)
@example(content=b"[" * 100_000)
def test_any_bytes(suffix: str, content: bytes, tmp_path: Path) -> None:
    check_bytes("demonstration", suffix, content, tmp_path)


@settings(ANY, max_examples=FEW)
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), max_size=3))
@example(flips=[])
def test_flipped_parquet(flips: list[tuple[int, int]], tmp_path: Path) -> None:
    check_flipped(flips, tmp_path)


@pytest.mark.parametrize("name", ROWS)
@settings(ANY, max_examples=FEW)
@given(data=st.data())
@pytest.mark.slow
def test_changed_rows(name: str, data: st.DataObject, tmp_path: Path) -> None:
    check_changed(name, data, tmp_path)


@pytest.mark.parametrize("name", PUBLISHED)
@settings(ANY, max_examples=FEW)
@given(data=st.data())
def test_changed_rows_of_published_shapes(name: str, data: st.DataObject) -> None:
    """Each alone, as JSON and as cells of a table, with and without a mapping."""
    read = reader_of(data_of(format=name))
    mapped = reader_of(data_of(format=name, columns={"answer": "prompt", "extra": "info.post"}))
    for row in data.draw(changed(PUBLISHED[name])):
        if not isinstance(row, dict):
            continue
        for cells in (
            row,
            {key: json.dumps(v) if isinstance(v, dict | list) else v for key, v in row.items()},
        ):
            for reader in (read, mapped):
                try:
                    identity(reader(cells, "f:1"))
                except UserError as error:
                    assert str(error).startswith("f:1: ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
@settings(ANY, max_examples=MANY)
@given(data=st.data())
def test_many_changed_rows(name: str, data: st.DataObject, tmp_path: Path) -> None:
    check_changed(name, data, tmp_path)
