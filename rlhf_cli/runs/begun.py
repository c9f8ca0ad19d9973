"""What an `out` folder says of the run that began it: command, config, variables, inputs."""

import hashlib
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.stages import Run
from rlhf_cli.config.secrets import as_given, marks
from rlhf_cli.folders.json_forms import PROVENANCE
from rlhf_cli.folders.manifest import places_filled_in, read_object
from rlhf_cli.runs.out_files import CONFIG, RECORDS

VARIABLE = ["#", "variable"]  # begins the line of a variable that the config takes, and its mark
MODULE = "rlhf_cli"  # as `python -m` names it


def config_of(out: Path) -> dict[str, Any]:
    """The config that made a folder.

    Raises:
        UserError: its config.yaml cannot be read.
    """
    file = out / CONFIG
    try:
        return dict(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (yaml.YAMLError, TypeError, ValueError):
        raise UserError(f"{file}: damaged; set overwrite=true to start afresh") from None


def config_as_written(cfg: Run) -> dict[str, Any]:
    """A config as config.yaml has it: what the environment said stays a reference."""
    return as_given(asdict(cfg))


def changed_variable(out: Path) -> str | None:
    """A variable that the config takes, and whose value was another when the folder was begun."""
    lines = (out / CONFIG).read_text(encoding="utf-8").splitlines()
    before = {words[2]: words[3] for line in lines if (words := line.split())[:2] == VARIABLE}
    return next((name for name, mark in marks().items() if before.get(name, mark) != mark), None)


def begun_with(out: Path) -> dict[str, Any]:
    """What an unfinished run said of its parents and inputs as it began; empty where it did not.

    Raises:
        UserError: neither record of it is whole.
    """
    faults = []
    for file in (out / name for name in RECORDS):
        try:
            said = read_object(file, PROVENANCE) if file.is_file() else None
        except UserError as error:
            faults.append(error)
            continue
        if said is None:
            continue
        digest = said.pop("sha256", None)
        if digest in (None, record_of(said)["sha256"]):
            return places_filled_in(said)
        faults.append(
            UserError(f"{file}: damaged: other bytes than were written; set overwrite=true")
        )
    if faults:
        raise faults[0]
    return {}


def record_of(provenance: dict[str, Any]) -> dict[str, Any]:
    """What a run is made from, with a hash by which damage shows."""
    text = json.dumps(provenance, sort_keys=True)
    return {**provenance, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def holds(file: Path, record: dict[str, Any]) -> bool:
    """Whether a file is there and holds this very object."""
    try:
        return file.is_file() and bool(read_object(file, PROVENANCE) == record)
    except UserError:
        return False


def command_line() -> str | None:
    """The command as it was typed (Hydra rewrites sys.argv); None where Python called a stage."""
    typed = sys.orig_argv[1:]
    if MODULE in typed:  # python -m rlhf_cli, which is how a rank is started
        return shlex.join(["rlhf-cli", *typed[typed.index(MODULE) + 1 :]])
    script, *words = typed or [""]
    return shlex.join(["rlhf-cli", *words]) if Path(script).name == "rlhf-cli" else None
