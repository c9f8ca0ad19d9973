"""README.md and docs/: what they tell is so, and what they name is there.

docs/architecture.md has a heading `The tree`, and the first block after it is the tree: a line per
file or folder with its name, two spaces or more, and one clause. Two spaces of indentation a level;
a folder's name ends in `/`; a name may be a path (`conf/algo/`) or a pattern (`*.yaml`). Of
rlhf_cli/ every folder and every module is listed, but for __init__.py.
"""

import ast
import contextlib
import importlib.util
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.commands import (
    SHORT,
    chat,
    compare,
    completion,
    cp,
    data,
    export,
    ls,
    report,
    rounds,
    slurm,
    sweeps,
    watch,
)
from rlhf_cli.commands.flags import parse
from rlhf_cli.config.compose import compose, hydras_words, typed_config
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.stages import STAGES
from rlhf_cli.rewards.rules import RULE_NAMES
from tests.docs.pages import DOCS, PAGES, README, ROOT, Command, anchors, blocks, commands, links

LONGEST_README = 160  # lines
EXPECTED = (
    *("adapters", "architecture", "chat", "data", "evaluation", "export", "feedback", "hardware"),
    *("labelling", "metrics", "models", "online", "python", "report", "resume", "rewards"),
    *("trackers", "vllm"),
)

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@cache  # pages show some commands twice
def composed(
    name: str, words: tuple[str, ...], config_dir: str | None, config_file: str | None
) -> None:
    """A stage's words compose."""
    if config_file is None or Path(config_file).is_file():  # what --cfg printed is not there
        compose(name, list(words), config_dir, config_file)


def try_command(words: list[str]) -> None:
    """A command as far as it goes without running anything.

    Raises:
        UserError: it is wrong.
    """
    first, rest = words[0], words[1:]
    if first in STAGES:
        flags = parse(first, rest)
        if not flags.multirun:
            composed(first, tuple(flags.overrides), flags.config_dir, flags.config)
            return
        jobs = sweeps.jobs(hydras_words(first, flags.overrides, sweep=True))
        assert len(jobs) > 1, "a sweep of one job"
        for words in jobs:
            typed_config(first, words, flags.config_dir)
    elif first == "data":
        said, overrides = data.parse(rest)
        composed(said.stage, tuple(overrides), said.config_dir, None)
    elif first == "slurm":
        order, overrides = slurm.parse(rest)
        composed(order.stage, tuple(overrides), order.config_dir, order.config)
    elif SHORT.get(first, first) == "export":
        export.parse(rest)
    elif first == "compare":
        compare.parse(rest)
    elif first == "rounds":
        rounds.parse(rest)
    elif first == "report":
        report.parse(rest)
    elif first == "watch":
        watch.parse(rest)
    elif first == "chat":
        composed("generate", (*chat.ALWAYS, *chat.parse(rest).overrides), None, None)
    elif first == "cp":
        cp.run(rest)
    elif first == "completion":
        completion.run(rest)
    elif first == "ls":
        assert not rest or rest[0] in ls.NAMES
    else:
        assert words in (["env"], ["--help"], ["--version"])


