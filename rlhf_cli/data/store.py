"""Tokenised rows in Arrow: written as they come, read one at a time, on disk where they are many.

A file is mapped into memory, so that millions of rows take the memory of the few that are in use.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from rlhf_cli.data.items import Answers, Encoded, Item, Lazy, Tokens
from rlhf_cli.data.kinds import Prompt, Row
from rlhf_cli.data.sources import Source

Made = TypeVar("Made")

BATCH = 1024  # items that are written at once
_JSON = json.JSONEncoder(default=str, ensure_ascii=False, check_circular=False)
SCHEMA = pa.schema(
    {
        "prompt": pa.list_(pa.int32()),
        "responses": pa.list_(pa.list_(pa.int32())),
        "loss": pa.list_(pa.bool_()),  # empty where all response tokens carry loss
        "ends": pa.list_(pa.int32()),
        "row": pa.string(),  # JSON; of sequences their source alone
    }
)


class TokenWriter:
    """Takes encoded items in turn; `table` has them all once the writer is left."""

    def __init__(self, file: Path | None, kind: type) -> None:
        """`file`: where to write; None keeps everything in memory."""
        self._file, self._kind = file, kind
        self._sink = pa.BufferOutputStream() if file is None else pa.OSFile(str(file), "wb")
        self._writer = pa.ipc.new_stream(self._sink, SCHEMA)
        self._columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._flush()
        self._writer.close()
        self._sink.close()

    def extend(self, items: Sequence[Encoded]) -> None:
        """Add items of the writer's kind."""
        prompt, responses, loss, ends, row = self._columns.values()
        for item in items:
            if isinstance(item, Tokens):
                prompt.append(item.prompt)
                responses.append([item.response])
                loss.append(item.loss or [])
                ends.append([])
                row.append(item.source)
            elif isinstance(item, Answers):
                prompt.append(item.prompt)
                responses.append(item.responses)
                loss.append([])
                ends.append(item.ends)
                row.append(written(item.row))
            else:
                prompt.append(item[1])
                responses.append([])
                loss.append([])
                ends.append([])
                row.append(written(item[0]))
            if len(prompt) == BATCH:
                self._flush()
                prompt, responses, loss, ends, row = self._columns.values()

    def _flush(self) -> None:
        if self._columns["prompt"]:
            prompt, responses, loss, ends, row = self._columns.values()
            columns = [lists(prompt), nested(responses), masks(loss), lists(ends), strings(row)]
            self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
            self._columns = {name: [] for name in SCHEMA.names}

    def table(self) -> "TokenTable":
        """What was written."""
        if self._file is not None:
            return TokenTable.of(self._file, self._kind)
        return TokenTable(pa.ipc.open_stream(self._sink.getvalue()).read_all(), self._kind)


# Numbers go to Arrow and come back as memory: what pyarrow makes of lists takes several times
# as long, and its own ways to and from numpy import pandas, in tenths of a second.


def lists(values: Sequence[list[int]]) -> pa.ListArray:
    """Lists of ids."""
    flat = np.fromiter(chain.from_iterable(values), np.int32)
    return pa.ListArray.from_arrays(offsets_of(values), integers(flat))


def nested(values: Sequence[list[list[int]]]) -> pa.ListArray:
    """Lists of lists of ids."""
    inner = list(chain.from_iterable(values))
    return pa.ListArray.from_arrays(offsets_of(values), lists(inner))


def masks(values: Sequence[list[bool]]) -> pa.ListArray:
    """Lists of truth values."""
    flat = np.fromiter(chain.from_iterable(values), np.bool_)
    bits = pa.py_buffer(np.packbits(flat, bitorder="little"))
    known = pa.Array.from_buffers(pa.bool_(), len(flat), [None, bits])
    return pa.ListArray.from_arrays(offsets_of(values), known)


def strings(values: Sequence[str]) -> pa.StringArray:
    """Texts."""
    texts = [value.encode() for value in values]
    return pa.StringArray.from_buffers(
        len(texts), offsets_of(texts).buffers()[1], pa.py_buffer(b"".join(texts))
    )


def offsets_of(values: Sequence[Any]) -> pa.Array:
    """Where each value begins among all, and where the last ends."""
    return integers(np.cumsum([0, *map(len, values)], dtype=np.int32))


def integers(values: Any) -> pa.Array:
    """(N,) int32 of numpy as an array of Arrow."""
    return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])


def numbers(values: pa.Array) -> Any:
    """An int32 array of Arrow as (N,) of numpy."""
    if not len(values):  # it may have no memory
        return np.empty(0, np.int32)
    return np.frombuffer(values.buffers()[1], np.int32, len(values), 4 * values.offset)


@dataclass
class _Batch:
    """The columns of a record batch as flat values with offsets."""

    prompt: tuple[Any, Any]
    groups: Any  # offsets of the responses of each item
    responses: tuple[Any, Any]
    loss: tuple[Any, Any]
    ends: tuple[Any, Any]
    rows: pa.StringArray


