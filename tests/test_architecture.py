"""The house as docs/architecture.md describes it: which room may look into which, and how long a
function may be.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rlhf_cli"
FILES = sorted(PACKAGE.rglob("*.py"))
# From top to bottom; those of one line are neighbours, which do not look into each other.
STOREYS = (
    ("__main__",),
    ("cli",),
    ("commands",),
    ("stages", "views"),
    ("online", "preferences", "labelling"),
    ("evaluation",),
    ("runs",),
    ("training",),
    ("rewards",),
    ("rollout",),
    ("models",),
    ("reporting",),
    ("folders",),
    ("data",),
    ("objectives", "demo"),
    ("ranks",),
    ("config",),
)
HEIGHT = {room: -storey for storey, rooms in enumerate(STOREYS) for room in rooms}
LONGEST, LONG, MOST_LONG = 80, 60, 3  # lines of a function
MOST_QUESTIONS = 8

Function = ast.FunctionDef | ast.AsyncFunctionDef


def room_of(file: Path) -> str:
    """The folder of a file, or the file itself at the top."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms_read(file: Path) -> Iterator[tuple[str, int]]:
    """The rooms that a file imports from, anywhere in it, with the line."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "rlhf_cli":
            yield from ((each.name, node.lineno) for each in node.names if each.name in HEIGHT)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhf_cli."):
            yield str(node.module).split(".")[1], node.lineno
        elif isinstance(node, ast.Import):
            for each in node.names:
                if each.name.startswith("rlhf_cli."):
                    yield each.name.split(".")[1], node.lineno


def functions() -> Iterator[tuple[str, int]]:
    """Every function of the package, as file:line name, with its lines."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, Function):
                assert node.end_lineno is not None
                place = f"{file.relative_to(PACKAGE)}:{node.lineno} {node.name}"
                yield place, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_import_runs_up(file: Path) -> None:
    ours = room_of(file)
    if ours == "__init__":
        return
    for room, line in rooms_read(file):
        if room != ours:
            assert HEIGHT[room] < HEIGHT[ours], f"line {line}: {ours} looks up to {room}"


def test_nothing_imports_a_stage_but_the_command_line() -> None:
    readers = {room_of(file) for file in FILES for room, _ in rooms_read(file) if room == "stages"}
    assert readers <= {"commands"}


def test_the_mathematics_knows_nothing_of_ours() -> None:
    for file in (PACKAGE / "objectives").glob("*.py"):
        assert {room for room, _ in rooms_read(file)} <= {"objectives"}, file.name


def test_functions_are_short() -> None:
    long = {place: lines for place, lines in functions() if lines > LONG}
    assert max(long.values()) <= LONGEST, long
    assert len(long) <= MOST_LONG, long


def test_what_a_stage_is_is_told_once() -> None:
    """Nothing outside config/ asks by its class which stage a config belongs to."""
    questions = [
        f"{file.relative_to(PACKAGE)}: {line.strip()}"
        for file in FILES
        if room_of(file) != "config"
        for line in file.read_text().splitlines()
        if "isinstance(cfg" in line
    ]
    assert len(questions) <= MOST_QUESTIONS, questions
