"""A run as its folder tells it, while it goes on too."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.folders.manifest import Manifest, read_manifest
from rlhf_cli.runs.lineage import Node, config_of_run, read_node

METRICS, SAMPLES, REPORT = "metrics.jsonl", "samples.jsonl", "report.json"


@dataclass
class Record:
    """What a folder that a stage wrote, or writes, holds for people to look at.

    node: its place among other runs, and its state in words.
    config: as it was composed, nested.
    manifest: stage.json; empty until the run has ended, or where it is damaged.
    metrics: the lines of metrics.jsonl.
    report: report.json, of stages that judge; empty elsewhere.
    """

    folder: Path
    node: Node
    config: dict[str, Any] = field(default_factory=dict)
    manifest: Manifest = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    def samples(self) -> Iterator[dict[str, Any]]:
        """The lines of samples.jsonl."""
        return json_lines(self.folder / SAMPLES)


def read_record(folder: Path) -> Record:
    """Read a folder; what is missing or damaged in it is left out, as its state says."""
    manifest: Manifest = {}
    with suppress(UserError, OSError):
        manifest = read_manifest(folder) or {}
    report: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        read = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        report = read if isinstance(read, dict) else {}
    return Record(
        folder,
        read_node(folder, lambda kind, path: None),
        config_of_run(folder),
        manifest,
        list(json_lines(folder / METRICS)),
        report,
    )


def json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; none of a line that is not whole, such as the last one of
    a run that is writing it.
    """
    try:
        stream = file.open(encoding="utf-8", errors="replace")
    except OSError:
        return
    with stream:
        for line in stream:
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    yield row
