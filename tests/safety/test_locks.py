"""Every file that `make install` takes is known by its hash, what building takes too."""

import re
import subprocess
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
LOCKS = {file.name: file.read_text() for file in (ROOT / "requirements").glob("*.txt")}
ON_CPU = "+cpu" in distribution("torch").version
HASH = r"\n    --hash=sha256:[0-9a-f]{64}"
PIN = re.compile(rf"^([a-z0-9][a-z0-9.-]*)==(\S+)( ; [^\\]+)? \\({HASH} \\)*{HASH}$")
OTHER = re.compile(r"^(#.*|-r \w+\.txt)$")


def blocks(text: str) -> list[str]:
    return re.findall(r"^\S.*?(?=\n\S|\n*\Z)", text, re.MULTILINE | re.DOTALL)


def pins(lock: str) -> dict[str, str]:
    """name -> version, with those of the locks that it reads."""
    found: dict[str, str] = {}
    for block in blocks(LOCKS[lock]):
        if block.startswith("-r "):
            found |= pins(block.removeprefix("-r "))
        elif match := PIN.match(block):
            found[match[1]] = match[2]
    return found


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(package: str, extra: str) -> dict[str, str]:
    """name -> installed version of what a package needs here, and what that needs."""
    found: dict[str, str] = {}
    todo, seen = [(package, extra)], set()
    while todo:
        asked = todo.pop()
        if asked in seen:
            continue
        seen.add(asked)
        for line in distribution(asked[0]).requires or ():
            each = Requirement(line)
            if each.marker is None or each.marker.evaluate({"extra": asked[1]}):
                found[plain(each.name)] = distribution(each.name).version
                todo += [(each.name, more) for more in ("", *each.extras)]
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_each_line_of_a_lock_has_hashes_and_no_address(lock: str) -> None:
    for block in blocks(LOCKS[lock]):
        assert PIN.match(block) or OTHER.match(block), block.splitlines()[0]
    assert "://" not in LOCKS[lock] and "index" not in LOCKS[lock]


def test_what_is_needed_here_is_locked() -> None:
    locked = pins("cpu.txt" if ON_CPU else "default.txt")
    for name, version in needed("rlhf-cli", "dev").items():
        assert locked.get(name) == version, name
    assert {"setuptools", "hatchling"} <= pins("build.txt").keys()


def test_both_builds_of_pytorch_are_of_one_version() -> None:
    assert pins("cpu.txt")["torch"].removesuffix("+cpu") == pins("default.txt")["torch"]


def test_each_version_has_the_files_of_other_systems() -> None:
    """A package with compiled parts: at least three Pythons on two systems of two processors."""
    for name in ("numpy", "pandas", "pyarrow", "regex"):
        (block,) = (each for each in blocks(LOCKS["common.txt"]) if each.startswith(f"{name}=="))
        assert block.count("--hash") >= 12, name


def test_make_installs_by_hash_alone() -> None:
    """Nothing is built with what was not checked, and nothing is left to be resolved."""
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", "install", "wheel"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    installs = re.findall(r"^.*pip .*\binstall\b.*$", done.stdout, re.MULTILINE)
    assert len(installs) >= 3
    for line in installs:
        assert "--no-build-isolation" in line and "--no-deps" in line, line
        assert "--require-hashes" in line or line.rstrip().endswith("-e ."), line
    (wheel,) = re.findall(r"^.*pip .*\bwheel\b.*$", done.stdout, re.MULTILINE)
    assert "--no-build-isolation" in wheel and "--no-deps" in wheel


def test_a_wheel_takes_what_builds_it_alone() -> None:
    """Not PyTorch and all that the tool and its tests need."""
    words = ["make", "--dry-run", "--always-make", "wheel"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    named = re.findall(r"-r (\S+)", done.stdout)
    assert named == ["requirements/build.txt"] and ".venv/" not in done.stdout
