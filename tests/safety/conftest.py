"""Folders of finished stages, to which a test adds what must not run; each has its own copy."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def place(chain: Path, tmp_path: Path) -> Path:
    """A copy of the chain's folder, which is where `cli` runs."""
    shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
    return tmp_path
