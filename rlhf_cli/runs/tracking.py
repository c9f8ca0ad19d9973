"""What trackers are told of a run, and by which name they know it again."""

import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from rlhf_cli.config.schema.stages import Run
from rlhf_cli.config.secrets import marks
from rlhf_cli.config.stages import stage_name
from rlhf_cli.folders.files import write_text
from rlhf_cli.folders.manifest import places_referenced
from rlhf_cli.reporting.trackers.about import About
from rlhf_cli.runs.begun import begun_with, command_line, config_as_written
from rlhf_cli.runs.lineage import KINDS
from rlhf_cli.runs.out_files import TRACKED

ID = re.compile("[0-9a-f]{12}")


def about_run(cfg: Run) -> About:
    """A run as trackers are told of it, once its folder is claimed; the folder keeps its id."""
    out, stage = Path(cfg.out), stage_name(cfg)
    known = _id_in(out / TRACKED)
    own = known or secrets.token_hex(6)
    if known is None:
        write_text(out / TRACKED, own)
    begun = places_referenced(begun_with(out))
    return About(
        tracker="",
        id=own,
        resumed=known is not None,
        project=cfg.name,
        name=cfg.out,
        stage=stage,
        out=cfg.out,
        config=config_as_written(cfg),
        lineage={kind: begun.get(kind, {}) for kind in KINDS},
        command=command_line() or f"rlhf_cli.stages.{stage}.run",
        process=os.getpid(),
        taken=list(marks()),
    )


def _id_in(file: Path) -> str | None:
    """What a run was called before; None of a fresh one, or where that is damaged."""
    with suppress(OSError, ValueError):
        known = file.read_text(encoding="utf-8")
        return known if ID.fullmatch(known) else None
    return None
