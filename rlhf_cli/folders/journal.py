"""An append-only file of JSON lines in blocks, each of which is whole or counts for nothing.

A run may be killed in the middle of a write, and a disk may lie: each line bears its own checksum
and its place in its block.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

CHECK = ', "crc": '
Record = dict[str, Any]
Placed = tuple[int, Record]


class Journal:
    """The blocks of a file, in the order in which they were written."""

    def __init__(self, file: Path, before_write: Callable[[], None] = lambda: None) -> None:
        """`before_write` raises where the file is no longer this run's to write.

        Raises:
            OSError: the file cannot be read.
        """
        self.file = file
        self._before_write = before_write

    def blocks(self) -> Iterator[list[Record]]:
        """Every block that is whole."""
        for block in self.placed_blocks():
            yield [record for _, record in block]

    def placed_blocks(self) -> Iterator[list[Placed]]:
        """The same, each record with the byte at which its line begins, for `at`."""
        block: list[Placed] = []
        length = 0
        for start, line in self._lines():
            record = _read(line)
            if record is None:
                block = []
                continue
            place, size = record.pop("part")
            if place == 1:
                block, length = [], size
            if (place, size) != (len(block) + 1, length):
                block = []
                continue
            block.append((start, record))
            if place == size:
                yield block
                block = []

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        if self.file.is_file():
            start = 0
            with self.file.open("rb") as stream:
                for line in stream:
                    yield start, line
                    start += len(line)

    def at(self, starts: Sequence[int]) -> Iterator[Record]:
        """The records whose lines begin at these bytes.

        Raises:
            OSError: the file has changed since they were found.
        """
        if not starts:
            return
        with self.file.open("rb") as stream:
            for start in starts:
                stream.seek(start)
                record = _read(stream.readline())
                if record is None:
                    raise OSError(f"{self.file}: other bytes than were read before")
                del record["part"]
                yield record

    def append(self, block: Sequence[Record]) -> None:
        """Write a block at the end; what JSON has no word for is written as its text."""
        lines = [
            _written({**record, "part": [place, len(block)]})
            for place, record in enumerate(block, 1)
        ]
        self._before_write()
        with self.file.open("ab+") as stream:
            end = stream.seek(0, os.SEEK_END)
            if end and _last_byte(stream) != b"\n":
                stream.write(b"\n")  # what a kill has cut off stays a line of its own
            stream.write("".join(lines).encode())


def _last_byte(stream: Any) -> bytes:
    stream.seek(-1, os.SEEK_END)
    return bytes(stream.read(1))


def _written(record: Record) -> str:
    text = json.dumps(record, default=str)[:-1]
    return f"{text}{CHECK}{zlib.crc32(text.encode())}}}\n"


def _read(line: bytes) -> Record | None:
    """A line's record; None where it is not as it was written."""
    text, _, digits = line.removesuffix(b"\n").rpartition(CHECK.encode())
    if digits != b"%d}" % zlib.crc32(text):
        return None
    record: Record = json.loads(text + b"}")
    return record
