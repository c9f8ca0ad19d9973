"""A vLLM server of the stage's own: started on named GPUs, and gone when the stage is."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rlhf_cli.config.errors import UserError
from rlhf_cli.rollout import server_keeper
from rlhf_cli.rollout.server_client import ServerFault

HOST = "127.0.0.1"
LEAST = (0, 30)
WANTED = f"vllm>={LEAST[0]}.{LEAST[1]}"
LOG = "vllm.log"
LAST_LINES = 3  # of its log that are shown where it ends
# of a rank among others: a server that finds them takes itself for one
OF_RANKS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"),
)

_running: list["ServerProcess"] = []  # one at a time: the devices are taken


def program() -> str:
    """The command vllm: beside this Python, or on PATH.

    Raises:
        UserError: there is none, or it is too old, as far as can be told before it runs.
    """
    found = shutil.which("vllm", path=str(Path(sys.executable).parent)) or shutil.which("vllm")
    if found is None:
        raise UserError(
            f"hardware.rollout_devices needs {WANTED}: pip install 'rlhf-cli[vllm]', or start a "
            "server elsewhere and give hardware.rollout_server=http://HOST:PORT"
        )
    with suppress(PackageNotFoundError):
        if Path(found).parent == Path(sys.executable).parent and too_old(have := version("vllm")):
            raise UserError(f"hardware.rollout_devices needs {WANTED}, and {have} is installed")
    return found


def check_installed() -> None:
    """This Python has vLLM, whose communicator weights go through by NCCL.

    Raises:
        UserError: it has none, or one that is too old.
    """
    try:
        have = version("vllm")
    except PackageNotFoundError:
        have = "none"
    if have == "none" or too_old(have):
        raise UserError(
            f"hardware.rollout_sync=nccl needs {WANTED} on this side as well, and {have} is "
            "installed: pip install 'rlhf-cli[vllm]', or set hardware.rollout_sync=files"
        )


def too_old(have: str) -> bool:
    """Whether a version of vLLM has not all routes that are asked."""
    numbers = tuple(int(each) for each in have.split(".")[:2] if each.isdigit())
    return len(numbers) == 2 and numbers < LEAST  # a build from source may have no number


class ServerProcess:
    """`vllm serve` of a model folder. It ends with `stop`, and with this process at the latest."""

    def __init__(
        self, model: str | Path, devices: Sequence[int], folder: Path, words: Sequence[str]
    ) -> None:
        """
        Args:
            model: a folder or hub id.
            devices: GPUs as this process counts them.
            folder: where its log goes.
            words: further ones of the command line.
        """
        end_others()
        self.log = folder / LOG
        port = free_port()
        self.url = f"http://{HOST}:{port}"
        command = [program(), "serve", str(model), "--host", HOST, "--port", str(port)]
        command += ["--tensor-parallel-size", str(len(devices)), *words]
        keeper = [sys.executable, "-I", "-S", server_keeper.__file__, str(os.getpid())]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*keeper, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment_of(os.environ, devices),
                start_new_session=True,  # a signal to our group is ours to answer
            )
        self.stop = weakref.finalize(self, _end, self._process, os.getpid())
        _running.append(self)

    def alive(self) -> None:
        """Nothing, as long as it runs.

        Raises:
            ServerFault: it has ended; with the last lines of its log.
        """
        if (status := self._process.poll()) is None:
            return
        lines = [line.strip() for line in self.log.read_text("utf-8", "replace").splitlines()]
        last = " | ".join([line for line in lines if line][-LAST_LINES:])
        raise ServerFault(f"vllm serve has ended with status {status}: {last} ({self.log})")


def end_others() -> None:
    """End the server that runs, if one does: its GPUs are wanted."""
    while _running:
        _running.pop().stop()


def _end(process: "subprocess.Popen[bytes]", owner: int) -> None:
    """Ask the keeper, which ends the server, and wait for both; a fork of its owner leaves it."""
    if os.getpid() != owner:
        return
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(2 * server_keeper.PATIENCE)


def environment_of(own: Mapping[str, str], devices: Sequence[int]) -> dict[str, str]:
    """What a server's environment is: ours, with its GPUs and the routes that change weights."""
    kept = {name: value for name, value in own.items() if name not in OF_RANKS}
    visible = own.get("CUDA_VISIBLE_DEVICES", "").split(",")
    named = [visible[i] if len(visible) > i and visible[0] else str(i) for i in devices]
    changing = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    return {**kept, "CUDA_VISIBLE_DEVICES": ",".join(named), **changing}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as own:
        own.bind((HOST, 0))
        port: int = own.getsockname()[1]
        return port
