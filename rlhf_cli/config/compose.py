"""Compose a stage's config from conf/ and turn it into the dataclasses of schema/.

`compose` serves Python callers and tests. The command line composes through hydra.main, which
also gives sweeps and `--cfg`, and then takes the same second step: `typed`.
"""

import dataclasses
import os
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from rlhf_cli.config import catalog
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.hints import OWN_CONFIG, check_overrides, explain
from rlhf_cli.config.own_config import OwnConfig, nested, read_config
from rlhf_cli.config.own_files import check_place, read_own
from rlhf_cli.config.schema.stages import Run
from rlhf_cli.config.secrets import keep_reference, take
from rlhf_cli.config.stages import STAGES
from rlhf_cli.config.texts import as_typed, load
from rlhf_cli.config.validate import validate


class FileConfigSource(file_config_source.FileConfigSource):
    """Where Hydra reads files: those of users are looked through before, however it came to them.

    It has the name of the class that it stands in for, which Hydra then does not put back.
    """

    def load_config(self, config_path: str) -> ConfigResult:
        file = Path(self.path, self._normalize_file_name(config_path)).resolve()
        if not file.is_relative_to(catalog.shipped("conf")) and file.is_file():
            check_place(config_path)
            read_own(file)
            found = super().load_config(config_path)
            package = (found.header or {}).get("package") or str(Path(config_path).parent)
            group = "" if package == "_global_" else package.replace("/", ".")
            found.config = OmegaConf.create(load(file.read_text(encoding="utf-8"), group))
            return found
        return super().load_config(config_path)


@cache
def register_schema(stage: str) -> None:
    """Make `<stage>_schema`, the first entry of a stage's primary file, known to Hydra, and how
    files are read: once, which saves a quarter of what composing takes.

    Only root schemas are stored: a schema per group would show up as one more option of it.
    """
    ConfigStore.instance().store(name=f"{stage}_schema", node=STAGES[stage].config)
    OmegaConf.register_new_resolver("oc.env", _from_environment, replace=True)
    SourcesRegistry.instance().types[FileConfigSource.scheme()] = FileConfigSource


def _keep_references(given: Any, values: dict[str, Any], prefix: str = "") -> None:
    """Remember the texts that values were made from."""
    for name, value in values.items():
        text = given.get(name) if isinstance(given, dict) else None
        if isinstance(value, dict):
            _keep_references(text, value, f"{prefix}{name}.")
        elif text is not None:
            keep_reference(f"{prefix}{name}", value, text)


def _from_environment(name: str, *default: str | None) -> str | None:
    """${oc.env:NAME}, told to those who write files and messages."""
    value = oc.env(name, *default)
    if os.environ.get(name):
        take(name, os.environ[name])
    return value


def compose(
    stage: str,
    overrides: list[str],
    config_dir: str | None = None,
    config_file: str | None = None,
) -> Any:
    """The typed config of a stage, as the same words give it on the command line.

    Args:
        stage: a name in STAGES.
        overrides: `key=value` and `group=option` words.
        config_dir: a folder with options of your own, laid out like conf/.
        config_file: a config of your own, whole or in part, over which the words win.

    Raises:
        UserError: a name or value is wrong; the message is one line.
    """
    if stage not in STAGES:
        raise UserError(f"unknown stage {stage}; choices: {', '.join(STAGES)}")
    dirs = catalog.config_dirs(config_dir)
    check_overrides(stage, overrides, dirs)
    if config_file is not None:
        own = read_config(stage, config_file, overrides, dirs)
        register_config(own)
        overrides = [*own.words, *overrides]
    return typed_config(stage, hydras_words(stage, overrides), config_dir)


def register_config(own: OwnConfig) -> None:
    """Make a config of one's own known to Hydra; its words put it under those of a command."""
    content = nested(load(own.text), own.values)
    ConfigStore.instance().store(own.name, content, group=OWN_CONFIG, package="_global_")


def typed_config(stage: str, words: list[str], config_dir: str | None = None) -> Any:
    """`compose`, of words that are as Hydra is to read them.

    Raises:
        UserError: a name or value is wrong; the message is one line.
    """
    try:
        cfg = _composed(stage, words, config_dir)
    except Exception as error:
        line = explain(error, stage)
        if line is None:
            raise
        raise UserError(line) from error
    return typed(cfg, stage)


def params_of_sweep(stage: str, words: list[str], config_dir: str | None) -> list[str]:
    """The words that option files, under `hydra.sweeper.params`, add to each command of a sweep."""
    cfg = _composed(stage, words, config_dir, return_hydra_config=True)
    params = cfg.hydra.sweeper.get("params") or {}
    return [f"{key}={value}" for key, value in params.items()]


def _composed(stage: str, words: list[str], config_dir: str | None, **more: bool) -> DictConfig:
    register_schema(stage)
    dirs = catalog.config_dirs(config_dir)
    own = [f"hydra.searchpath=[{','.join(f'file://{each.resolve()}' for each in dirs[1:])}]"]
    with initialize_config_dir(config_dir=str(dirs[0]), version_base="1.3"):
        return hydra_compose(stage, [*own, *words] if dirs[1:] else words, **more)


def hydras_words(stage: str, overrides: list[str], sweep: bool = False) -> list[str]:
    """The words of a command as Hydra is to read them.

    Texts are quoted, and `data.columns.prompt=question` may add an entry, for which its grammar
    asks `++`.

    Args:
        sweep: whether a comma between values separates jobs.
    """
    maps = [key for key, field in catalog.keys(stage).items() if catalog.is_map(field)]
    return [
        f"++{word}"
        if word.startswith(tuple(f"{key}{end}" for key in maps for end in ".="))
        else word
        for word in as_typed(overrides, sweep)
    ]


def _check_size(cfg: DictConfig) -> None:
    """`model.size` is one of the family's sizes; model.path refers to its hub id."""
    size, sizes = (OmegaConf.select(cfg, f"model.{key}") for key in ("size", "sizes"))
    if size is not None and size not in (sizes or {}):
        known = f"knows {', '.join(sizes)}" if sizes else "is for families, as model=qwen3"
        raise UserError(f"model.size={size}: model.size {known}")


def typed(cfg: DictConfig, stage: str) -> Any:
    """The dataclasses of a composed config, checked.

    The plain values are merged into the schema once more, because `+key=1` and a config read from
    a file pass Hydra without it. Bounds and rules between keys are checked last.

    Raises:
        UserError: an unknown, missing or wrong value; the message is one line.
    """
    _check_size(cfg)
    try:
        plain = OmegaConf.to_container(cfg, resolve=True)
        merged = OmegaConf.merge(OmegaConf.structured(STAGES[stage].config), plain)
        missing = OmegaConf.missing_keys(merged)
        for key, field in catalog.keys(stage).items():
            if key in missing:
                raise UserError(f"{stage} needs {key}=VALUE: {field.metadata['meaning']}")
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, OverflowError) as error:
        raise UserError(explain(error, stage) or str(error)) from error
    assert isinstance(config, Run)
    _keep_references(OmegaConf.to_container(cfg, resolve=False), dataclasses.asdict(config))
    validate(stage, config)
    return config
