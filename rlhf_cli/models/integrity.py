"""Sizes and hashes of a folder's files: written into its manifest, compared when it is read.

A disk that lies, a copy that stopped, an edited file: each is told before anything is made of it.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

Files = dict[str, dict[str, int | str]]


def sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
