"""What all tests share: no network, the console script as a user starts it, and a tiny chain."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from rlhf_cli.config.compose import compose
from tests.endpoints import FakeJudge, Verdict
from tests.tiny import WORDS, rows_of, words_of

hypothesis.settings.load_profile("ci")  # the same examples each time, on a busy machine as well
os.environ["HF_HUB_OFFLINE"] = "1"
# Commands draw less where a service sets CI, and as wide as these say: tests say so where they ask.
for name in ("CI", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
    os.environ.pop(name, None)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before a test wakes cuBLAS

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_configure() -> None:
    """Ctrl-C means to a command what it means in a shell, in a job in the background as well, which
    is started with it ignored: commands that tests start would inherit that.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a GPU is skipped where there is none. All other tests run on either device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device here"))


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """Ctrl-C ends pytest as ever after a test that called `main`, which takes signals for good."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Run `rlhf-cli WORDS...` in an empty folder; keywords are environment variables."""
    script = Path(sys.executable).parent / "rlhf-cli"

    def run(*words: str, cwd: Path = tmp_path, **env: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [str(script), *words],
            cwd=cwd,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


STEP_JUDGE = """
def short(prompts, steps):
    return [[1.0 if len(step) < 3 else None if "o" in step else 0.0 for step in own]
            for own in steps]
"""


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows of every kind and, made from pairs, runs/demo/{sft,reward,adapter}.

    runs/demo/reward_adapter is a reward model that was trained as an adapter.
    """
    folder = tmp_path_factory.mktemp("chain")
    for file, content in rows_of().items():
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{file}.jsonl").write_text(lines)
    (folder / "steps.py").write_text(STEP_JUDGE)
    with contextlib.chdir(folder):
        for stage, more in (
            ("sft", ["algo.epochs=8", "algo.max_steps=null"]),
            ("reward", ["algo.epochs=6"]),
            ("reward", [*WORDS["lora"], "out=runs/demo/reward_adapter", "algo.epochs=6"]),
            ("dpo", [*WORDS["lora"], "out=runs/demo/adapter", "algo.epochs=2"]),
        ):
            run = importlib.import_module(f"rlhf_cli.stages.{stage}").run
            run(compose(stage, [*words_of(stage), "hardware.save_every=null", *more]))
    return folder


@pytest.fixture
def inside(chain: Path) -> Iterator[None]:
    """Work in the chain's folder, as a user would."""
    with contextlib.chdir(chain):
        yield


@pytest.fixture
def fake() -> Iterator[Callable[..., FakeJudge]]:
    """Starts judges that go by a function, which end with the test."""
    servers: list[FakeJudge] = []

    def start(verdict: Verdict, **more: bool) -> FakeJudge:
        servers.append(FakeJudge(verdict, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.end()
