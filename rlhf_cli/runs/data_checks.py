"""Checks of rows before a run: files, sealed folders, first rows, what the loss reads of them."""

from collections.abc import Iterable
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.stages import LabelConfig, Run
from rlhf_cli.config.stages import facts_of
from rlhf_cli.data.files import find, is_local
from rlhf_cli.data.kinds import Demonstration, Prompt, Text, row_kind
from rlhf_cli.data.look import check_split, looked_at
from rlhf_cli.data.parse import check_content
from rlhf_cli.data.rows import Rows, text_data
from rlhf_cli.data.sources import check_sources, sources_of
from rlhf_cli.data.stdin import STDIN
from rlhf_cli.data.templates import chat_template_of, prefix_of
from rlhf_cli.folders.manifest import read_manifest
from rlhf_cli.rewards.specs import check_rows_of, terms_of
from rlhf_cli.runs.lineage import command_of
from rlhf_cli.runs.out_files import LABELS, TASKS, is_claimed
from rlhf_cli.runs.provenance import rewards_of


def check_data(cfg: Run) -> None:
    """Data files exist and say something, and templates are there.

    Raises:
        UserError: naming the key of what is missing, empty, not finished, or not for this stage.
    """
    data = cfg.data
    prefix_of(data)
    if data.chat_template is not None:
        chat_template_of(data.chat_template)
    named = {key: getattr(data, key) for key in ("path", "eval_path", "text_path")}
    named |= {
        f"sources[{i}].path": each.path for i, each in enumerate(sources_of(data)) if data.sources
    }
    if (samples := getattr(cfg, "samples", None)) is not None:
        _check_sealed("samples", samples)
    for key, value in named.items():
        if data.format == "demo" and key != "text_path" and value is not None:
            raise UserError(f"data=demo brings its own rows; data=jsonl data.{key}=... reads yours")
        if value == STDIN and key == "path" and not facts_of(cfg).holds_out:
            continue
        if value is None:
            if key == "path" and data.format != "demo" and not data.sources:
                raise UserError(f"data={data.format} needs data.path=FILE")
            continue
        if value == STDIN:
            raise UserError(
                f"data.{key}={STDIN}: generate alone reads standard input, as data.path"
            )
        if not is_local(value):  # the hub tells what it has once it is asked
            continue
        for place in value if isinstance(value, list) else [value]:
            _check_sealed(f"data.{key}", place)
        try:
            found = find(value)
            for file in found.train + found.held_out:
                check_content(file)
        except UserError as error:
            raise UserError(f"data.{key}: {error}") from None
    if data.sources:
        check_sources(sources_of(data))


def _check_sealed(key: str, place: str) -> None:
    """`_check_sealed_at` of all that a place may name: of a pattern every folder that fits, whether
    what it names there is there already or not.
    """
    whole = Path(place).expanduser()
    if not has_magic(place) or whole.exists():
        _check_sealed_at(key, whole)
        return
    inside = {Path(each, whole.name) for each in glob(str(whole.parent))}
    for each in sorted(inside.union(map(Path, glob(str(whole))))):
        _check_sealed_at(key, each)


def _check_sealed_at(key: str, whole: Path) -> None:
    """What is named of a stage's folder are rows that it has sealed: no part of them, and of labels
    neither tasks nor events.

    Raises:
        UserError: the stage is not done, or the label folder itself is named.
    """
    folder = whole if whole.is_dir() else whole.parent
    if not is_claimed(folder):
        return
    labelled = (folder / TASKS).is_file()
    there = labelled and whole != folder and whole.exists()  # its tasks do as prompts
    if read_manifest(folder) is None and not there:
        command = command_of(folder)
        way = f"go on with `{command}`" if command else "the command that began it goes on"
        way += ", or seal what is there with accept_partial=true" if labelled else ""
        state = "labelled still" if labelled else "not finished"
        raise UserError(f"{key}={whole}: {folder} is {state}: {way}")
    if labelled and whole == folder:
        rows = [str(folder / name) for name in LABELS if (folder / name).is_file()]
        raise UserError(f"{key}={whole} is a label folder: name its rows, {' or '.join(rows)}")


def check_rows(cfg: Run, rows: Rows) -> list[str]:
    """The first rows of local files are sound, of a kind that the stage can use, and have what it
    reads; all of them where they are few.

    The shipped demo is sound; what the hub or standard input holds is known once the stage reads.

    Returns:
        How many rows there are of each source, and what was not read.
    """
    notes = []
    texts = rows.text_places()
    if cfg.data.text_path is not None and texts is not None:
        notes += looked_at(texts.train[0], Text, text_data(cfg.data)).notes
    if cfg.data.format == "demo":
        return notes
    kind = row_kind(cfg)
    places = rows.places(kind)
    notes += places.about()
    looks = [looked_at(source, kind, cfg.data) for source in places.all if is_local(source.path)]
    for look in looks:
        notes += look.notes
        answered = [row for row in look.rows if isinstance(row, Prompt | Demonstration)]
        given = isinstance(cfg, LabelConfig) and cfg.samples is not None  # rewards see its rows
        for _, reward in [] if given else rewards_of(cfg):
            for term in terms_of(reward):
                check_rows_of(term.spec, answered)
        check_judgements(cfg, look.rows)
    splits = facts_of(cfg).holds_out and places.held_out is None
    if splits and looks and all(look.whole for look in looks):
        check_split(places, looks, cfg.data)
    return notes


def what_is_read(cfg: Run) -> dict[str, str]:
    """What a loss reads of each row beside its responses, and the setting by which it does."""
    read, target = {}, getattr(cfg.algo, "target", None)
    if getattr(cfg.algo, "row_margin", None):
        read["margin"] = "algo.row_margin=true"
    if getattr(cfg.algo, "soft_labels", None):
        read["p"] = "algo.soft_labels=true"
    if getattr(cfg.algo, "loss", None) == "kto":
        read["label"] = "algo.loss=kto"
    return read | ({} if target is None else {target: f"algo.target={target}"})


def check_judgements(cfg: Run, rows: Iterable[Any]) -> None:
    """Every row has what the loss reads: its margin, its soft label, its label or its score.

    Raises:
        UserError: naming the first row that has not.
    """
    if not (read := what_is_read(cfg)):
        return
    for row in rows:
        for needed, setting in read.items():
            if getattr(row, needed) is None:
                raise UserError(f"{row.source}: the row says no {needed}, which {setting} reads")
