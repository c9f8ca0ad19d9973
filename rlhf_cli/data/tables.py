"""Rows of tables: CSV and TSV, Parquet and Arrow, some rows at a time."""

import csv
import datetime
import decimal
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TextIO

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.json_rows import OF_ROWS
from rlhf_cli.data.raw import NOT_UTF_8, Numbered, RowError, is_unicode

AT_A_TIME = 1000  # rows
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons"}
QUOTED = re.compile('"([^"]*)"')
EXCELS = re.compile(r'"?sep=(.)"?\r?\n?', re.IGNORECASE)  # its first line may say what separates


# --------------------------------------------------------------------------- text


def parse_csv(place: str, stream: TextIO, separator: str) -> Numbered:
    """Rows under a header line; the number is that of the line where a row ends.

    Args:
        place: the file, for messages.
        separator: what stands between cells, if the header has one of those.

    Raises:
        UserError: the header names no columns.
    """
    csv.field_size_limit(sys.maxsize)
    ahead = [stream.readline()]
    if told := EXCELS.fullmatch(ahead[0]):
        separator, ahead = told[1], ["\n"]  # a blank line, for the count of lines
    else:
        while ahead[-1] in ("\n", "\r\n"):
            ahead.append(stream.readline())
        separator = _separator_of(ahead[-1], separator)
    reader = csv.reader(chain(ahead, stream), delimiter=separator, strict=True)
    try:
        names = next((cells for cells in reader if cells), [])
    except csv.Error as error:
        raise UserError(f"{place}: not CSV: the header: {error}") from None
    if not all(map(is_unicode, names)):
        raise UserError(f"{place}: not CSV in UTF-8: the header is not")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{place}: the header names {twice!r} twice")
    while True:
        begins = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield _csv_error(error, place, begins, reader.line_num), reader.line_num
            continue
        if cells is None:
            return
        if cells:
            yield _row_of(names, cells, place, reader.line_num, separator), reader.line_num


def _separator_of(header: str, usual: str) -> str:
    """What splits the header into most columns that rows have, and then into most columns.

    The usual separator, where others are no better.
    """

    bare = QUOTED.sub(lambda cell: re.sub("[,;\t]", " ", cell[1]), header)

    def columns(separator: str) -> tuple[int, int]:
        names = bare.split(separator)
        return len(OF_ROWS.intersection(map(str.strip, names))), len(names)

    return max((usual, *SEPARATORS), key=columns)


def _row_of(names: list[str], cells: list[str], place: str, line: int, separator: str) -> Any:
    """A row by its columns: absent cells at its end are null."""
    if not all(map(is_unicode, cells)):
        return RowError(f"{place}:{line}: {NOT_UTF_8}")
    if len(cells) > len(names):
        return RowError(
            f"{place}:{line}: more cells than columns: {len(cells)}, and the header names "
            f"{len(names)}; a cell with {SEPARATORS.get(separator, separator)} in it needs quotes"
        )
    if cells == names:
        return RowError(f"{place}:{line}: the header once more")
    return dict(zip_longest(names, map(_with_line_ends, cells)))


def _with_line_ends(cell: str) -> str:
    """A cell whose lines end as they do elsewhere; spreadsheets write those of Windows."""
    return cell.replace("\r\n", "\n").replace("\r", "\n") if "\r" in cell else cell


def _csv_error(error: csv.Error, place: str, begins: int, line: int) -> RowError:
    """What is wrong with the quotes of a row, which may have swallowed those after it."""
    if str(error) == "unexpected end of data":
        return RowError(
            f"{place}:{line}: the file ends within a quoted cell: of the row of line {begins}"
        )
    rows = f"; the row begins on line {begins}" if begins < line else ""
    return RowError(f"{place}:{line}: not CSV: {error}{rows}")


# --------------------------------------------------------------------------- Arrow


def parse_parquet(file: Path) -> Numbered:
    """Rows of a Parquet file.

    Raises:
        UserError: it is none, or damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            yield from rows_of_batches(parquet.iter_batches(AT_A_TIME), str(file))
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise UserError(f"{file}: not Parquet: {first_line(error)}") from None


def parse_arrow(file: Path, stream: bool) -> Numbered:
    """Rows of an Arrow file, in the format for streams (as `datasets` writes it) or for files.

    Raises:
        UserError: it is none, or damaged.
    """
    import pyarrow

    try:
        with pyarrow.memory_map(str(file)) as source:
            yield from rows_of_batches(_batches(source, stream), str(file))
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise UserError(f"{file}: not Arrow: {first_line(error)}") from None


def _batches(source: Any, stream: bool) -> Iterator[Any]:
    """The record batches of an Arrow file, a part of each at a time."""
    import pyarrow

    if stream:
        batches: Iterable[Any] = pyarrow.ipc.open_stream(source)
    else:
        reader = pyarrow.ipc.open_file(source)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    for batch in batches:
        batch.validate(full=True)  # one of a damaged file may lead out of the memory it has
        yield from (batch.slice(at, AT_A_TIME) for at in range(0, batch.num_rows, AT_A_TIME))


def rows_of_batches(batches: Iterable[Any], place: str) -> Numbered:
    """Rows of Arrow tables or record batches, counted.

    Structs and maps are dicts, times text in ISO 8601, decimals numbers, bytes the text that they
    are in UTF-8.

    Raises:
        UserError: two columns have one name.
    """
    number, known, odd = 0, None, False
    for batch in batches:
        if batch.schema is not known:
            known, names = batch.schema, batch.schema.names
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise UserError(f"{place}: two columns are called {twice!r}")
            odd = not all(_is_plain(kind) for kind in known.types)
        for row in batch.to_pylist(maps_as_pydicts="strict"):
            number += 1
            yield (_plain_row(row, place, number) if odd else row), number


def _is_plain(kind: Any) -> bool:
    """Whether values of an Arrow type become those that JSON has."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        return False
    if types.is_nested(kind):
        return all(_is_plain(kind.field(i).type) for i in range(kind.num_fields))
    text = types.is_string(kind) or types.is_large_string(kind)
    number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    return text or number or types.is_null(kind)


def _plain_row(row: dict[str, Any], place: str, number: int) -> Any:
    """A row of values that JSON has, or its RowError."""
    for name, value in row.items():
        try:
            row[name] = _plain(value)
        except UnicodeDecodeError:
            return RowError(f"{place}:{number}: column {name!r} holds bytes that are no text")
    return row


def _plain(value: Any) -> Any:
    match value:
        case dict():
            # one type for all rows gives each the keys of the others, as null
            return {name: _plain(each) for name, each in value.items() if each is not None}
        case list():
            return [_plain(each) for each in value]
        case bytes():
            return value.decode()
        case datetime.date() | datetime.time():
            return value.isoformat()
        case decimal.Decimal():
            return int(value) if value == value.to_integral_value() else float(value)
        case None | bool() | int() | float():
            return value
    return str(value)


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