class TokenTable(Lazy[Encoded]):
    """The items of a TokenWriter, each made anew whenever it is asked for."""

    def __init__(self, table: pa.Table, kind: type) -> None:
        self._kind, self._length = kind, len(table)
        self._batches = []
        for batch in table.to_batches():
            prompt, responses, loss, ends, rows = batch.columns
            inner = responses.values
            self._batches.append(
                _Batch(
                    flat(prompt),
                    numbers(responses.offsets),
                    flat(inner),
                    (numbers(loss.offsets), loss.values),
                    flat(ends),
                    rows,
                )
            )
        self._size = len(table.to_batches()[0]) if self._batches else 1  # of all but the last

    @classmethod
    def of(cls, file: Path, kind: type) -> "TokenTable":
        """Of a file that a writer has finished.

        Raises:
            pyarrow.ArrowException: it is damaged.
        """
        return cls(pa.ipc.open_stream(pa.memory_map(str(file))).read_all(), kind)

    def __len__(self) -> int:
        return self._length

    def at(self, place: int) -> Encoded:
        """The item at a place from 0."""
        number, i = divmod(place, self._size)
        batch = self._batches[number]
        prompt, text = part(batch.prompt, i), batch.rows[i].as_py()
        if self._kind is Prompt:
            return read(text, Prompt), prompt
        responses = [
            part(batch.responses, j) for j in range(int(batch.groups[i]), int(batch.groups[i + 1]))
        ]
        if self._kind is Tokens:
            offsets, values = batch.loss
            loss = values[int(offsets[i]) : int(offsets[i + 1])].to_pylist()
            return Tokens(prompt, responses[0], text, loss or None)
        return Answers(prompt, responses, read(text, self._kind), part(batch.ends, i))


def flat(column: pa.ListArray) -> tuple[Any, Any]:
    """Offsets and values of lists of numbers."""
    return numbers(column.offsets), numbers(column.values)


def part(column: tuple[Any, Any], i: int) -> list[int]:
    """The i-th list of a flat column."""
    offsets, values = column
    ids: list[int] = values[offsets[i] : offsets[i + 1]].tolist()
    return ids


def written(row: Row) -> str:
    """A row as JSON; what JSON does not know stands there as its text."""
    return _JSON.encode(vars(row))


def read(text: str, kind: type) -> Any:
    """The row that `written` wrote."""
    return kind(**json.loads(text))


@dataclass
class Items(Lazy[Item], Generic[Item]):
    """Some items of a table, in an order of their own.

    places: (N,) int64, where they stand in the table.
    prompts: (N,) uint64, equal where two items have one prompt.
    parts: (N,) uint16, which of `sources` each is of.
    sources: the sources in the order of data.
    """

    table: Sequence[Any]
    places: Any
    prompts: Any
    parts: Any
    sources: list[Source]

    @classmethod
    def none(cls) -> "Items[Any]":
        """No items of no source."""
        nothing = np.empty(0, np.int64)
        return cls([], nothing, nothing, nothing, [])

    def __len__(self) -> int:
        return len(self.places)

    def at(self, place: int) -> Item:
        """The item at a place from 0."""
        item: Item = self.table[int(self.places[place])]
        return item


@dataclass
class Mapped(Lazy[Made], Generic[Item, Made]):
    """What a function makes of each item, made anew whenever it is asked for."""

    items: Sequence[Item]
    make: Callable[[Item], Made]

    def __len__(self) -> int:
        return len(self.items)

    def at(self, place: int) -> Made:
        """What is made of the item at a place from 0."""
        return self.make(self.items[place])


@dataclass
class Joined(Lazy[Item], Generic[Item]):
    """The items of two sequences, one after the other."""

    first: Sequence[Item]
    second: Sequence[Item]

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def at(self, place: int) -> Item:
        """The item at a place from 0."""
        count = len(self.first)
        return self.first[place] if place < count else self.second[place - count]


def by_source(items: Items[Any], made: Sequence[Made]) -> dict[str, list[Made]]:
    """What was made of each item, by the source of the item; nothing where there is one source."""
    if len(items.sources) < 2:
        return {}
    parts: dict[str, list[Made]] = {}
    for place, each in enumerate(made):
        parts.setdefault(items.sources[int(items.parts[place])].name, []).append(each)
    return parts


def parts_of(item: Any) -> tuple[list[int], list[list[int]]]:
    """The prompt and the responses of an item of any kind; a prompt alone has none."""
    if isinstance(item, Tokens | Answers):
        return item.prompt, item.responses
    return item[1], []


def prompts_of(items: Sequence[Answers]) -> Sequence[int]:
    """(N,) numbers that are equal where two items have one prompt."""
    if isinstance(items, Items):
        prompts: Sequence[int] = items.prompts
        return prompts
    return [hash(tuple(item.prompt)) for item in items]
