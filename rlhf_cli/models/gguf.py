"""GGUF files, which llama.cpp runs, through its own converter where that is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from rlhf_cli.config.errors import RunError, UserError

SCRIPT = "convert_hf_to_gguf.py"
HOME = "LLAMA_CPP"  # the variable that names a checkout of llama.cpp


def converter() -> list[str]:
    """The command that the converter is started by: $LLAMA_CPP/convert_hf_to_gguf.py, or PATH's.

    Raises:
        UserError: there is none; says how to get it.
    """
    if home := os.environ.get(HOME):
        script = Path(home).expanduser() / SCRIPT
        if not script.is_file():
            raise UserError(f"gguf: {HOME}={home} holds no {SCRIPT}; name a checkout of llama.cpp")
        return [sys.executable, str(script.resolve())]
    if (found := shutil.which(SCRIPT)) is not None:
        return [found]
    raise UserError(
        f"gguf: {SCRIPT} is not on PATH: git clone https://github.com/ggml-org/llama.cpp, "
        f"pip install gguf sentencepiece, and set {HOME} to that folder"
    )


def convert(command: list[str], folder: Path, file: Path, outtype: str) -> None:
    """Write a model folder as one GGUF file.

    Args:
        command: from `converter`.
        outtype: the type of its weights, as the converter calls it: f16, bf16, q8_0, ...

    Raises:
        RunError: the converter failed, with its last line.
    """
    words = [str(folder.resolve()), "--outfile", str(file.resolve()), "--outtype", outtype]
    try:
        done = subprocess.run(
            [*command, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    except OSError as error:
        raise RunError(f"gguf: {command[-1]} does not start: {error.strerror}") from None
    if done.returncode or not file.is_file():
        said = (done.stderr.strip() or done.stdout.strip() or "it wrote no file").splitlines()
        raise RunError(f"gguf: {SCRIPT} failed ({done.returncode}): {said[-1]}")
