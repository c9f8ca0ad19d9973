"""The wheel carries conf/, recipes/ and the demo rows, and works away from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        words, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel in it, as an installer would unpack it."""
    folder = tmp_path_factory.mktemp("wheel")
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder))
    run(*build, str(ROOT), cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
def test_the_wheel_carries_all_that_is_shipped(site: Path) -> None:
    for folder in ("conf", "recipes"):
        here, there = (
            {path.relative_to(top) for path in (top / folder).rglob("*.*")}
            for top in (ROOT, site / "rlhf_cli")
        )
        assert there == here
    rows = {path.name for path in (ROOT / "rlhf_cli" / "demo").glob("*.jsonl")}
    assert {path.name for path in (site / "rlhf_cli" / "demo").glob("*.jsonl")} == rows
    assert rows
    page = {path.name for path in (ROOT / "rlhf_cli" / "views" / "page").iterdir()}
    assert {path.name for path in (site / "rlhf_cli" / "views" / "page").iterdir()} == page


@pytest.mark.slow
def test_the_wheel_runs_from_another_folder(site: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from rlhf_cli import cli; "
        f"assert cli.__file__.startswith({str(site)!r}), cli.__file__; sys.exit(cli.main())"
    )
    for words in (
        ["--help"],
        ["ppo", "--help"],
        ["ls"],
        ["sft", "--cfg", "job"],
        ["sft", "--check"],
    ):
        run(sys.executable, "-c", code, *words, cwd=tmp_path, PYTHONPATH=str(site))
    run(sys.executable, "-c", code, "cp", "algo/ppo", ".", cwd=tmp_path, PYTHONPATH=str(site))
    assert [path.name for path in tmp_path.iterdir()] == ["ppo.yaml"]
