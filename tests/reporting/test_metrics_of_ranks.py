"""Metrics of ranks that no longer compute the same end the run of all."""

import errno
import os
from pathlib import Path

from rlhf_cli.config.errors import RunError
from rlhf_cli.ranks.world import world
from rlhf_cli.reporting.metrics import JsonLines
from tests.ranks import on_ranks


def written(folder: Path) -> list[str]:
    """What ranks are told of metrics of which some are not the same."""
    log, free = (JsonLines(folder / name, alike=name == "alike") for name in ("alike", "free"))
    said = []
    rank = world().rank
    for metrics in (
        {"a": 0.1, "seconds/a": float(rank), "bad": float("nan"), "text": str(rank)},
        {"a": 0.1 + 0.2, "b": 0.3 if rank == 0 else 0.1 + 0.2},
        {"a": 1.0, "c": 2.0} if rank else {"a": 1.0},
    ):
        free.write(3, metrics)
        try:
            log.write(3, metrics)
        except RunError as error:
            said.append(str(error).rpartition(":")[0])
    return said


def test_metrics_that_differ_end_all_ranks(tmp_path: Path) -> None:
    for said in on_ranks(2, written, tmp_path):
        assert said == [
            "step 3: b is 0.3 on rank 0 and 0.30000000000000004 on rank 1",
            "step 3: c is nothing on rank 0 and 2.0 on rank 1",
        ]
    counts = [len((tmp_path / name).read_text().splitlines()) for name in ("alike", "free")]
    assert counts == [1, 3]
    assert written(tmp_path) == []


def on_a_full_disk(folder: Path) -> list[str]:
    """What ranks raise where the disk of rank 0 has no room for a row."""
    full = False

    def check() -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(log.file))

    log = JsonLines(folder / "log", before_write=check, agreed=True)
    log.write(1, {"a": 1.0})
    full = True
    try:
        log.write(2, {"a": 1.0})
    except OSError as error:
        return [str(error.errno), str(error.filename)]
    return []


def test_a_disk_that_fills_ends_all_ranks(tmp_path: Path) -> None:
    told = [str(errno.ENOSPC), str(tmp_path / "log")]
    assert on_ranks(2, on_a_full_disk, tmp_path) == [told, told]
    assert len((tmp_path / "log").read_text().splitlines()) == 1
