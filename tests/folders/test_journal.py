"""Blocks of lines that are whole or count for nothing."""

from pathlib import Path

import pytest

from rlhf_cli.folders.journal import Journal, Record

BLOCKS: list[list[Record]] = [
    [{"n": 1}, {"n": 2}, {"n": 3}],
    [{"n": 4, "text": 'a", "crc": 3'}],
    [{"n": 5}, {"n": 6}],
]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made = Journal(tmp_path / "made.jsonl")
    assert not list(made.blocks())
    for block in BLOCKS:
        made.append(block)
    return made


def test_what_was_written_is_read(journal: Journal) -> None:
    assert list(journal.blocks()) == BLOCKS
    assert journal.file.read_text().count("\n") == 6


def test_a_cut_at_any_byte_costs_the_last_block_alone(journal: Journal) -> None:
    content = journal.file.read_bytes()
    ends = [0, *(i + 1 for i, byte in enumerate(content) if byte == 10)]
    whole = [ends[3], ends[4], ends[6]]
    for size in range(len(content)):
        journal.file.write_bytes(content[:size])
        expected = BLOCKS[: sum(size >= end - 1 for end in whole)]
        assert list(journal.blocks()) == expected, size
        journal.append([{"n": 7}])
        assert list(journal.blocks()) == [*expected, [{"n": 7}]], size


def test_a_flipped_bit_costs_its_block_alone(journal: Journal) -> None:
    content = journal.file.read_bytes()
    lines = [0, *(i + 1 for i, byte in enumerate(content) if byte == 10)]
    owner = [0, 0, 0, 1, 2, 2]
    for place in range(len(content)):
        line = sum(place >= end for end in lines) - 1
        damaged = bytearray(content)
        damaged[place] ^= 4
        journal.file.write_bytes(damaged)
        lost = {owner[line]}
        if content[place] == 10:  # two lines become one
            lost.add(owner[min(line + 1, 5)])
        left = [block for i, block in enumerate(BLOCKS) if i not in lost]
        assert list(journal.blocks()) == left, place
