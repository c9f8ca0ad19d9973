"""data.format: the shape in which rows are read."""

from collections.abc import Callable

from rlhf_cli.config.schema.data import Data
from rlhf_cli.data.columns import COMMON, OURS, MissingColumn, check_names, renamed
from rlhf_cli.data.kinds import Row
from rlhf_cli.data.raw import Raw
from rlhf_cli.data.readers import as_row
from rlhf_cli.data.shapes.comparisons import helpsteer, hh, stack_exchange, tldr, ultrafeedback
from rlhf_cli.data.shapes.dialogues import alpaca, sharegpt
from rlhf_cli.data.shapes.likeness import looks_like
from rlhf_cli.data.shapes.problems import gsm8k, gsm8k_solution, one_solution_each, verl
from rlhf_cli.data.shapes.shape import needing
from rlhf_cli.data.shapes.steps import prm800k

Reader = Callable[[Raw, str], Row]
"""The row of a raw one; the text says where it stands, for messages. Raises RowError."""

SHAPES = {
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    "messages": needing("messages", also=("label", "score")),
    "ultrafeedback": ultrafeedback,
    "helpsteer": helpsteer,
    "kto": needing("prompt", "completion", "label", also=("score",)),
    "prm800k": prm800k,
    "tldr": tldr,
    "stack_exchange": stack_exchange,
    "verl": verl,
    "text": needing("text"),
    "hh": hh,
    "gsm8k": gsm8k,
}

FORMATS: dict[str, Reader] = {
    "demo": as_row,
    "rows": as_row,
    "gsm8k_solutions": gsm8k_solution,
    **SHAPES,
}
PARTS: dict[str, Callable[[Raw], list[Raw]]] = {"gsm8k_solutions": one_solution_each}
"""Formats of which one object in the file holds several rows."""


def reader_of(data: Data) -> Reader:
    """The reader of one data config: columns renamed, then read in the shape of data.format.

    Raises:
        UserError: data.columns has a name that is nearly one of the shape's columns.
    """
    read, columns = FORMATS[data.format], data.columns
    reads = (*SHAPES[data.format].reads, *COMMON) if data.format in SHAPES else OURS
    if data.format != "gsm8k_solutions":
        check_names(columns, reads, data.format)

    def row_of(raw: Raw, source: str) -> Row:
        try:
            if not columns:
                return read(raw, source)
            ours, beside = renamed(raw, columns, source)
            row = read(ours, source)
            for name, value in beside.items():
                row.columns.setdefault(name, value)
            return row
        except MissingColumn as error:
            if like := looks_like(raw, data.format):
                raise MissingColumn(f"{error}{like}") from None
            raise

    return row_of
