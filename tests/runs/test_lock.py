"""One process writes a folder, whatever is removed from it meanwhile."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.runs.lock import LOCK, check_lock, lock, running, unlock
from tests.conftest import Cli
from tests.tiny import words_of

HOLD = """
import sys, time
from pathlib import Path
from rlhf_cli.runs.lock import lock
lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def holding(out: Path) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", HOLD, str(out)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_lock_does_not_go_with_its_file(tmp_path: Path) -> None:
    other = holding(tmp_path)
    try:
        assert f"process {other.pid} on " in (running(tmp_path) or "")
        (tmp_path / LOCK).unlink()
        assert running(tmp_path) == "another process"
        with pytest.raises(UserError, match="is being written by another process"):
            lock(tmp_path)
    finally:
        other.kill()
        other.communicate()
    assert running(tmp_path) is None
    lock(tmp_path)
    check_lock(tmp_path)
    unlock(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_second_writer_is_told_to_try_again(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "out").mkdir()
    other = holding(tmp_path / "out")
    try:
        done = cli("sft", "out=out")
    finally:
        other.kill()
        other.communicate()
    assert done.returncode == 75  # EX_TEMPFAIL, upon which queues and loops wait
    assert done.stderr.startswith("rlhf-cli: error: out=out is being written by process ")
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def replaced(out: Path) -> None:
    shutil.rmtree(out)
    out.mkdir()


def led_elsewhere(out: Path) -> None:
    other = out.with_name("other")
    other.mkdir()
    out.unlink()
    out.symlink_to(other)


@pytest.mark.parametrize("loss", [shutil.rmtree, replaced, led_elsewhere])
def test_a_folder_that_is_gone_is_written_no_more(
    loss: Callable[[Path], None], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if loss is led_elsewhere:
        (tmp_path / "first").mkdir()
        out.symlink_to(tmp_path / "first")
    else:
        out.mkdir()
    lock(out)
    check_lock(out)
    loss(out)
    with pytest.raises(RunError, match=r"out was removed or replaced .* nothing more is written"):
        check_lock(out)


def test_without_locks_on_folders_the_file_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, where what is not open for writing cannot be locked."""
    flock = fcntl.flock

    def files_only(handle: int, kind: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(9, "Bad file descriptor")
        flock(handle, kind)

    monkeypatch.setattr("rlhf_cli.runs.lock.fcntl.flock", files_only)
    lock(tmp_path)
    check_lock(tmp_path)
    (tmp_path / LOCK).unlink()
    with pytest.raises(RunError, match=r"\.lock was removed or replaced"):
        check_lock(tmp_path)
    lock(tmp_path)  # whoever comes next takes it anew
    check_lock(tmp_path)
    unlock(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to itself", "link to a file"])
def test_what_is_no_file_in_the_place_of_the_lock_is_named(kind: str, tmp_path: Path) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    out.mkdir()
    victim.write_text("mine")
    file = out / LOCK
    match kind:
        case "folder":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
        case "link to itself":
            file.symlink_to(LOCK)
        case _:
            file.symlink_to(victim)
    assert running(out) is None
    with pytest.raises(UserError, match=r"\.lock is no file; remove it"):
        lock(out)
    assert victim.read_text() == "mine"


@pytest.mark.usefixtures("inside")
@pytest.mark.slow
def test_a_second_run_is_refused_though_the_file_was_removed(tmp_path: Path) -> None:
    """The first one stands still meanwhile; it goes on, and its log has each step once."""
    out = tmp_path / "out"
    script = str(Path(sys.executable).with_name("rlhf-cli"))
    words = [script, "ppo", *words_of("ppo"), f"out={out}", "algo.steps=60"]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(words, stdout=quiet, stderr=quiet) as first:
        log = out / "metrics.jsonl"
        while not log.exists() or log.read_bytes().count(b"\n") < 3:
            assert first.poll() is None
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)
        (out / LOCK).unlink()
        second = subprocess.run(words, capture_output=True, text=True)
        first.send_signal(signal.SIGCONT)
        assert first.wait() == 0
    assert second.returncode == 75 and "is being written by another process" in second.stderr
    assert log.read_bytes().count(b"\n") == 60
