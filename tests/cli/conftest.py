"""A finished policy, adapter and reward model to change, made once."""

import contextlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from rlhf_cli.cli import main
from rlhf_cli.config.compose import compose
from tests.cli.made import ADAPTER, REWARD, SFT
from tests.conftest import Cli


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows.jsonl and, under runs/demo, a policy, an adapter of it and a reward."""
    from rlhf_cli.stages import dpo, reward, sft

    folder = tmp_path_factory.mktemp("made")
    names = [f"{first}{second}" for first in "ABCDEF" for second in ("nn", "da", "lf", "ro")]
    rows = [{"prompt": f"Greet {n}: ", "chosen": f"Hi {n}!", "rejected": "No."} for n in names]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with contextlib.chdir(folder):
        for stage, words in ((sft, SFT), (reward, REWARD), (dpo, ADAPTER)):
            name, *overrides = words.split()
            stage.run(compose(name, overrides))
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """The test's own copy of that folder, which is where `cli` runs."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Cli:
    """`rlhf-cli WORDS...` in this process, which has imported what a new one takes a second for."""

    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["rlhf-cli", *words])
        status = main()
        shown = capsys.readouterr()
        return subprocess.CompletedProcess(words, status, shown.out, shown.err)

    return run
