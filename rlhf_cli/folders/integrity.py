"""Whether a model folder is whole: as its stage.json describes it, and sound in itself.

A disk that lies, a copy that stopped, an edited file: each is told before anything is made of it.
"""

import errno
import hashlib
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.folders.json_forms import ADAPTER, INDEX, LAYERS, RANKS, SIZES, TOKENIZER
from rlhf_cli.folders.manifest import (
    ADAPTER_CONFIG,
    MANIFEST,
    adapter_base,
    read_config,
    read_header,
    read_manifest,
    read_object,
    sha256,
    shapes_of,
    weight_files,
)

Files = dict[str, dict[str, int | str]]

# Recorded, but people may edit or remove them: no later stage reads them.
UNVERIFIED = (".jsonl", ".png", "config.yaml", "report.json")
WEIGHTS = ".safetensors"
LABELS = "num_labels"
FILES = (".json", ".jsonl", ".yaml", ".jinja", WEIGHTS)  # what is read, or written, as a file
SPECIAL = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


# --------------------------------------------------------------------------- as described


def described(folder: Path, names: Iterable[str]) -> Files:
    """name -> {"size": bytes, "sha256": digits}, in the order of the names."""
    return {
        name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in sorted(names)
    }


def fault_in(folder: Path, files: Files, hashes: bool = True) -> str | None:
    """What is wrong with the first file that is not as it was described; None if all are.

    Args:
        hashes: read every byte; otherwise sizes are compared only.

    Raises:
        OSError: the disk does not answer, which says nothing of what is on it.
    """
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if (size := file.stat().st_size) != entry["size"]:
            return f"{file} has {size} bytes instead of {entry['size']}"
        if hashes and sha256(file) != entry["sha256"]:
            return f"{file} is damaged: its bytes are not those that were written"
    return None


def begins_as(file: Path, entry: dict[str, int | str]) -> bool:
    """Whether a file's first bytes are those that were described; more may follow."""
    if not file.is_file():
        return False
    digest, left = hashlib.sha256(), int(entry["size"])
    with file.open("rb") as stream:
        while left and (chunk := stream.read(min(left, 1 << 20))):
            digest.update(chunk)
            left -= len(chunk)
    return left == 0 and digest.hexdigest() == entry["sha256"]


def check_files(folder: Path) -> None:
    """Stop at a file that is not as stage.json describes it; of weights, by size alone.

    Raises:
        UserError: naming the file.
    """
    files = _recorded(folder)
    weights = {name: entry for name, entry in files.items() if name.endswith(WEIGHTS)}
    others = {name: files[name] for name in files.keys() - weights.keys()}
    _require(folder, weights, hashes=False)
    _require(folder, others)


def check_weights_hash(path: str) -> None:
    """Stop at weights whose bytes are not those that stage.json describes, before they are loaded.

    Raises:
        UserError: naming the file.
    """
    files = _recorded(Path(path))
    weights = {name: entry for name, entry in files.items() if name.endswith(WEIGHTS)}
    _require(Path(path), weights)


def _recorded(folder: Path) -> Files:
    """The files of a folder that must be as described; none of a folder without a record."""
    files: Files = (read_manifest(folder) or {}).get("files", {})
    return {name: entry for name, entry in files.items() if not name.endswith(UNVERIFIED)}


def _require(folder: Path, files: Files, hashes: bool = True) -> None:
    try:
        fault = fault_in(folder, files, hashes)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read: {error.strerror}") from None
    if fault is not None:
        raise UserError(
            f"{fault}; make the folder again by its stage with overwrite=true, or, if the change "
            f'is meant, remove the file\'s entry under "files" in {folder / MANIFEST}'
        )


# --------------------------------------------------------------------------- sound in itself


def check_plain(folder: Path) -> None:
    """Stop at what no run can read or replace: a pipe, whose other end may never come, or a folder
    or a circle of links in the place of a file.

    Raises:
        UserError: naming the entry.
    """
    for entry in sorted(folder.iterdir()):
        if (kind := oddity(entry)) is not None:
            raise UserError(f"{entry} is {kind}, not a file; remove it, or put the file back")


