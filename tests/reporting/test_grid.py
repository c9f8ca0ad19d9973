"""Tables fit the terminal: nothing is cut, and numbers and words stay whole."""

import os
import re
import subprocess
import sys

import pytest
from rich.cells import cell_len

from rlhf_cli.reporting.grid import laid_out, shared_out, show, with_error
from rlhf_cli.reporting.terminal import width
from tests.terminals import on_a_terminal

HEADS = ("policy", "gold", "reward", "KL to sft", "held-out loss", "ppo wins, 95%")
ROWS = [
    ("ppo", "3.46 ± 0.05", "1.23 ± 0.04", "2.48 ± 0.07", "0.5535", "-"),
    (
        "runs/of/another/ppo_ptx",
        "-2.96 ± 0.05",
        "-",
        "1.97 ± 0.20",
        "0.5656",
        "0.69 (0.60 to 0.77)",
    ),
]
TEXTS = [
    ("Rosa asks: How many wheels does a boat have?\nGuide:", "A boat has 2 wheels. " * 9, "0.5")
]


def words(lines: list[str]) -> list[str]:
    return sorted(" ".join(lines).split())


@pytest.mark.parametrize("limit", [20, 40, 80, 100, 120, 200])
def test_no_line_is_too_wide_and_nothing_is_lost(limit: int) -> None:
    lines = laid_out(HEADS, ROWS, limit)
    assert max(map(cell_len, lines)) <= limit
    for cell in (*HEADS, *ROWS[0], *ROWS[1]):
        whole = re.sub(r"\s", "", cell)
        assert whole in re.sub(r"\s", "", "".join(lines)) or limit < 40
    if limit >= 40:
        assert "-2.96 ± 0.05" in "\n".join(lines)  # a number is never parted


def test_wide_tables_have_a_line_for_each_row_and_narrow_ones_a_block() -> None:
    wide, narrow = laid_out(HEADS, ROWS, 120), laid_out(HEADS, ROWS, 80)
    assert len(wide) == 3 and wide[0].split()[0] == "policy"
    assert narrow[0].split() == ["policy", "ppo"] and "" in narrow
    assert [line for line in narrow if line.split()[:1] == ["gold"]] == [
        "  gold           3.46 ± 0.05",
        "  gold           -2.96 ± 0.05",
    ]


def test_texts_wrap_at_words() -> None:
    lines = laid_out(("prompt", "response", "reward"), TEXTS, 60)
    assert max(map(len, lines)) <= 60
    assert lines[0].startswith("prompt") and lines[1].endswith("0.5")
    assert words(lines) == words(["prompt response reward", *TEXTS[0]])


def test_a_long_word_is_folded_and_wide_characters_count_twice() -> None:
    lines = laid_out(("a", "b"), [("x" * 300, "漢字" * 60)], 80)
    assert max(map(cell_len, lines)) <= 80
    assert "".join(lines).count("x") == 300 and "".join(lines).count("漢") == 60


def test_numbers_stand_on_the_right() -> None:
    assert laid_out(("name", "n"), [("a", "1"), ("b", "-23"), ("c", "-")], 80) == [
        "name    n",
        "a       1",
        "b     -23",
        "c       -",
    ]


def test_widths_are_taken_from_the_widest() -> None:
    assert shared_out([10, 40, 30], [5, 10, 10], 60) == [10, 25, 25]
    assert shared_out([10, 40], [10, 30], 39) is None


def test_figures_have_as_many_digits_as_are_known() -> None:
    assert with_error(0.74512, 0.0226) == "0.745 ± 0.023"
    assert with_error(-1234.5, 31.0) == "-1234 ± 31"
    assert with_error(0.3263111, None) == "0.3263"
    assert with_error(400, 0.0) == "400"
    assert with_error(4.21e-7, 2.91e-7) == "4.2e-07 ± 2.9e-07"
    assert (show(None), show(1.23456), show("x")) == ("-", "1.235", "x")


TABLE = """
from rlhf_cli.reporting.console import table
from tests.reporting.test_grid import HEADS, ROWS
table("held-out prompts", HEADS, ROWS)
"""


@pytest.mark.parametrize("columns", [80, 120])
def test_a_table_on_a_terminal(columns: int) -> None:
    said = on_a_terminal([sys.executable, "-c", TABLE], columns=columns)
    lines = re.sub(r"\x1b\[[\d;]*m", "", said).splitlines()
    assert "\x1b[1m" in said and lines[0] == "held-out prompts"
    assert max(map(len, lines)) <= columns
    assert len(lines) == (3 + 1 if columns == 120 else 2 * len(HEADS) + 1 + 1)


def test_a_table_in_a_pipe_is_plain() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TABLE],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    assert "\x1b" not in done.stderr and done.stdout == ""
    lines = done.stderr.splitlines()
    assert max(map(len, lines)) <= 100 and "0.69 (0.60 to 0.77)" in done.stderr


def test_how_wide_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "63")
    assert width() == 63
    for odd in ("", "0", "wide", "-5"):
        monkeypatch.setenv("COLUMNS", odd)
        monkeypatch.setattr(os, "get_terminal_size", no_terminal)
        assert width() == 100
    sizes = {2: os.terminal_size((90, 20))}
    monkeypatch.setattr(os, "get_terminal_size", lambda number: sizes.get(number) or no_terminal())
    assert width() == 90  # a pager reads stdout, stderr is the terminal's still


def no_terminal(number: int = 0) -> os.terminal_size:
    raise OSError
