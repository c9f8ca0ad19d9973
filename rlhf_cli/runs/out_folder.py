"""The `out` folder of a stage: free, finished, resumable or somebody else's."""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

from rlhf_cli.config.errors import Busy, UserError
from rlhf_cli.config.own_files import dump
from rlhf_cli.config.schema.stages import Run
from rlhf_cli.config.secrets import marks
from rlhf_cli.config.stages import facts_of, stage_name
from rlhf_cli.data.stdin import STDIN
from rlhf_cli.folders.files import PART, flush, flush_all, remove, seal, write_json, write_text
from rlhf_cli.folders.integrity import check_files, check_plain, oddity
from rlhf_cli.folders.manifest import EVENTS, MANIFEST, Manifest, places_referenced, read_manifest
from rlhf_cli.ranks.world import world
from rlhf_cli.reporting.terminal import on_one_line
from rlhf_cli.runs.begun import (
    VARIABLE,
    begun_with,
    changed_variable,
    command_line,
    config_as_written,
    config_of,
    holds,
    record_of,
)
from rlhf_cli.runs.config_diff import IGNORED_KEYS, differing_keys, free_keys
from rlhf_cli.runs.lock import LOCK, check_lock, lock, running, unlock
from rlhf_cli.runs.out_files import (
    BEGUN,
    CHECKPOINTS,
    CONFIG,
    INPUTS,
    KEPT,
    KEPT_SCORES,
    RECORDS,
    STAGING,
    TRASH,
    is_claimed,
    snapshot_step,
    what_is_kept,
)
from rlhf_cli.runs.provenance import (
    Provenance,
    changed_since,
    held_to,
    parent_paths,
    places_read,
    provenance_of,
    stdin_differs,
)

FREE, FINISHED, RESUMABLE = "free", "finished", "resumable"


def state_of(cfg: Run, check_only: bool = False) -> str:
    """Whether `out` is free, finished by this very config, or left unfinished by it.

    Args:
        check_only: nothing will run, so that standard input is left alone.

    Raises:
        UserError: another config made it, what it is made from has changed since, it holds what
            this stage reads, another process writes it, or it cannot be written.
    """
    _check_place(cfg, out := Path(cfg.out))
    if not is_claimed(out):
        ours = (LOCK, f".{CONFIG}{PART}")  # of a run that was killed as it claimed the folder
        if out.is_dir() and any(entry.name not in ours for entry in out.iterdir()):
            # never emptied, whatever overwrite says
            if (out / MANIFEST).is_file() or (out / INPUTS).is_file():
                raise UserError(f"{out / CONFIG} is missing; put it back, or remove the folder")
            raise UserError(f"out={out} is not empty and not a stage's folder; name another out")
        return FREE
    complete = (out / MANIFEST).is_file()  # written last, and whole
    if cfg.overwrite:
        again = not complete and begun_by_the_same_order(cfg)
        return RESUMABLE if again else to_be_emptied(out)
    made_by, given = config_of(out), config_as_written(cfg)
    if (made_by.keys() ^ given.keys()) - set(IGNORED_KEYS):
        raise UserError(f"out={out} is the folder of another stage; name another out")
    differing = differing_keys(made_by, given, free_keys(cfg, complete))
    if differing and differing_keys(made_by, asdict(cfg), free_keys(cfg, complete)):
        raise UserError(
            f"out={out} was made by another config ({', '.join(differing)}); "
            "name another out, or set overwrite=true"
        )
    if name := changed_variable(out):
        raise UserError(
            f"out={out} was made with another value of the variable {name}; name another out, or "
            "set overwrite=true"
        )
    if cfg.data.path == STDIN:
        if complete:  # standard input is new each time
            return to_be_emptied(out)
        if check_only:  # it is not read, and so not known
            return RESUMABLE
    provenance, before = provenance_of(cfg), begun_with(out)
    if not complete:
        _check_entries(out)
    else:
        before = read_manifest(out) or {}
        check_files(out)
    differ = parent_paths(provenance) != parent_paths(before)
    if differ and facts_of(cfg).writes == "report":  # it has other policies to compare with now
        return to_be_emptied(out)
    if cfg.data.path == STDIN and stdin_differs(provenance, before):
        return to_be_emptied(out)
    if changed := changed_since(provenance, before):
        anew = "name another out" if labels_in(out) else "set overwrite=true to make it again"
        raise UserError(f"out={out} was made from another {changed}; {anew}")
    if not complete and what_is_kept(out) and not any((out / name).is_file() for name in BEGUN):
        raise UserError(f"{out / INPUTS} is missing; set overwrite=true to start afresh")
    return FINISHED if complete else RESUMABLE


def _check_place(cfg: Run, out: Path) -> None:
    """Stop where `out` cannot be written, holds what this stage reads, or is being written."""
    if cfg.overwrite or not (out / MANIFEST).is_file():  # what is finished may be read-only
        check_writable(out)
    whole = os.path.realpath(out)
    for role, path in places_read(cfg):
        place = Path(os.path.realpath(path))  # unlike resolve(), no error in a circle of links
        if Path(whole) in (place, *place.parents):
            raise UserError(f"out={out} holds the {role} that this stage reads; name another out")
    if (other := running(out)) is not None:
        raise Busy(f"out={out} is being written by {other}")


