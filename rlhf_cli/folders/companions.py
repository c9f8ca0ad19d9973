"""The files of a model folder that are neither weights, tokenizer nor a run's own."""

import shutil
from collections.abc import Sequence
from pathlib import Path

PATTERNS = (
    *("*processor_config.json", "*.tiktoken", "additional_chat_templates"),
    *("LICENSE*", "LICENCE*", "NOTICE*"),
)
CODE = "*.py"


def copy_companions(places: Sequence[Path], dest: Path, code: bool) -> None:
    """Copy what other tools read beside weights and tokenizer, and what must go along with them.

    Args:
        places: a model folder, and the base that it is an adapter on; the first that has a file
            gives it.
        code: whether Python files of the model come along.
    """
    for place in reversed(places):
        for pattern in (*PATTERNS, *([CODE] if code else [])):
            for entry in place.glob(pattern):
                if entry.is_dir():
                    shutil.copytree(entry, dest / entry.name, dirs_exist_ok=True)
                else:
                    shutil.copyfile(entry, dest / entry.name)
