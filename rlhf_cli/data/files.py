"""Files and hub datasets as plain objects, one at a time, each with its place."""

import codecs
import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from rlhf_cli.config.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
ENCODING = "utf-8-sig"  # UTF-8, with or without the mark that some editors put first

STDIN = "-"  # as a path
ESCAPED = "surrogateescape"  # bytes that are not UTF-8 become half characters, which no UTF-8 has
OTHER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

Raw = dict[str, Any]

_stdin: dict[str, Any] = {}  # the stream that was read, and its lines


class RowError(UserError):
    """One row is unreadable, empty or misshapen; data.bad_rows says what to do about it."""


def read_raw(path: str | Path) -> Iterator[tuple[Raw | RowError, str]]:
    """Each row as a dict, with `file:line`, from a file, a folder of files, or a hub dataset.

    A row that cannot be read comes as its error, and those after it are read.
    """
    if str(path) == STDIN:
        for number, line in enumerate(stdin_lines(), 1):
            yield {"prompt": line.rstrip("\n")}, f"stdin:{number}"
        return
    place = Path(path)
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if file.suffix in SUFFIXES)
        files = [file for file in files if file.is_file() or file.is_dir()]  # a pipe never ends
        if not files:
            raise UserError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
        for file in files:
            yield from read_raw(file)
        return
    if not place.exists():
        yield from read_hub(str(path))
        return
    count = 0
    try:
        for raw, number in PARSERS.get(place.suffix, parse_jsonl)(place):
            if not isinstance(raw, dict | RowError):
                what = f"expected an object, got {type(raw).__name__}"
                raw = RowError(f"{place}:{number}: {what}")
            count += 1
            yield raw, f"{place}:{number}"
    except OSError as error:
        raise UserError(f"{place}: cannot be read: {error.strerror or error}") from None
    if not count:
        raise UserError(f"{place}: the file has no rows")


def stdin_lines() -> list[str]:
    """The lines of standard input, which is read once.

    Raises:
        UserError: it is closed, is not to be read, or is no text.
    """
    stream = sys.stdin
    if stream is None:
        raise UserError(f"data.path={STDIN}: standard input is closed; pipe the prompts in")
    if _stdin.get("stream") is not stream:
        try:
            lines = list(stream)
        except UnicodeDecodeError:
            raise UserError(f"data.path={STDIN}: standard input is no text in UTF-8") from None
        except (OSError, ValueError) as error:  # a folder, a file that is only written, closed
            fault = error.strerror if isinstance(error, OSError) else None
            raise UserError(
                f"data.path={STDIN}: standard input cannot be read: {fault or error}"
            ) from None
        _stdin.update(stream=stream, lines=lines)
    return list(_stdin["lines"])


def parse_jsonl(file: Path) -> Iterator[tuple[Any, int]]:
    """Objects, one a line; blank lines are passed over."""
    with text_of(file) as lines:
        for number, line in enumerate(lines, 1):
            if not is_unicode(line):
                yield RowError(f"{file}:{number}: not text in UTF-8"), number
            elif line.strip():
                try:
                    yield json.loads(line), number
                except (ValueError, RecursionError) as error:
                    yield RowError(f"{file}:{number}: not JSON: {error}"), number


def text_of(file: Path, newline: str | None = None) -> TextIO:
    """A file to read line by line, whatever is in one of them.

    Raises:
        UserError: it says itself that it is text in another encoding.
    """
    with file.open("rb") as start:
        if start.read(2) in OTHER_MARKS:
            raise UserError(f"{file}: not a text file in UTF-8")
    return file.open(encoding=ENCODING, errors=ESCAPED, newline=newline)


def is_unicode(text: str) -> bool:
    """Whether text is what UTF-8 can say, as what was escaped is not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_json(file: Path) -> Iterator[tuple[Any, int]]:
    """A list of objects; the number is the place in the list."""
    try:
        rows = json.loads(file.read_text(encoding=ENCODING))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON: {error}") from None
    if not isinstance(rows, list):
        raise UserError(f"{file}: expected a list of objects")
    yield from ((row, number) for number, row in enumerate(rows, 1))


class _Lines:
    """The lines of a file; `over` once somebody has asked for one after the last."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.over = stream, False

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        for line in self.stream:
            return line
        self.over = True
        raise StopIteration


def parse_csv(file: Path) -> Iterator[tuple[Any, int]]:
    """Rows under a header line; the number is that of the line where a row ends."""
    with text_of(file, newline="") as stream:
        lines = _Lines(stream)
        reader = csv.DictReader(lines)
        try:
            names = reader.fieldnames or ()
        except csv.Error as error:
            raise UserError(f"{file}: not CSV: {error}") from None
        if not all(map(is_unicode, names)):
            raise UserError(f"{file}: not CSV in UTF-8: the header is not")
        while True:
            row: Any
            try:
                row = next(reader, None)
            except csv.Error as error:
                row = RowError(f"{file}:{reader.line_num}: not CSV: {error}")
            if row is None:
                return
            if isinstance(row, dict):
                fault = "the file ends within a quoted cell" if lines.over else fault_of_cells(row)
                row = row if fault is None else RowError(f"{file}:{reader.line_num}: {fault}")
            yield row, reader.line_num


def fault_of_cells(row: Raw) -> str | None:
    """What keeps a row of text cells from being read; those beyond the header come as a list."""
    cells = [
        cell for value in row.values() for cell in (value if isinstance(value, list) else [value])
    ]
    return None if all(cell is None or is_unicode(cell) for cell in cells) else "not text in UTF-8"


def parse_parquet(file: Path) -> Iterator[tuple[Any, int]]:
    """Rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise UserError(f"{file}: not Parquet: {error}") from None
    yield from ((row, number) for number, row in enumerate(rows, 1))


PARSERS: dict[str, Callable[[Path], Iterator[tuple[Any, int]]]] = {
    ".jsonl": parse_jsonl,
    ".json": parse_json,
    ".csv": parse_csv,
    ".parquet": parse_parquet,
}


def read_hub(name: str) -> Iterator[tuple[Raw, str]]:
    """Rows of a hub dataset's train split; `owner/name:config:split` says more."""
    repo, _, rest = name.partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or Path(repo).suffix in SUFFIXES:
        raise UserError(f"no such file: {name}")
    from datasets import load_dataset

    config, _, split = rest.partition(":")
    try:
        dataset = load_dataset(repo, config or None, split=split or "train")
    except Exception as error:  # the library raises many kinds; each means that we have no rows
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"no file {name}, and no hub dataset of that name: {first}") from None
    for number, row in enumerate(dataset, 1):
        yield dict(row), f"{name}:{number}"


def files_of(path: Any) -> list[Path]:
    place = Path(path)
    if place.is_dir():
        return sorted(file for file in place.iterdir() if file.suffix in SUFFIXES)
    return [place]


def is_local(path: Any) -> bool:
    return Path(path).exists()


def held_out_files_of(path: Any) -> list[Path]:
    return []
