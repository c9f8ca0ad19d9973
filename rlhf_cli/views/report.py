"""Runs as one page: what was made from what, how it went, and what it says."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.views.html import Section, page
from rlhf_cli.views.records import Record, read_record
from rlhf_cli.views.samples import samples_of


def report(folders: Sequence[Path]) -> str:
    """The page of some runs' folders."""
    import vl_convert

    records = [read_record(folder) for folder in folders]
    library = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    samples = samples_of(records)
    data = data_of(records) | {"samples": samples}
    sections = sections_of(records) + [Section("samples", "Samples")] * bool(samples)
    return page("Runs", sections, data, library)


def sections_of(records: Sequence[Record]) -> list[Section]:
    """The parts of the page, in their order."""
    return [Section("lineage", "Lineage", lineage(records))]


def data_of(records: Sequence[Record]) -> dict[str, Any]:
    """What the scripts of the page read: a key for each script's part."""
    return {"charts": {}, "theme": {}}


def lineage(records: Sequence[Record]) -> str:
    """The runs and their states."""
    rows = "".join(
        f"<tr><td>{html.escape(str(each.folder))}</td><td>{html.escape(each.node.state)}</td></tr>"
        for each in records
    )
    return f"<table>{rows}</table>"
