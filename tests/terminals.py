"""Commands on a terminal, which begin and end by themselves."""

import os
import pty
import subprocess
from pathlib import Path


def on_a_terminal(command: list[str], cwd: Path | None = None, columns: int = 90) -> str:
    """All that a command wrote on a terminal; one that fails is an error."""
    reader, writer = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns)}
    process = subprocess.Popen(command, stdout=writer, stderr=writer, cwd=cwd, env=env)
    os.close(writer)
    said = b""
    try:
        while part := os.read(reader, 65536):
            said += part
    except OSError:  # how a terminal says that its last writer is gone
        pass
    os.close(reader)
    assert process.wait(60) == 0, said.decode()
    return said.decode()
