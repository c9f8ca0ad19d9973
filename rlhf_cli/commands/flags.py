"""The words after a stage, sorted into flags and overrides."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rlhf_cli.config import catalog
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.hints import nearest
from rlhf_cli.config.paths import is_path


@dataclass
class Flags:
    """The words after the stage, sorted."""

    help: str | None  # what it is asked about: nothing, all, a group or a key
    check: bool
    json: bool
    multirun: bool
    config: str | None
    config_dir: str | None
    show: list[str]  # Hydra's own flags that print a config instead of running
    overrides: list[str]

    @property
    def show_yaml(self) -> bool:
        """Whether that config is all that is printed."""
        return any(flag.startswith("--cfg=") for flag in self.show)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse(stage: str, words: list[str]) -> Flags:
    """Sort the words after a stage into flags and overrides.

    Raises:
        UserError: a flag that does not exist, or `--key=value`.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    for names in (("--check",), ("--json",), ("--multirun", "-m"), ("--resolve",)):
        parser.add_argument(*names, action="store_true")
    parser.add_argument("--help", "-h", nargs="?", const="")
    parser.add_argument("--config")
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--package", "-p")
    parser.add_argument("--info", "-i", nargs="?", const="all")
    parser.add_argument("--hydra-help", action="store_true")
    flags, rest = parser.parse_known_args(words)
    if "=" in (flags.help or ""):  # an override that stands behind --help
        rest.append(flags.help)
        flags.help = ""
    for word in rest:
        if word.startswith("-"):
            raise UserError(_wrong_flag(stage, word, list(parser._option_string_actions)))
    if (own := flags.config_dir) is not None:
        if not is_path(own) or not Path(own).is_dir():
            raise UserError(f"--config-dir: no folder {own}")
        if not os.access(own, os.R_OK | os.X_OK):
            raise UserError(f"--config-dir: no permission to read {own}")
    show = [f"--{name}={value}" for name in ("cfg", "info") if (value := getattr(flags, name))]
    show += ["--hydra-help"] if flags.hydra_help else []
    if (flags.resolve or flags.package) and not flags.cfg:
        raise UserError("--resolve and --package go with --cfg job")
    if flags.cfg == "job" and flags.package and flags.package not in catalog.GROUPS:
        raise UserError(f"--package takes {', '.join(catalog.GROUPS)}, got {flags.package}")
    if len(show) + flags.multirun > 1 or (show and flags.check):
        raise UserError(
            "--check, -m, --cfg, --info and --hydra-help: take one (--check -m is fine)"
        )
    if flags.json and not flags.check:
        raise UserError("--json goes with --check")
    show += ["--resolve"] if flags.resolve else []
    show += [f"--package={flags.package}"] if flags.package else []
    return Flags(
        *(flags.help, flags.check, flags.json, flags.multirun, flags.config, flags.config_dir),
        *(show, rest),
    )


def _wrong_flag(stage: str, word: str, flags: list[str]) -> str:
    key, equals, value = word.lstrip("-").partition("=")
    if equals or key in catalog.keys(stage) or key in catalog.GROUPS:
        return f"{word}: keys take no dashes, write {key}={value or 'VALUE'}"
    return f"unknown flag {word}{nearest(word, flags) or f'; see rlhf-cli {stage} --help'}"
