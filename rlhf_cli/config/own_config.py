"""`--config FILE`: a config of one's own, whole or in part, under the words of the command.

As `rlhf-cli STAGE --cfg job` prints one, or as config.yaml of a run has it. Its keys win over the
values of conf/ and of the options, and lose against the words of the command. An option that the
command names is such a word: what it gives a value, or leaves unused, is not taken from the file.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.config import catalog
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.hints import OWN_CONFIG, check_overrides
from rlhf_cli.config.own_files import read_own
from rlhf_cli.config.paths import is_path
from rlhf_cli.config.stages import STAGES
from rlhf_cli.config.switches import used_by

OF_A_RUN = re.compile(r"# rlhf-cli (\w+)")  # begins config.yaml of a run


@dataclass(frozen=True)
class OwnConfig:
    """What a file says.

    text: all of it.
    options: the option of each group that it names, as in `algo: ppo_ptx`.
    values: of its keys by dotted name, as written; not those that the command decides.
    """

    file: str
    text: str
    options: dict[str, str]
    values: dict[str, Any]

    @property
    def name(self) -> str:
        """What Hydra knows it by, and errors name."""
        return re.sub(r"\W", "_", Path(self.file).stem)

    @property
    def words(self) -> list[str]:
        """Those that choose it and its options."""
        chosen = [f"{group}={option}" for group, option in self.options.items()]
        return [*chosen, f'+{OWN_CONFIG}="{self.name}"']


def read_config(stage: str, file: str, overrides: list[str], dirs: list[Path]) -> OwnConfig:
    """The config in a file, checked.

    Args:
        overrides: the words of the command.

    Raises:
        UserError: it cannot be read, is one of another stage, or names what the stage has not.
    """
    if not is_path(file) or not Path(file).is_file():
        raise UserError(f"--config: no file {file}")
    content = read_own(Path(file))
    text = Path(file).read_text(encoding="utf-8")
    made_by = OF_A_RUN.match(text)
    if made_by and made_by[1] in STAGES and made_by[1] != stage:
        raise UserError(f"{file} is a config of `rlhf-cli {made_by[1]}`, not of {stage}")
    if made_by:  # that run was ordered to; this one is not
        content.pop("overwrite", None)
    options, values = _options_and_values(file, content)
    words = [f"{name}={value}" for name, value in (options | values).items()]
    try:
        check_overrides(stage, words, dirs)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    given = dict(word.lstrip("+").partition("=")[::2] for word in overrides)
    for group in catalog.GROUPS:
        if group in given:
            options.pop(group, None)
            decided = _decided_by(stage, group, given[group].split(","), dirs)
            values = {key: value for key, value in values.items() if key not in decided}
    return OwnConfig(file, text, options, values)


def _options_and_values(
    file: str, content: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any]]:
    """The options that a file names, and its keys by dotted name."""
    if "defaults" in content:
        raise UserError(
            f"{file}: a config has no list of defaults; name an option as `algo: ppo`, and set "
            "keys beside it as `algo.lr: 1e-5`"
        )
    options, values = {}, {}
    for name, value in content.items():
        if name not in catalog.GROUPS:
            values[name] = value
        elif isinstance(value, dict):
            values |= {f"{name}.{key}": each for key, each in value.items()}
        elif isinstance(value, str) and value:
            options[name] = value
        else:
            raise UserError(f"{file}: {name} must be an option, or a map of keys, got {value}")
    return options, values


def _decided_by(stage: str, group: str, options: list[str], dirs: list[Path]) -> set[str]:
    """The keys that options give a value, and those that nothing reads under them."""
    decided = set()
    for option in options:
        values = catalog.stage_values(stage, {group: option}, dirs)
        decided |= {f"{group}.{key}" for key in catalog.option_values(group, option, dirs)}
        for key in catalog.keys(stage):
            switch = used_by(stage, key)
            ours = switch is not None and catalog.group_of(switch.key) == group
            if switch and ours and not switch.reads(str(values[switch.key])):
                decided.add(key)
    return decided


def nested(content: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """Those values of a config, dotted names or maps of keys, that belong to some of its keys."""
    tree: dict[str, Any] = {}
    for name, value in content.items():
        if name in keys:
            group, _, key = name.rpartition(".")
            (tree.setdefault(group, {}) if group else tree)[key] = value
        elif name in catalog.GROUPS and isinstance(value, Mapping):
            inner = {key: each for key, each in value.items() if f"{name}.{key}" in keys}
            tree.setdefault(name, {}).update(inner)
    return tree
