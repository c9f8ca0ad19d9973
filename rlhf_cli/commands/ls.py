"""`rlhf-cli ls [GROUP]`: what is shipped, and which stages an option belongs to."""

from rlhf_cli.commands.help import columns, shown
from rlhf_cli.config import catalog
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.hints import nearest
from rlhf_cli.config.schema import STAGES


def run(words: list[str]) -> None:
    """Print the groups, or the options of one group, or the recipes.

    Raises:
        UserError: no such group.
    """
    names = (*catalog.GROUPS, "recipes")
    if len(words) > 1 or (words and words[0] not in names):
        hint = nearest(words[0], names)
        raise UserError(f"unknown group {' '.join(words)}{hint or ';'} ls takes {', '.join(names)}")
    recipes = sorted(file.name for file in catalog.shipped("recipes").glob("*.sh"))
    if not words:
        dirs = catalog.config_dirs()
        rows = [(group, " ".join(catalog.options(group, dirs))) for group in catalog.GROUPS]
        print(columns([*rows, ("recipes", " ".join(recipes))]))
    elif words[0] == "recipes":
        print("\n".join(f"  {name}" for name in recipes))
    else:
        print(columns([_row(words[0], option) for option in _options(words[0])]))


def _options(group: str) -> list[str]:
    return catalog.options(group, catalog.config_dirs())


def _row(group: str, option: str) -> tuple[str, str, str]:
    """An option, its stages, and what sets it apart from the option that it builds on."""
    dirs = catalog.config_dirs()
    stages = catalog.stages_of(group, option, dirs)
    file = catalog.option_file(group, option, dirs)
    assert file is not None
    defaults, own = catalog.read(file)
    bases = [str(base) for base in defaults if base != "_self_"]
    changes = ", ".join(f"{key}={shown(value)}" for key, value in own.items())
    difference = f"{' + '.join(bases)} with {changes}" if bases else ""
    return option, "all stages" if len(stages) == len(STAGES) else " ".join(stages), difference
