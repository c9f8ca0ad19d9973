"""`rlhf-cli export DIR DEST`: a finished model as other tools take it; `merge` is the same."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_cli.commands.help import columns
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.hints import nearest
from rlhf_cli.config.paths import is_path
from rlhf_cli.reporting.terminal import print_path

if TYPE_CHECKING:
    from rlhf_cli.runs.export import Export

USAGE = """\
rlhf-cli export: write a finished policy or reward model for other tools: an adapter merged into its
base, weights cast and sharded, with tokenizer, chat template, stop ids and a model card.

Usage: rlhf-cli export DIR DEST [KEY=VALUE ...]; merge is another word for it

  DIR   the folder of a stage or of another tool, or a hub id; an adapter or a whole model
  DEST  the folder to write; stages take it as policy= or reward=

Keys"""


class Key(NamedTuple):
    """A key of the command.

    value: as it is where nothing is said.
    form: what values look like.
    takes: the same in words, or the values themselves, between bars.
    """

    value: str
    form: re.Pattern[str]
    takes: str
    meaning: str

    @property
    def words(self) -> tuple[str, ...]:
        """The values that it knows; none where it takes others."""
        words = tuple(self.takes.split("|"))
        return words if all(map(self.form.fullmatch, words)) else ()


def _of(value: str, takes: str, meaning: str) -> Key:
    return Key(value, re.compile(takes), takes, meaning)


NAME = re.compile(r"\S+")
SIZE = re.compile(r"[1-9]\d*(\.\d+)?[KMGT]B", re.IGNORECASE)
KEYS = {
    "save_dtype": _of(
        "source",
        "source|float32|bfloat16|float16",
        "Type of the weights; source is that of DIR, of an adapter that of its base.",
    ),
    "shard_size": Key("5GB", SIZE, "size such as 500MB", "Largest file of weights."),
    "gguf": Key(
        "null",
        re.compile(r"\w+"),
        "f16, bf16, q8_0, ... or null",
        "Write a GGUF file too, by llama.cpp's convert_hf_to_gguf.py, which takes the type.",
    ),
    "push": Key("null", NAME, "OWNER/NAME or null", "Upload DEST to this repository of the hub."),
    "private": _of("true", "true|false", "Whether that repository is private."),
    "overwrite": _of(
        "false", "true|false", "Make DEST anew if an export wrote it; nothing else is replaced."
    ),
    "trust_remote_code": _of(
        "false", "true|false", "Let Python code run that DIR brings along, and copy it to DEST."
    ),
}


def run(words: list[str]) -> None:
    """Write DEST and print its path.

    Raises:
        UserError: the command is wrong, DIR is no finished model, or DEST is taken.
        RunError: the disk, the converter or the hub fails.
    """
    if {"--help", "-h"} & set(words):
        rows = [(f"{name}={key.value}", key.takes, key.meaning) for name, key in KEYS.items()]
        print(f"{USAGE}\n{columns(rows)}")
        return
    order = parse(words)
    from rlhf_cli.runs.export import export

    print_path(export(order))


def parse(words: list[str]) -> "Export":
    """DIR, DEST and the values of all keys.

    Raises:
        UserError: a word is missing, or is none of the command.
    """
    places = [word for word in words if not _is_key(word)]
    given = dict(word.split("=", 1) for word in words if _is_key(word))
    # messages of loading call keys as stages do
    given = {name.removeprefix("model."): value for name, value in given.items()}
    for name, value in given.items():
        _check(name, value)
    if wrong := next((word for word in places if word.startswith("-")), None):
        raise UserError(f"export: unknown flag {wrong}; see rlhf-cli export --help")
    if len(places) != 2 or not all(word and is_path(word) for word in places):
        raise UserError("export takes two folders: rlhf-cli export DIR DEST, as in export runs/a b")
    values: dict[str, Any] = {name: key.value for name, key in KEYS.items()} | given
    for name, value in values.items():
        values[name] = {"true": True, "false": False, "null": None}.get(value, value)
    from rlhf_cli.runs.export import Export

    values["shard_size"] = values["shard_size"].upper()
    return Export(places[0], Path(places[1]), **values)


def _is_key(word: str) -> bool:
    """Whether a word is KEY=VALUE; a path may hold = behind a separator."""
    name, equals, _ = word.partition("=")
    return bool(equals) and re.fullmatch(r"[\w.]+", name) is not None


def _check(name: str, value: str) -> None:
    if name not in KEYS:
        hint = nearest(name, KEYS) or f"; export has {', '.join(KEYS)}"
        raise UserError(f"export: unknown key {name}{hint}")
    if KEYS[name].form.fullmatch(value) is None:
        raise UserError(f"export: {name} must be {KEYS[name].takes}, got {value or 'nothing'}")