@pages
def test_every_command_parses_and_composes(page: Path, tmp_path: Path) -> None:
    (tmp_path / "bash").mkdir()
    found = commands(page, tmp_path / "bash")
    examples = "\n".join(text for _, text in blocks(page, "python"))
    (tmp_path / "my_losses.py").write_text(examples)  # what a command names as a function of yours
    wrong = []
    with contextlib.chdir(tmp_path):  # what `rlhf-cli cp` copies is there for the commands after it
        for command in found:
            tool, *words = command.words
            if tool == "make":
                assert_targets(command)
                continue
            try:
                try_command(words)
            except (UserError, AssertionError) as error:
                wrong.append(f"{command.place}: rlhf-cli {' '.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)


def assert_targets(command: Command) -> None:
    """Every target that `make` is given is one of the Makefile."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(command.words[1:]) <= set(targets), command


def test_commands_are_found(tmp_path: Path) -> None:
    """Lines, spans, arrays, continued lines and substitutions; a span with an ellipsis is none."""
    page = tmp_path / "page.md"
    page.write_text(
        "Run `rlhf-cli ls`, `make demo` or `rlhf-cli sft ...`.\n"
        "```sh\n"
        "DATA=(data=jsonl 'data.template=a b')\n"
        'OUT=$(rlhf-cli sft "${DATA[@]}" \\\n'
        "    seed=1)  # more\n"
        "rlhf-cli dpo policy=$OUT && source <(rlhf-cli completion bash)\n"
        "```\n"
        "```python\n"
        "rlhf-cli none\n"
        "```\n"
    )
    found = sorted((each.place, each.words) for each in commands(page, tmp_path))
    assert found == [
        ("page.md:1", ["make", "demo"]),
        ("page.md:1", ["rlhf-cli", "ls"]),
        ("page.md:5", ["rlhf-cli", "sft", "data=jsonl", "data.template=a b", "seed=1"]),
        ("page.md:6", ["rlhf-cli", "completion", "bash"]),
        ("page.md:6", ["rlhf-cli", "dpo", "policy=DIR"]),
    ]


@pages
def test_python_imports_and_composes(page: Path) -> None:
    for _, text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhf_cli"):
                for each in node.names:
                    assert names_something(node.module or "", each.name), ast.unparse(node)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "compose":
                with contextlib.suppress(ValueError):  # words that are made as it runs
                    words: list[Any] = [ast.literal_eval(each) for each in node.args]
                    compose(*words)


def names_something(module: str, name: str) -> bool:
    """Whether a module defines a name, or holds a module of that name; nothing is imported."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    defined = {
        getattr(node, "name", None) for node in ast.parse(Path(spec.origin).read_text()).body
    }
    return name in defined or importlib.util.find_spec(f"{module}.{name}") is not None


@pages
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= LONGEST_README
    named = {Path(link).stem for link in links(README) if link.startswith("docs/")}
    assert named == set(EXPECTED)
    assert {page.stem for page in PAGES[1:]} == set(EXPECTED)


def test_every_stage_and_rule_is_told() -> None:
    told = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    rules = [name.partition(":")[0] for name in RULE_NAMES]
    names = [*STAGES, *rules]
    assert [name for name in names if not re.search(rf"`{name}[`:,]", told)] == []


def test_the_source_distribution_has_what_the_readme_leads_to() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        build = tomllib.load(file)["tool"]["hatch"]["build"]
    assert {"docs", "benchmarks"} <= set(build["targets"]["sdist"]["only-include"])


# --------------------------------------------------------------------------- the tree


def listed(text: str) -> list[tuple[str, str]]:
    """(path, clause) of each line of a tree."""
    found: list[tuple[str, str]] = []
    above: list[str] = []
    for line in text.splitlines():
        name, _, clause = line.strip().partition("  ")
        depth, odd = divmod(len(line) - len(line.lstrip()), 2)
        assert not odd and depth <= len(above), f"indentation of {line!r}"
        above = [*above[:depth], name]
        found.append(("".join(above), clause.strip()))
    return found


def test_the_tree_is_the_tree_on_disk() -> None:
    page = DOCS / "architecture.md"
    assert page.is_file(), "docs/architecture.md is not there"
    lines = page.read_text(encoding="utf-8").splitlines()
    heading = next(i for i, line in enumerate(lines, 1) if re.fullmatch(r"#+ The tree", line))
    tree = next(text for number, text in blocks(page, "text", "tree") if number > heading)
    told = listed(tree)
    for path, clause in told:
        assert clause, f"{path} has no clause"
        assert any(each.is_dir() or not path.endswith("/") for each in ROOT.glob(path)), path
    there = {
        f"{path.relative_to(ROOT)}{'/' if path.is_dir() else ''}"
        for path in (ROOT / "rlhf_cli").rglob("*")
        if path.suffix == ".py"
        and path.name != "__init__.py"
        or path.is_dir()
        and path.name != "__pycache__"
        and any(path.glob("*.py"))
    }
    paths = [path for path, _ in told]
    assert len(paths) == len(set(paths))
    inside = {path for path in paths if path.startswith("rlhf_cli/") and "*" not in path}
    assert there - inside == set()


def test_a_tree_is_read_by_its_indentation() -> None:
    tree = (
        "rlhf_cli/  all\n  cli.py    argv -> stage\n  data/  rows\n    rows.py  read\nconf/  values"
    )
    assert listed(tree) == [
        ("rlhf_cli/", "all"),
        ("rlhf_cli/cli.py", "argv -> stage"),
        ("rlhf_cli/data/", "rows"),
        ("rlhf_cli/data/rows.py", "read"),
        ("conf/", "values"),
    ]
