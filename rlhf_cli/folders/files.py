"""Files that are whole or not there: written aside, flushed to disk, then renamed.

A rename within one file system is atomic, and what was renamed survives a power cut once the folder
is flushed as well.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_cli.folders.integrity import described
from rlhf_cli.folders.manifest import MANIFEST, Manifest, places_referenced

PART = ".part"
# what a file system says of itself, rather than of the program that uses it
DISK_FAULTS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
)
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how libraries in Rust pass one on


def write_text(file: Path, text: str) -> None:
    """Write aside, flush to disk, then rename: readers see the old file or the whole new one."""
    part = file.with_name(f".{file.name}{PART}")
    remove([part])  # whatever it is: a pipe would be waited for
    with part.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)
    flush(file.parent)


def write_json(file: Path, value: Any) -> None:
    """`write_text` of a value as JSON, an entry a line."""
    write_text(file, json.dumps(value, indent=2) + "\n")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` to write into, which takes its place when the block ends.

    After an error nothing is left of it, and `folder` is as it was.
    """
    part = folder.with_name(f".{folder.name}{PART}")
    remove([part])
    part.mkdir(parents=True)
    try:
        with library_errors(part):
            yield part
        flush_all(part)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    remove([folder])
    part.rename(folder)
    flush(folder.parent)


def remove(entries: Iterable[Path]) -> None:
    """Files, links and folders with all below; what is not there is gone already."""
    for entry in list(entries):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


@contextmanager
def library_errors(folder: Path) -> Iterator[None]:
    """What safetensors and tokenizers raise where a file system fails, as the OSError it is."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        code = OS_ERROR.search(str(error))
        if code is None:
            raise
        number = int(code[1])
        raise OSError(number, os.strerror(number), str(folder)) from error


def seal(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Write stage.json, with the size and hash of each file: the folder is complete.

    Args:
        manifest: what it says else; what the environment said is left out of it.
        names: the entries of the folder that were written with it; of folders all below counts.
    """
    files = [
        str(path.relative_to(folder))
        for name in names
        for path in (folder / name, *(folder / name).rglob("*"))
        if path.is_file()
    ]
    told = places_referenced(manifest)
    write_json(folder / MANIFEST, {**told, "files": described(folder, files), "complete": True})


def seal_whole(folder: Path, manifest: Manifest) -> None:
    """`seal` a folder in which nothing else lies."""
    seal(folder, manifest, [path.name for path in folder.iterdir()])


def flush_all(folder: Path) -> None:
    """Flush a folder and all below to disk, with the permissions that the umask leaves."""
    for path in folder.rglob("*"):
        if path.is_file():
            as_umask_says(path)
        flush(path)
    flush(folder)


def as_umask_says(file: Path) -> None:
    """Give a file the permissions of a new one: libraries that write through temporary files leave
    theirs to their owner alone.
    """
    mask = os.umask(0o077)  # none can be read, set or not, but by setting it
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_fault(error: OSError) -> str | None:
    """In a few words what is wrong with the disk; None where it is not the disk's fault."""
    if error.errno not in DISK_FAULTS:
        return None
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
