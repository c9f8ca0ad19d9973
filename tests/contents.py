"""All that a stage leaves in its folder, but for what a clock and a machine say."""

import json
import re
from pathlib import Path
from typing import Any

from rlhf_cli.folders.integrity import fault_in

MEASURED = re.compile(
    "seconds$|seconds/|tokens_per_second$|peak_memory$"
    "|started$|saved$|crc$"  # of an answer, and the checksum of a line that says when it was given
)
LEFTOVER = re.compile(r"(^|/)\.|\.part$|^checkpoints\b|\.lock$")


def contents_of(out: Path) -> dict[str, Any]:
    """file name in `out` -> its bytes; of logs, reports and manifests what is said without times.

    Lines of metrics lack `seconds/...`, `tokens_per_second` and `peak_memory`; stage.json and
    report.json `seconds`, and stage.json the hashes of files.
    """
    return {
        file.relative_to(out).as_posix(): _content(file)
        for file in sorted(out.rglob("*"))
        if not file.is_dir()
    }


def faults_of(out: Path) -> list[str]:
    """What a finished folder should not hold, and what is not as its manifest describes it."""
    names = [file.relative_to(out).as_posix() for file in out.rglob("*")]
    faults = [f"leaves {name}" for name in names if LEFTOVER.search(name)]
    fault = fault_in(out, json.loads((out / "stage.json").read_text("utf-8"))["files"])
    return faults if fault is None else [*faults, fault]


def _content(file: Path) -> Any:
    if file.suffix == ".jsonl":
        return [without_times(json.loads(line)) for line in file.read_text("utf-8").splitlines()]
    if file.name in ("stage.json", "report.json"):
        found = without_times(json.loads(file.read_text("utf-8")))
        # files hold their own hashes, and logs have times in them
        return {**found, "files": sorted(found["files"])} if "files" in found else found
    return file.read_bytes()


def without_times(value: Any) -> Any:
    """A JSON value without the entries that a clock or a machine makes, at any depth."""
    if isinstance(value, dict):
        return {
            name: without_times(entry) for name, entry in value.items() if not MEASURED.match(name)
        }
    return [without_times(entry) for entry in value] if isinstance(value, list) else value