def oddity(entry: Path) -> str | None:
    """What lies there instead of a file or an ordinary folder; None where nothing does."""
    try:
        mode = entry.stat().st_mode
    except OSError as error:
        return "a circle of links" if error.errno == errno.ELOOP else None
    if stat.S_ISDIR(mode):
        return "a folder" if entry.suffix in FILES else None
    return next((kind for is_one, kind in SPECIAL if is_one(mode)), None)


def check_whole(folder: Path) -> None:
    """Stop at a model folder that is damaged, or whose base is, as far as torch is not needed.

    Raises:
        UserError: naming the file.
    """
    check_plain(folder)
    check_files(folder)
    check_weights(folder)
    if (tokenizer := folder / "tokenizer.json").is_file():
        read_object(tokenizer, TOKENIZER)
    base = adapter_base(folder)
    check_sizes(folder)
    if base is None:
        return
    if adapter_base(base) is not None:
        raise UserError(f"{folder} is an adapter on {base}, which is an adapter too; merge that")
    if Path(base).is_dir():
        check_whole(Path(base))
    elif base.startswith(("/", ".", "~")):
        raise UserError(
            f"{folder} is an adapter on {base}, which is gone; put the base back there, or write "
            f"where it is into {folder / ADAPTER_CONFIG} as base_model_name_or_path"
        )


def check_weights(folder: Path) -> None:
    """Stop at missing or cut weights, by the sizes that safetensors headers promise.

    Raises:
        UserError: naming the file.
    """
    files = weight_files(folder)
    if not files:
        raise UserError(f"{folder}: no weights (*.safetensors) in this folder")
    index = folder / "model.safetensors.index.json"
    read = "adapter_model.safetensors" if adapter_base(folder) else "model.safetensors"
    if not (folder / read).exists() and not index.is_file():  # others are not what is loaded
        raise UserError(f"{folder}: no file named {read} in this folder")
    for file in files:
        header_size, entries = read_header(file)
        ends = [entry["data_offsets"][1] for entry in entries.values()]
        size, whole = file.stat().st_size, 8 + header_size + max(ends, default=0)
        if whole != size:
            raise UserError(f"{file}: truncated weights: {size} bytes of {whole}")
    if index.is_file():
        needed = set(read_object(index, INDEX)["weight_map"].values())
        if absent := needed - {file.name for file in files}:
            raise UserError(f"{folder}: weights missing: {sorted(absent)[0]}")


def check_sizes(folder: Path) -> None:
    """Stop at sizes that no weight of the folder has: a model of them would be built first.

    Raises:
        UserError: config.json, or that of an adapter, says more than the weights hold.
    """
    shapes = shapes_of(folder)
    widest = max((size for shape in shapes.values() for size in shape), default=0)
    limits = dict.fromkeys(SIZES, widest) | dict.fromkeys(LAYERS, len(shapes))
    limits[LABELS] = max(widest, 2)  # a name is made for each
    if adapter_base(folder) is not None:
        file, limits = folder / ADAPTER_CONFIG, dict.fromkeys(RANKS, widest)
        config = read_object(file, ADAPTER)
        ranks = config.get("rank_pattern") or {}
        of_layers = [rank for rank in ranks.values() if isinstance(rank, int)]
        config |= {"r": max([config.get("r") or 0, *of_layers])}
    else:
        file, config = folder / "config.json", read_config(folder)
    text = config.get("text_config") or {}
    if "vocab_size" in text:  # what a model that sees says of another part is not of its embeddings
        config = {name: value for name, value in config.items() if name != "vocab_size"}
    for said in (config, text, *labels_in(config)):
        for name, limit in limits.items():
            value = said.get(name)
            sizes = value if isinstance(value, list) else [value]
            if any(isinstance(size, int) and size > limit for size in sizes):
                raise UserError(
                    f"{file}: {name}={value} is more than the weights in {folder} are for; make "
                    "the folder again, or put its own file back"
                )


def labels_in(config: Any) -> Iterator[dict[str, Any]]:
    """`num_labels` of the config of a model, and of those of its parts inside."""
    if isinstance(config, dict):
        yield {LABELS: config.get(LABELS)}
        for part in config.values():
            yield from labels_in(part)
