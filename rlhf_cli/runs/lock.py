"""One process at a time writes an `out` folder.

The locks are the kernel's and go with the process, however that ends. One is on the folder itself,
so that no file need stay where it is; the other on a file in it, which says whose both are, and
keeps processes apart where a file system locks no folders. What can still go, the folder or such a
file, is looked for before each write.
"""

import atexit
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rlhf_cli.config.errors import Busy, RunError, UserError
from rlhf_cli.reporting.console import say
from rlhf_cli.runs.interrupts import before_the_end

LOCK = ".lock"
TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
PATIENCE = 0.3  # seconds: `running` holds a lock for a moment
# a pipe that nobody reads is not waited for, and what a link leads to is not ours to write
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass
class _Held:
    """The locks of a folder: whose they are, and the descriptors that bear them.

    folder: None where the file system locks no folders.
    """

    process: int
    folder: int | None
    file: int

    def lost(self, out: Path) -> str | None:
        """What another process could by now have a lock on in our stead; None if there is none."""
        if self.folder is not None:
            return None if _is_that_of(self.folder, out) else str(out)
        return None if _is_that_of(self.file, out / LOCK) else str(out / LOCK)

    def close(self) -> None:
        for handle in (self.file, self.folder):
            if handle is not None:
                os.close(handle)


class _Taken(Exception):
    """Another process has the lock."""


_held: dict[Path, _Held] = {}  # by the folder itself
_named: dict[Path, Path] = {}  # the folder that each name was locked as: a link may change


def lock(out: Path) -> None:
    """Take the lock of a folder that exists; a process that has it already keeps it.

    Raises:
        Busy: another process has it.
        UserError: something else lies where its file belongs.
    """
    folder = out.resolve()
    ours = _held.get(folder)
    if ours is not None and ours.process == os.getpid():
        if ours.lost(folder) is None:
            return
        _held.pop(folder).close()
    until = time.monotonic() + PATIENCE
    while True:
        try:
            held = _taken(folder)
            break
        except _Taken:
            if time.monotonic() >= until:
                other = writer_of(folder) or "another process"
                raise Busy(f"out={out} is being written by {other}") from None
            time.sleep(0.02)
    if held is None:
        return
    os.ftruncate(held.file, 0)
    os.pwrite(held.file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    _held[folder] = held
    _named[out.absolute()] = folder


def _taken(out: Path) -> _Held | None:
    """Both locks, or that of the file alone; None, and a line, where there are no locks at all.

    Raises:
        _Taken: another process has one.
        UserError: see `_opened`.
    """
    folder: int | None = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    assert folder is not None
    try:
        fault = _flock(folder)
        if fault is not None:  # as on NFS, which locks what can be written only
            os.close(folder)
            folder = None
        file = _opened(out / LOCK)
    except BaseException:
        if folder is not None:
            os.close(folder)
        raise
    held = _Held(os.getpid(), folder, file)
    try:
        fault = _flock(file)
        if fault is not None and folder is None:
            say(f"note: nothing keeps two runs apart in {out}: no locks ({fault})")
            held.close()
            return None
        if not _is_that_of(file, out / LOCK):
            raise _Taken  # its owner gave it back, and removed the file, after we opened it
    except _Taken:
        held.close()
        raise
    return held


def _flock(handle: int, kind: int = fcntl.LOCK_EX) -> str | None:
    """Take a lock; returns why it cannot be taken there by anyone.

    Raises:
        _Taken: another process has it.
    """
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in TAKEN:
            raise _Taken from None
        return error.strerror or str(error)
    return None


def _opened(file: Path) -> int:
    """The file of a lock.

    Raises:
        UserError: what lies there is no file: a folder, a link, a pipe.
    """
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | _FILE, 0o666)
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
            raise
        raise UserError(f"{file} is no file; remove it: a run keeps its lock there") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{file} is no file; remove it: a run keeps its lock there")
    return handle


def check_lock(out: Path) -> None:
    """Stop a run that could write beside another one: to be asked before each write.

    Raises:
        RunError: the folder, or where only that bears a lock its file, is not the one that this
            process has locked.
    """
    folder = _named.get(out.absolute())
    held = _held.get(folder) if folder is not None else None
    if folder is None or held is None or held.process != os.getpid():
        return
    place = held.lost(folder) if out.resolve() == folder else str(out)
    if place is not None:
        raise RunError(
            f"{place} was removed or replaced while this run wrote there; nothing more is written, "
            "for another run may write there now. Run the same command again"
        )


def running(out: Path) -> str | None:
    """Which other process writes a folder; None where none does."""
    folder = out.resolve()
    if folder in _held:
        return None
    for place, how in ((folder, os.O_DIRECTORY), (folder / LOCK, _FILE)):
        with _open_to_read(place, how) as handle:
            try:
                if handle is not None:
                    _flock(handle, fcntl.LOCK_SH)
            except _Taken:
                return writer_of(folder) or "another process"
    return None


@contextmanager
def _open_to_read(place: Path, how: int) -> Iterator[int | None]:
    """A descriptor; None where there is none to be had."""
    try:
        handle = os.open(place, os.O_RDONLY | how)
    except OSError:
        yield None
        return
    try:
        yield handle
    finally:
        os.close(handle)


def unlock(out: Path) -> None:
    """Give a lock back and remove its file, if this process has it."""
    folder = out.resolve()
    held = _held.pop(folder, None)
    if held is None or held.process != os.getpid():  # a process forked from ours has it not
        return
    if _is_that_of(held.file, folder / LOCK):
        with suppress(OSError):  # on a disk that is read-only now it stays, and says nothing
            (folder / LOCK).unlink()
    held.close()


@before_the_end
@atexit.register
def _unlock_all() -> None:
    for folder in list(_held):
        unlock(folder)


def writer_of(out: Path) -> str:
    """Whose lock it is, or was if that was killed: `process 7 on host`, as its file says; nothing
    where that does not say.
    """
    with _open_to_read(out / LOCK, _FILE) as handle:
        if handle is None or not stat.S_ISREG(os.fstat(handle).st_mode):
            return ""
        return os.pread(handle, 200, 0).decode(errors="replace")


def _is_that_of(handle: int, place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(place, follow_symlinks=False))
    except OSError:
        return False
