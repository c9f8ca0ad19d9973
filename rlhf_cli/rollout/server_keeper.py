"""Runs a command until it ends or until the process that wanted it is gone, by whatever way.

    python server_keeper.py PARENT PROGRAM WORDS...

A stage that is killed cannot end its server. This small process can: it looks whether its parent is
still there, and then ends the command with all that it has started. Nothing of rlhf_cli or torch is
imported, so that it takes no memory to speak of.
"""

import os
import signal
import subprocess
import sys
import time
from types import FrameType

LOOKS = 0.5  # seconds between two looks
PATIENCE = 10.0  # seconds that a server has to end by itself


def main(parent: int, command: list[str]) -> int:
    """The exit status of the command."""
    asked = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, ask)
    if os.getppid() != parent:
        return 0
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    while child.poll() is None:
        if asked or os.getppid() != parent:
            end(child)
        time.sleep(LOOKS)
    kill_group(child.pid, signal.SIGKILL)  # what it left behind
    return child.returncode


def end(child: "subprocess.Popen[bytes]") -> None:
    """End a command and its processes: asked first, then killed."""
    kill_group(child.pid, signal.SIGTERM)
    try:
        child.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        kill_group(child.pid, signal.SIGKILL)
        child.wait()


def kill_group(group: int, number: int) -> None:
    """Send a signal to all processes of a group that are left."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
