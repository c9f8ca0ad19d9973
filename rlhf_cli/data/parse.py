"""The rows of one file, whatever it is called: its first bytes say what it holds."""

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.json_rows import parse_json
from rlhf_cli.data.raw import ESCAPED, Numbered, Raw, RowError
from rlhf_cli.data.tables import first_line, parse_arrow, parse_csv, parse_parquet

PACKED = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}  # how such files begin
JSON = (".jsonl", ".json", ".ndjson")
TABLES = {".csv": ",", ".tsv": "\t"}
BINARY = {b"PAR1": "Parquet", b"ARROW1": "Arrow", b"\xff\xff\xff\xff": "Arrow stream"}
SUFFIXES = (*JSON, *TABLES, ".parquet", ".arrow")
READ = "JSON, CSV, TSV, Parquet nor Arrow; as text it needs one of their suffixes"

# What is taken for data now and then, by how it begins.
FOREIGN = {
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or export it as CSV",
    b"\xd0\xcf\x11\xe0": "a spreadsheet or document: export it as CSV",
    b"BZh": "packed by bzip2: unpack it",
    b"\xfd7zXZ": "packed by xz: unpack it",
    b"SQLite format 3": "a database: export its table as CSV",
    b"FEA1": "Feather of version 1: write it as Parquet",
    b"version https://git-lfs": "a pointer of Git LFS, not the file: run `git lfs pull`",
    b"<!DOCTYPE": "a web page, not the file: download it again",
    b"<html": "a web page, not the file: download it again",
}
OTHER_TEXT = {
    codecs.BOM_UTF32_LE: "UTF-32",  # begins as UTF-16 does
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
ENCODING = "utf-8-sig"  # UTF-8, with or without the mark that some editors put first
JSON_IN_TABLE = re.compile(r"\{|\[\s*\{")  # under the name of a table
HEAD = 1 << 12  # bytes
TAR = slice(257, 262)


@dataclass(frozen=True)
class Content:
    """What a file holds: `kind` is JSON, CSV, Parquet, Arrow or Arrow stream.

    separator: of the cells of CSV; of JSON the first character.
    """

    kind: str
    first: str = ""


def rows_of_file(file: Path) -> Iterator[tuple[Raw | RowError, str]]:
    """Each row of a file with its place, as `file:line`; a row that cannot be read as its error.

    Raises:
        UserError: the file is not one of rows, is damaged, or has none.
    """
    place = str(file)
    count = 0
    try:
        for raw, number in _parsed(file):
            if not isinstance(raw, dict | RowError):
                what = f"expected an object, got {type(raw).__name__}"
                raw = RowError(f"{place}:{number}: {what}")
            count += 1
            yield raw, f"{place}:{number}"
    except (EOFError, zlib.error, OSError) as error:
        raise _unreadable(file, error) from None
    if not count:
        raise UserError(f"{place}: the file has no rows")


def check_content(file: Path) -> None:
    """A file holds something that is read, as far as its beginning tells.

    Raises:
        UserError: what it is instead.
    """
    try:
        content_of(file)
    except (EOFError, zlib.error, OSError) as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> UserError:
    """What the system or an unpacker says of a file."""
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"{file}: cannot be read: {error.strerror}")
    return UserError(f"{file}: cut or damaged: {first_line(error)}")


def _parsed(file: Path) -> Numbered:
    content = content_of(file)
    place = str(file)
    match content.kind:
        case "Parquet":
            yield from parse_parquet(file)
        case "Arrow" | "Arrow stream":
            yield from parse_arrow(file, content.kind == "Arrow stream")
        case "CSV":
            with opened(file, newline="") as stream:
                yield from parse_csv(place, stream, content.first)
        case _:
            with opened(file) as stream:
                yield from parse_json(place, stream, content.first)


def content_of(file: Path) -> Content:
    """What a file holds, by its beginning and, where that does not tell, by its name.

    Raises:
        UserError: nothing that is read.
    """
    with file.open("rb") as stream:
        packed = stream.read(4)
    if not packed:
        raise UserError(f"the file {file} is empty")
    with unpacked(file) as stream:
        head = stream.read(HEAD)
    suffix = suffix_of(file)
    for start, kind in BINARY.items():
        if head.startswith(start):
            if packing_of(packed):
                raise UserError(f"{file}: {kind} that is packed once more: unpack it")
            return Content(kind)
    if suffix in (".parquet", ".arrow"):
        raise UserError(f"{file}: not {suffix[1:].capitalize()}{_but(head)}")
    if (foreign := _foreign(head)) is not None:
        raise UserError(f"{file} is {foreign}")
    if (encoding := _other_encoding(head)) is not None:
        raise UserError(f"{file}: not a text file in UTF-8 but in {encoding}; save it as UTF-8")
    text = head.decode(ENCODING, "replace").lstrip()
    if suffix in TABLES and not JSON_IN_TABLE.match(text):
        return Content("CSV", TABLES[suffix])
    if suffix in (*JSON, *TABLES) or text.startswith(("{", "[")):
        return Content("JSON", text[:1])
    raise UserError(f"{file} is neither {READ}")


def _foreign(head: bytes) -> str | None:
    """What a file is that is not read, if its beginning tells."""
    if head[TAR] == b"ustar":
        return "a tar archive: unpack it"
    return next((what for start, what in FOREIGN.items() if head.startswith(start)), None)


def _but(head: bytes) -> str:
    foreign = _foreign(head)
    return "" if foreign is None else f" but {foreign}"


def _other_encoding(head: bytes) -> str | None:
    """The encoding that text says itself, or that each second byte of its first ones tells."""
    for mark, name in OTHER_TEXT.items():
        if head.startswith(mark):
            return name
    low, high = head[:4:2], head[1:4:2]
    return "UTF-16" if (low == b"\0\0") != (high == b"\0\0") else None


def suffix_of(file: Path) -> str:
    """The suffix of a file as it is once unpacked, in small letters."""
    name = file.name.lower()
    for packing in PACKED:
        name = name.removesuffix(packing)
    return Path(name).suffix


def packing_of(start: bytes) -> str | None:
    """How a file is packed that begins so."""
    return next((name for name, mark in PACKED.items() if start.startswith(mark)), None)


def unpacked(file: Path) -> BinaryIO:
    """The bytes of a file, unpacked as they are read."""
    with file.open("rb") as stream:
        packing = packing_of(stream.read(4))
    if packing == ".gz":
        return cast(BinaryIO, gzip.open(file, "rb"))
    if packing == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))
    return file.open("rb")


def opened(file: Path, newline: str | None = None) -> TextIO:
    """The text of a file to read line by line, whatever is in one of them."""
    return io.TextIOWrapper(unpacked(file), encoding=ENCODING, errors=ESCAPED, newline=newline)
