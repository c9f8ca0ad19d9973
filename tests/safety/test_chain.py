"""What stages leave on disk, and what they read: no pickle, and permissions as the umask says."""

import json
import os
import pickle
import pickletools
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.safety.watched_chain import COMMANDS, MARKER, PLANTED
from tests.tiny import rows_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which every stage ran, watched, under umask 027."""
    folder = tmp_path_factory.mktemp("watched")
    for file, content in rows_of().items():
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{file}.jsonl").write_text(lines)
    done = subprocess.run(
        [sys.executable, "-m", "tests.safety.watched_chain"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.fixture
def seen(ran: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ran / "watched.json").read_text())
    assert found["statuses"] == [0] * len(COMMANDS)
    return found


def test_nothing_is_unpickled(ran: Path, seen: dict[str, Any]) -> None:
    assert seen["unpickled"] == ["pathlib.Path"]  # by the script itself, to show that it sees it
    assert not (ran / MARKER).exists()


def test_pickles_beside_what_is_read_are_not_opened(seen: dict[str, Any]) -> None:
    assert seen["opened"] == [PLANTED[0]]  # by the script itself


def is_pickle(file: Path) -> bool:
    """Whether a file is a pickle from end to end, or an archive as torch.save writes it."""
    if zipfile.is_zipfile(file):
        return True
    content = file.read_bytes()
    try:
        with warnings.catch_warnings(action="ignore"):  # texts have escapes that it knows not
            *_, (last, _, end) = pickletools.genops(content)
    except (ValueError, UnicodeDecodeError):
        return False
    return last.name == "STOP" and end == len(content) - 1


def test_what_a_pickle_looks_like(tmp_path: Path) -> None:
    import torch

    for protocol in (0, 2, 5):
        (tmp_path / "a").write_bytes(pickle.dumps({"a": [1, 2.5, "x"]}, protocol))
        assert is_pickle(tmp_path / "a")
    for new in (True, False):
        torch.save({"a": torch.ones(2)}, tmp_path / "a", _use_new_zipfile_serialization=new)
        assert is_pickle(tmp_path / "a") or not new
    (tmp_path / "a").write_text("{}\n")
    assert not is_pickle(tmp_path / "a")


def test_no_pickle_is_written(ran: Path, seen: dict[str, Any]) -> None:
    files = [path for path in ran.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".jsonl", ".yaml", ".png"}
    assert [str(path) for path in files if is_pickle(path)] == []


def test_permissions_are_as_the_umask_says(ran: Path, seen: dict[str, Any]) -> None:
    wrong = {
        str(path.relative_to(ran)): oct(path.stat().st_mode & 0o777)
        for path in (ran / "runs").rglob("*")
        if path.stat().st_mode & 0o777 != (0o750 if path.is_dir() else 0o640)
    }
    assert wrong == {}
