"""`rlhf-cli cp NAME DEST`: take a shipped recipe or option as the start of one's own."""

import shutil
from pathlib import Path

from rlhf_cli.config import catalog
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.hints import nearest
from rlhf_cli.reporting.terminal import print_path


def run(words: list[str]) -> None:
    """Copy a recipe (`demo`, `demo.sh`), a file that one reads (`positive.txt`) or an option
    (`algo/ppo`), and print where it went.

    Raises:
        UserError: no such name, or DEST is taken or cannot be written.
    """
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
    shelf = {file.stem: file for file in sorted(catalog.shipped("recipes").glob("*.*"))}
    conf = catalog.shipped("conf")
    for group in catalog.GROUPS:
        shelf |= {f"{group}/{file.stem}": file for file in sorted((conf / group).glob("*.yaml"))}
    stem = name.removesuffix(".sh").removesuffix(".yaml").removesuffix(".txt")
    if stem not in shelf:
        raise UserError(f"nothing is named {name}{nearest(stem, shelf) or '; see rlhf-cli ls'}")
    return shelf[stem]
