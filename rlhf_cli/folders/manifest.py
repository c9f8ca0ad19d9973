"""stage.json and what a folder is, told without torch: its kind, tokenizer, weights and hash."""

import hashlib
import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.secrets import filled_in, referenced
from rlhf_cli.folders.json_forms import ADAPTER, CONFIG, HEADER, STAGE, TOKENIZER, Form, misfit

MANIFEST = "stage.json"
EXPORTED = "exported"  # its entry that says that, and how, `export` wrote a folder

Manifest = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

ADAPTER_CONFIG = "adapter_config.json"
LOADED = (  # beside weights
    "config.json",
    ADAPTER_CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
OF_ROWS = ("samples", "labels")  # kinds of folders that hold rows, not weights
EVENTS = "events-{}.jsonl"  # what one annotator has answered
ACCURACY_ON = re.compile(r"eval/source/(.+)/(accuracy(?:_stderr|_low|_high)?)")
SMALL = 2**20  # bytes of a file that is hashed anew each time

CLASSIFYING = ("SEQ_CLS", "TOKEN_CLS")  # what peft calls the tasks of a scalar head
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")
SCALAR_HEADS = {f"scalar_head.ScalarHead{name}" for name in CLASSIFIERS}  # of ours: file and class
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")

# Where a reward model's scores stand: at the end of a response, of each step, or at each token.
RESPONSE, STEP, TOKEN = "response", "step", "token"
LEVELS = {"process": STEP, "token": TOKEN}  # what losses of reward judge, if no whole responses


def read_manifest(folder: str | Path) -> Manifest | None:
    """stage.json of a folder, with `parents`; None where there is none (a foreign folder, or no
    folder).
    """
    file = Path(folder) / MANIFEST
    return {"parents": {}} | places_filled_in(read_object(file, STAGE)) if file.is_file() else None


def trained_here(manifest: Manifest | None) -> bool:
    """Whether a stage of ours made the weights, also where they were exported since."""
    said = manifest or {}
    return said.get(EXPORTED, said).get("stage") is not None


def places_referenced(content: dict[str, Any]) -> dict[str, Any]:
    """What a stage was made from, and its template, without what the environment said."""
    return _places(content, referenced)


def places_filled_in(content: dict[str, Any]) -> dict[str, Any]:
    """The same with it."""
    return _places(content, filled_in)


def _places(content: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """Hashes stay: digits of theirs may be a value of the environment by chance."""
    changed = dict(content)
    for group in ("parents", "inputs"):
        if isinstance(entries := content.get(group), dict):
            changed[group] = {
                change(role): {**entry, "path": change(entry["path"])}
                for role, entry in entries.items()
            }
    for key in (
        "template",
        "chat_args",
        "metrics",
        "undefined",
    ):  # an evaluation's figures stand under the paths of policies
        if key in content:
            changed[key] = change(content[key])
    return changed


def read_object(file: Path, form: Form) -> dict[str, Any]:
    """A JSON file of a model folder that must hold an object of this form.

    Raises:
        UserError: it cannot be read, is no JSON, or is of another form.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        fault = misfit(content, form)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):  # no text, no JSON, or nested without end
        fault = "this is no JSON"
    if fault is not None:
        raise UserError(
            f"{file}: damaged: {fault}; make the folder again, by the stage that wrote it, with "
            "overwrite=true"
        )
    return dict(content)


def adapter_base(path: str | Path) -> str | None:
    """The base model that an adapter folder names; None where `path` is no adapter folder."""
    file = Path(path) / ADAPTER_CONFIG
    return str(read_object(file, ADAPTER)["base_model_name_or_path"]) if file.is_file() else None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; of an adapter folder, of its base where that is local."""
    file = Path(adapter_base(folder) or folder) / "config.json"
    return read_object(file, CONFIG) if file.is_file() else {}


def kind_of(folder: Path) -> str:
    """policy or reward, by stage.json, else by the architecture in config.json; of one that is not
    known, by whether there is a scalar head.
    """
    manifest = read_manifest(folder)
    if manifest is not None:
        return str(manifest["kind"])
    adapter = folder / ADAPTER_CONFIG
    if adapter.is_file() and read_object(adapter, ADAPTER).get("task_type") in CLASSIFYING:
        return "reward"
    architectures = read_config(folder).get("architectures") or []
    if any(name.endswith(CLASSIFIERS) for name in architectures):
        return "reward"
    speaks = any(name.endswith(LANGUAGE_MODELS) for name in architectures)
    return "reward" if not speaks and scalar_heads(shapes_of(folder)) else "policy"


def scalar_heads(shapes: Shapes) -> list[str]:
    """The layers to one label that are in no block of layers: what can be the head of a scorer."""
    return [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and shape[0] == 1 < shape[1]
        if not any(part.isdigit() for part in name.split("."))
    ]


def level_of(path: str) -> str:
    """The level of a reward folder, by stage.json; a foreign one scores whole responses."""
    return str((read_manifest(path) or {}).get("level", RESPONSE))


def check_level(path: str, level: str) -> None:
    """A reward folder judges what it is to go on judging.

    Raises:
        UserError: it judges something else.
    """
    if (own := level_of(path)) != level:
        raise UserError(
            f"policy={path} is a reward model that judges each {own}, and this loss each {level}; "
            "give one of its level, or a policy"
        )


def implicit_reward_of(path: str) -> dict[str, Any] | None:
    """What a dpo output says of its implicit reward: beta and the reference; None elsewhere."""
    return (read_manifest(path) or {}).get("implicit_reward")


def accuracy_by_source(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of each of several data.sources what a reward model's metrics say of its held-out rows:
    accuracy, accuracy_stderr, accuracy_low and accuracy_high. None where too few tell no error.
    """
    found: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        if (match := ACCURACY_ON.fullmatch(name)) is not None and math.isfinite(value):
            found.setdefault(match[1], {})[match[2]] = value
    return {source: figures for source, figures in found.items() if len(figures) == 4}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model or adapter folder."""
    return sorted(folder.glob("*.safetensors"))


def read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """The size of a safetensors header in bytes, and its entries: name -> dtype, shape, offsets.

    Raises:
        UserError: it cannot be read, or is none.
    """
    if file.exists() and not file.is_file():  # of a pipe, reading would not begin
        raise UserError(f"{file}: not a file, so no weights")
    try:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            if size > file.stat().st_size - 8:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(stream.read(size))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        fault = misfit(entries, HEADER)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (struct.error, ValueError, AttributeError, RecursionError):
        fault = "no safetensors"
    if fault is not None:
        raise UserError(f"{file}: damaged weights (unreadable header: {fault})")
    return size, entries


def shapes_of(folder: Path) -> Shapes:
    """The shape of each weight in a model or adapter folder; empty where there is none."""
    return {
        name: tuple(entry["shape"])
        for file in weight_files(folder)
        for name, entry in read_header(file)[1].items()
    }


def numbers_by_type(folder: Path) -> dict[str, int]:
    """How many numbers of each type the weights of a folder have, by name: F32, BF16, ..."""
    numbers: Counter[str] = Counter()
    for file in weight_files(folder):
        for entry in read_header(file)[1].values():
            numbers[entry["dtype"]] += math.prod(entry["shape"])
    return numbers


def beginnings(folder: Path, names: Collection[str]) -> dict[str, bytes]:
    """Up to 4096 bytes of each of these weights, where a folder has them."""
    starts = {}
    for file in weight_files(folder):
        size, entries = read_header(file)
        with file.open("rb") as stream:
            for name in entries.keys() & set(names):
                start, end = entries[name]["data_offsets"]
                stream.seek(8 + size + start)
                starts[name] = stream.read(min(end - start, 4096))
    return starts


def file_hash(*files: Path) -> str:
    """SHA-256 over the names and hashes of files, shortened to 16 digits."""
    digest = hashlib.sha256()
    for file in files:
        try:
            digest.update(f"{file.name}\0{sha256(file)}\n".encode())
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()[:16]


def text_hash(text: str) -> str:
    """SHA-256 of a text, shortened to 16 digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; a large one is read once while it seems the same.

    Raises:
        OSError: it cannot be read.
    """
    status = file.stat()
    if status.st_size < SMALL:
        return _sha256(file)
    return _known_sha256(file.resolve(), status.st_size, status.st_mtime_ns, status.st_ino)


@cache
def _known_sha256(file: Path, size: int, mtime_ns: int, inode: int) -> str:
    return _sha256(file)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_hash(path: str) -> str:
    """Identity of a stage's folder: all that a stage loads of a model, and of an adapter's local
    base, and the scale of its reward; the rows that generate and label leave, whenever they were
    labelled. A hub id stands for itself.
    """
    folder = Path(path)
    if not folder.is_dir():
        return path
    base, said = adapter_base(folder), read_manifest(folder) or {}
    files = [
        file
        for place in (folder, *([Path(base)] if base is not None else []))
        for file in (*weight_files(place), *(place / name for name in LOADED))
        if file.is_file()
    ]
    if said.get("kind") in OF_ROWS:
        rows = set(folder.glob("*.jsonl")) - set(folder.glob(EVENTS.format("*")))
        files += [file for file in sorted(rows) if file.name in said.get("files", {})]
    scale = [said.get("reward"), said.get("implicit_reward")]
    whole = f"{file_hash(*files)} {json.dumps(scale, sort_keys=True)}"
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def tokenizer_hash(folder: Path) -> str | None:
    """Identity of a tokenizer: its vocabulary and merges; None where no tokenizer.json lies."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    model = read_object(file, TOKENIZER)["model"]
    return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()[:16]


def reference_folder(path: str, implicit: dict[str, str]) -> str:
    """Where the reference of a policy trained by dpo lies; unchanged since.

    Raises:
        UserError: it is gone, or has changed.
    """
    inside = Path(path) / implicit["reference"]
    reference = str(inside) if inside.is_dir() else implicit["reference"]
    if content_hash(reference) != implicit["hash"]:
        state = "has changed since" if Path(reference).is_dir() else "is gone"
        raise UserError(
            f"{path} as a reward is beta log(policy / reference), but its reference "
            f"{os.path.normpath(inside)} {state}; run dpo again, or give a reward model"
        )
    return reference
