"""One process at a time writes an `out` folder.

The lock is the kernel's and goes with the process, however that ends; the file that bears it only
says whose it is.
"""

import atexit
import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from rlhf_cli.config.errors import UserError
from rlhf_cli.reporting.console import say
from rlhf_cli.runs.interrupts import before_the_end

LOCK = ".lock"
TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
PATIENCE = 0.3  # seconds: `running` holds a lock for a moment
_held: dict[Path, tuple[int, int]] = {}  # folder -> process, file descriptor


def lock(out: Path) -> None:
    """Take the lock of a folder that exists; a process that has it already keeps it.

    Raises:
        UserError: another process has it.
    """
    folder = out.resolve()
    if _held.get(folder, (0, 0))[0] == os.getpid():
        return
    file = folder / LOCK
    until = time.monotonic() + PATIENCE
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = _owner(handle)
            os.close(handle)
            if error.errno not in TAKEN:
                say(f"note: nothing keeps two runs apart in {out}: no locks ({error.strerror})")
                return
            if time.monotonic() < until:
                time.sleep(0.02)
                continue
            raise UserError(f"out={out} is being written by {owner}") from None
        if _is_that_of(handle, file):
            break
        os.close(handle)  # its owner gave it back, and removed the file, after we opened it
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    _held[folder] = os.getpid(), handle


def running(out: Path) -> str | None:
    """Which other process writes a folder; None where none does."""
    if out.resolve() in _held:
        return None
    try:
        handle = os.open(out / LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return _owner(handle) if error.errno in TAKEN else None
    finally:
        os.close(handle)
    return None


def unlock(out: Path) -> None:
    """Give a lock back and remove its file, if this process has it."""
    folder = out.resolve()
    owner, handle = _held.pop(folder, (0, 0))
    if owner == os.getpid():  # a process that was forked from ours has it not
        (folder / LOCK).unlink(missing_ok=True)
        os.close(handle)


@before_the_end
@atexit.register
def _unlock_all() -> None:
    for folder in list(_held):
        unlock(folder)


def _owner(handle: int) -> str:
    return os.pread(handle, 200, 0).decode(errors="replace") or "another process"


def _is_that_of(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except FileNotFoundError:
        return False
