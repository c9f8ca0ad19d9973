"""The files of a model folder that are neither weights nor a run's own: what other tools read."""

import shutil
from pathlib import Path

TOKENIZER_OF = ("tokenizer_config.json", "tokenizer.json")  # a folder with one has a tokenizer
TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "*.tiktoken", "chat_template.*", "additional_chat_templates"),
)
GENERATION = "generation_config.json"
OTHERS = ("*processor_config.json", "LICENSE*", "LICENCE*", "NOTICE*")
CODE = "*.py"


def tokenizer_place(*places: Path) -> Path | None:
    """The first of these folders that holds a tokenizer; None where none does."""
    held = (place for place in places if any((place / name).is_file() for name in TOKENIZER_OF))
    return next(held, None)


def copy_companions(places: list[Path], dest: Path, code: bool) -> None:
    """Copy what lies beside the weights, over what a library has written of it.

    A tokenizer is copied whole, from the first folder that has one; other files from the first
    that has them.

    Args:
        places: a model folder, and the base that it is an adapter on.
        code: whether Python files of the model come along.
    """
    if (first := tokenizer_place(*places)) is not None:
        for pattern in TOKENIZER:
            for entry in first.glob(pattern):
                _copy(entry, dest / entry.name)
    patterns = (GENERATION, *OTHERS, *([CODE] if code else []))
    for place in reversed(places):  # the first has the last word
        for pattern in patterns:
            for entry in place.glob(pattern):
                _copy(entry, dest / entry.name)


def _copy(entry: Path, target: Path) -> None:
    if entry.is_dir():
        shutil.copytree(entry, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(entry, target)
