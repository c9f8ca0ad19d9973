"""A vLLM server of the stage's own: how it is started, and that it is gone when the stage is."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.rollout import server_client, server_keeper, server_process
from rlhf_cli.rollout.native import NativeEngine
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.rollout.server import ServerEngine
from rlhf_cli.rollout.server_process import ServerProcess, end_others, environment_of, too_old
from tests.rollout.test_server import drawn, encoder_of, fields, llama, moved
from tests.toys import bpe, hardware_of
from tests.vllm_stub import Stub, install, listening


@pytest.fixture(autouse=True)
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    install(tmp_path / "bin", sys.executable)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(server_client, "FIRST_PAUSE", 0.02)
    yield
    end_others()


def told(log: Path, lines: int = 2, seconds: float = 20.0) -> list[Any]:
    """The first lines of a log, once they are there: how it was called, and process ids."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = log.read_text().splitlines() if log.exists() else []
        if len(found) >= lines:
            return [json.loads(found[0]), *map(str.split, found[1:lines])]
        time.sleep(0.05)
    raise AssertionError(f"{log} has too few lines")


def gone(pids: list[str], seconds: float = 20.0) -> bool:
    """Whether processes end within some time; one that nobody has waited for counts as ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        states = [Path(f"/proc/{pid}/stat") for pid in pids]
        if all(not each.exists() or ") Z " in each.read_text() for each in states):
            return True
        time.sleep(0.05)
    return False


def test_words_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    monkeypatch.setenv("RANK", "0")
    server = ServerProcess(tmp_path / "model", [1, 2], tmp_path, ["--dtype", "bfloat16"])
    (words, environment), pids = told(server.log)
    port = server.url.rpartition(":")[2]
    assert words == [
        *("serve", str(tmp_path / "model"), "--host", "127.0.0.1", "--port", port),
        *("--tensor-parallel-size", "2", "--dtype", "bfloat16"),
    ]
    assert environment == {
        "CUDA_VISIBLE_DEVICES": "5,6",
        "VLLM_SERVER_DEV_MODE": "1",
        "RANK": None,
        "WORLD_SIZE": None,
    }
    server.alive()
    server.stop()
    assert gone(pids), "the server and what it started"
    assert environment_of({}, [1])["CUDA_VISIBLE_DEVICES"] == "1"


def test_another_one_ends_the_one_before(tmp_path: Path) -> None:
    """Policies that are evaluated side by side take the same GPUs in turn."""
    first = ServerProcess(tmp_path / "a", [0], tmp_path, [])
    _, pids = told(first.log)
    (tmp_path / "b").mkdir()
    ServerProcess(tmp_path / "b", [0], tmp_path / "b", [])
    assert gone(pids, 0.1)


def test_one_that_dies_is_told_with_its_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIES", "1")
    hardware = hardware_of(rollout="vllm", rollout_devices=[0], rollout_timeout=30.0)
    encoder = encoder_of()
    encoder.tokenizer = bpe()
    engine = ServerEngine(llama(), encoder, hardware, tmp_path / "w", True)
    with pytest.raises(RunError, match=r"ended with status 1: .*No available memory .*vllm\.log"):
        drawn(engine)


STAGE = """
import sys, time
from pathlib import Path
from rlhf_cli.rollout.server_process import ServerProcess
server = ServerProcess(Path("model"), [0], Path(sys.argv[1]), [])
while not server.log.read_text().count("\\n") > 1:
    time.sleep(0.05)
print("ready", flush=True)
if sys.argv[2] == "waits":
    time.sleep(600)
if sys.argv[2] == "raises":
    raise ValueError
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["returns", "raises", "SIGTERM", "SIGKILL"])
def test_it_ends_with_its_stage(end: str, tmp_path: Path) -> None:
    waits = "waits" if end.startswith("SIG") else end
    stage = subprocess.Popen(
        [sys.executable, "-c", STAGE, str(tmp_path), waits],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert stage.stdout is not None and stage.stdout.readline() == b"ready\n"
    _, pids = told(tmp_path / "vllm.log")
    if end.startswith("SIG"):
        assert not gone(pids, 0.1)
        os.killpg(stage.pid, getattr(signal, end))
    stage.wait(30)
    stage.stdout.close()
    assert gone(pids)


@pytest.mark.slow
def test_one_that_does_not_end_when_asked_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_keeper, "PATIENCE", 0.2)
    code = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); "
        "time.sleep(600)"
    )
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, start_new_session=True
    )
    assert child.stdout is not None and child.stdout.readline()
    server_keeper.end(child)
    child.stdout.close()
    assert child.returncode == -signal.SIGKILL


def test_a_missing_or_old_program_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"needs vllm>=0\.30: pip install 'rlhf-cli\[vllm\]'"):
        server_process.program()
    found = str(Path(sys.executable).parent / "vllm")
    monkeypatch.setattr("shutil.which", lambda name, path=None: found)
    monkeypatch.setattr(server_process, "version", lambda name: "0.29.1")
    with pytest.raises(UserError, match=r"needs vllm>=0\.30, and 0\.29\.1 is installed"):
        server_process.program()


@pytest.mark.parametrize(
    ("have", "old"),
    [
        *(("0.30.0", False), ("0.31.2", False), ("0.29.9", True), ("0.9.1", True)),
        *(("1.0.0", False), ("0.30.1rc2.dev4+gabc", False), ("dev", False)),
    ],
)
def test_versions(have: str, old: bool) -> None:
    assert too_old(have) == old


def test_an_engine_with_a_server_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts from the policy's weights, takes each update, and leaves no weights behind."""
    model, encoder, folder = llama(), encoder_of(), tmp_path / "w"
    moved(model).save_pretrained(tmp_path / "served")
    stub = Stub(tmp_path / "served")
    stub.label = "of another run"
    encoder.tokenizer = bpe()
    hardware = hardware_of(rollout="vllm", rollout_devices=[0], packing="false")
    greedy = Sampling(5, temperature=0.0)
    with listening(stub) as url:
        monkeypatch.setenv("STUB_URL", url)
        engine = ServerEngine(model, encoder, hardware, folder, False, trusts=True)
        model.processors = {"preprocessor_config.json": b"{}"}
        native = NativeEngine(model, encoder, hardware)
        assert fields(drawn(engine, greedy)) == fields(drawn(native, greedy))
        assert not {"/pause?mode=wait", "/collective_rpc"} & {*stub.routes}
        (words, _), pids = told(folder / "vllm.log")
        start = Path(words[1])
        assert start.parent == folder and start.name.endswith("-00000000")
        for pair in (
            "--max-model-len auto",
            "--dtype float32",
            "--logprobs-mode processed_logprobs",
        ):
            assert pair in " ".join(words)
        assert words[-1] == "--trust-remote-code"
        assert (start / "preprocessor_config.json").is_file()
        other = moved(model, 0.3)
        engine.update(other)
        native.update(other)
        assert fields(drawn(engine, greedy)) == fields(drawn(native, greedy))
        assert stub.routes.count("/collective_rpc") == 1
        assert not list(folder.rglob("*.safetensors")) and start.is_dir()
        end_others()
        assert gone(pids, 0.1)
        with pytest.raises(RunError, match="vllm serve has ended"):
            drawn(engine, greedy)