def _check_entries(out: Path) -> None:
    """Stop where something odd lies in the place of what a run goes on from.

    Resume points may be: a damaged one is given up for the one before.
    """
    check_plain(out)
    if os.path.lexists(out / CHECKPOINTS) and not (out / CHECKPOINTS).is_dir():
        raise UserError(f"{out / CHECKPOINTS} is no folder; set overwrite=true to start afresh")
    for file in (out / name for name in (*RECORDS, KEPT, KEPT_SCORES)):
        if (kind := oddity(file)) is not None:
            raise UserError(f"{file} is {kind}, not a file; set overwrite=true to start afresh")


def to_be_emptied(out: Path) -> str:
    """FREE, though a stage has written here.

    Raises:
        UserError: other runs lie inside, which would go as well, or labels of people.
    """
    check_no_labels(out)
    for file in out.rglob(CONFIG):
        if file.parent != out and is_claimed(file.parent):
            raise UserError(f"out={out} holds another run, {file.parent}; name another out")
    return FREE


def check_no_labels(out: Path) -> None:
    """Stop, of whatever stage, before what people have labelled is removed.

    Raises:
        UserError: naming it.
    """
    if labels := labels_in(out):
        raise UserError(
            f"out={out} holds {len(labels)} files of labels, as {labels[0].name}, which "
            "overwrite=true would remove: name another out, or remove them yourself"
        )


def labels_in(out: Path) -> list[Path]:
    """The files of what was labelled there."""
    return sorted(out.glob(EVENTS.format("*")))


def begun_by_the_same_order(cfg: Run) -> bool:
    """Whether overwrite=true began what lies unfinished in `out`, with this config and input.

    Such a run goes on: the order was carried out when it began.
    """
    out = Path(cfg.out)
    try:
        made_by, before = config_of(out), begun_with(out)
    except UserError:  # damaged
        return False
    return (
        bool(made_by.get("overwrite"))
        and not differing_keys(made_by, config_as_written(cfg), free_keys(cfg, complete=False))
        and not changed_variable(out)
        and not changed_since(provenance_of(cfg), before)
    )


def check_writable(out: Path) -> None:
    """Stop before any work where `out` cannot be written."""
    place = out
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UserError(f"out={out}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"out={out}: no permission to write in {place}")


def claim(cfg: Run, provenance: Provenance) -> None:
    """Make the folder this run's own: locked, emptied if free, config.yaml written.

    Args:
        provenance: what the run is made from, as it was before anything was read.

    Raises:
        Busy: another process writes it or has finished it meanwhile, or what was read has changed
            meanwhile.
    """
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    lock(out)
    state = state_of(cfg)
    changed = changed_since(provenance_of(cfg), provenance)
    if state == FINISHED or changed:
        unlock(out)
        fault = f"was to be made from a {changed}" if changed else "was finished by another run"
        raise Busy(f"out={out} {fault} meanwhile; run the same command again")
    if state == FREE:
        # stage.json first, so that no part of a model looks whole; then, at a stroke, all that a
        # run would go on from; config.yaml is replaced last
        remove([out / MANIFEST, out / TRASH])
        if (out / CHECKPOINTS).exists():
            (out / CHECKPOINTS).rename(out / TRASH)
        remove(entry for entry in out.iterdir() if entry.name not in (LOCK, CONFIG))
    command = command_line() or f"rlhf_cli.stages.{stage_name(cfg)}.run"
    header = f"# {on_one_line(command)}\n"  # a line break in a word would end the comment
    content = dump(config_as_written(cfg))
    variables = (f"{' '.join(VARIABLE)} {name} {mark}\n" for name, mark in marks().items())
    write_text(out / CONFIG, header + "".join(variables) + content)
    (out / CHECKPOINTS).mkdir(exist_ok=True)
    record = record_of(places_referenced(begun_with(out) or held_to(provenance)))
    for name in RECORDS:
        if not holds(out / name, record):
            write_json(out / name, record)
    flush(out.parent)


def staging(out: Path) -> Path:
    """An empty folder inside `out` for files that are not to be seen yet; rank 0 makes it."""
    folder = out / STAGING
    if world().is_main:
        check_lock(out)
        remove([folder])
        folder.mkdir(parents=True)
    return folder


def publish(out: Path, manifest: Manifest) -> None:
    """Move staged files into `out`, then write stage.json: only that makes the folder complete."""
    check_lock(out)
    folder = out / STAGING
    names = {CONFIG, *(log.name for log in out.glob("*.jsonl"))}
    if folder.is_dir():
        flush_all(folder)
        for entry in sorted(folder.iterdir()):
            names.add(entry.name)
            if (out / entry.name).is_dir():  # of a run that was killed here
                remove([out / entry.name])
            entry.replace(out / entry.name)
        folder.rmdir()
    # whole folders of their own; snapshots may be removed
    inside = [file.parent for file in out.glob(f"*/{MANIFEST}")]
    names |= {folder.name for folder in inside if snapshot_step(folder) is None}
    seal(out, manifest, names)
    tidy(out)


def tidy(out: Path) -> None:
    """Remove what a finished folder needs no more: resume points and the lock.

    Nothing happens where another process makes the folder anew.
    """
    if not (out / CHECKPOINTS).exists() and not (out / LOCK).exists():
        return
    try:
        lock(out)
    except (UserError, OSError):  # or a disk that is read-only now
        return
    if (out / MANIFEST).is_file():
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    unlock(out)
