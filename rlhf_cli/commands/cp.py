"""`rlhf-cli cp NAME DEST`: take a shipped recipe or option as the start of one's own."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from rlhf_cli.commands.ls import NAMES, RECIPES
from rlhf_cli.config import catalog
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.hints import nearest
from rlhf_cli.reporting.terminal import print_path

USAGE = """\
rlhf-cli cp: copy what `rlhf-cli ls` names, to change it. Nothing is overwritten.

Usage: rlhf-cli cp NAME DEST, as in rlhf-cli cp algo/ppo mine/algo/mine.yaml"""


def run(words: list[str]) -> None:
    """Copy what `ls` names and print where it went: a recipe (`demo.sh`), a file that one reads
    (`positive.txt`) or an option (`ppo`, or `algo/ppo`).

    Raises:
        UserError: no such name, or DEST is taken or cannot be written.
    """
    if {"--help", "-h"} & set(words):
        print(USAGE)
        return
    if len(words) != 2:
        raise UserError("cp takes two words: rlhf-cli cp NAME DEST, as in rlhf-cli cp demo.sh .")
    source = _source(words[0])
    target = Path(words[1])
    if target.is_dir() or words[1].endswith("/"):
        target = target / source.name
    if target.exists():
        raise UserError(f"{target} exists; cp does not overwrite")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from error
    print_path(target)


def _source(name: str) -> Path:
    """The file of a name as `ls` prints it, with its group or ending or without."""
    recipes = catalog.shipped("recipes")
    shelf = {f"{RECIPES}/{file.name}": file for file in sorted(recipes.glob("*.*"))}
    for group in catalog.GROUPS:
        folder = catalog.shipped("conf") / group
        shelf |= {f"{group}/{file.name}": file for file in sorted(folder.glob("*.yaml"))}
    # as `ls` prints it comes before other ways to say it: demo is an option, demo.sh a recipe
    printed: dict[str, list[str]] = {}
    said: dict[str, list[str]] = {}
    for place, file in shelf.items():
        group = place.partition("/")[0]
        printed.setdefault(file.name if group == RECIPES else file.stem, []).append(place)
        for each in (file.stem, file.name, f"{group}/{file.stem}", place):
            said.setdefault(each, []).append(place)
    found = printed.get(name) or said.get(name) or []
    if not found:
        raise UserError(_unknown(name, said))
    if len(found) > 1:
        raise UserError(f"{name} names more than one file: take {' or '.join(found)}")
    return shelf[found[0]]


def _unknown(name: str, names: Iterable[str]) -> str:
    if name in NAMES:
        return f"{name} is a list; name one of what `rlhf-cli ls {name}` shows"
    if (config := Path(name) / "config.yaml").is_file():
        return (
            f"{name} is a run of yours: cp -r copies it; to start from its config give "
            f"`--config {config}` to its stage"
        )
    return f"nothing is named {name}{nearest(name, names) or '; see rlhf-cli ls'}"
