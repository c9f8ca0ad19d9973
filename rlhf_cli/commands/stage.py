"""`rlhf-cli STAGE ...`: flags, composition through hydra.main, sweeps, and the run itself."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from shlex import quote
from typing import TYPE_CHECKING

from rlhf_cli.commands.execute import execute, findings, tell
from rlhf_cli.commands.flags import Flags, parse
from rlhf_cli.config import catalog
from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.config.hints import check_overrides, explain
from rlhf_cli.config.secrets import redacted
from rlhf_cli.reporting.terminal import show_controls

if TYPE_CHECKING:
    from hydra.conf import HydraConf
    from omegaconf import DictConfig


# Hydra must leave nothing behind: stages write their own folder, after their own checks.
# What it logs goes to stdout, where only artifact paths belong.
_SINGLE = (
    *("hydra.output_subdir=null", "hydra.run.dir=."),
    *("hydra/job_logging=none", "hydra/hydra_logging=none"),
)
# A sweep's folder gets Hydra's multirun.yaml, and what a cluster launcher keeps.
_SWEEP = (*_SINGLE, "hydra.sweep.subdir=.")

_PARAMS = "hydra.sweeper.params"
# How the processes of a launcher are told which keys the folder of a job does not name, and how
# many jobs there are, where that is known.
_UNNAMED = "hydra.job.config.override_dirname.exclude_keys"
_JOBS = "RLHF_CLI_JOBS"


def run(stage: str, words: list[str]) -> None:
    """Do what the words after a stage say: help, show a config, check, sweep or run.

    Raises:
        UserError: the command, config or input is wrong.
        RunError: the stage failed.
    """
    flags = parse(stage, words)
    dirs = catalog.config_dirs(flags.config_dir)
    check_overrides(stage, flags.overrides, dirs)
    own = None
    if flags.config is not None:
        from rlhf_cli.config.own_config import read_config

        own = read_config(stage, flags.config, flags.overrides, dirs)
    if flags.help is not None:
        from rlhf_cli.commands.help import stage_help

        print(stage_help(stage, flags.overrides, dirs, own, flags.help))
        return
    if own is not None:
        from rlhf_cli.config.compose import register_config

        register_config(own)
        flags.overrides[:0] = own.words
    if flags.show:
        shown = io.StringIO()
        try:
            with redirect_stdout(shown):
                _hydra_main(stage, flags, _SINGLE, lambda cfg: None)
        finally:  # Hydra leaves by SystemExit after its own help
            from rlhf_cli.config.texts import requoted

            text = shown.getvalue()
            print(redacted(requoted(text) if flags.show_yaml else text), end="")
    elif flags.multirun:
        _sweep(stage, flags)
    else:
        _single(stage, flags, words)


def _single(stage: str, flags: Flags, words: list[str]) -> None:
    # The task only hands the config over: errors of the stage then pass no frame of Hydra's, which
    # would print a line of its own.
    from rlhf_cli.config.compose import typed

    composed: list[DictConfig] = []

    def keep(cfg: "DictConfig") -> None:
        composed.append(cfg)

    _hydra_main(stage, flags, _SINGLE, keep)
    execute(stage, typed(composed[0], stage), flags.check, words, flags.json)


def _sweep(stage: str, flags: Flags) -> None:
    """Check every job before the first one starts, then let Hydra run them."""
    from rlhf_cli.commands import sweeps
    from rlhf_cli.config.compose import hydras_words, params_of_sweep, typed_config
    from rlhf_cli.runs.preflight import preflight

    words = hydras_words(stage, flags.overrides, sweep=True)
    settings = list(_SWEEP)
    with _one_line(stage):
        fixed = sweeps.fixed(words)
        if sweeps.chosen_elsewhere(words):
            jobs = []
        else:
            # what option files sweep over becomes words as well, so that texts are quoted in it
            given = params_of_sweep(
                stage, [*fixed.values(), *sweeps.settings(words)], flags.config_dir
            )
            own = [word for word in flags.overrides if not word.lstrip("+").startswith(_PARAMS)]
            flags = replace(flags, overrides=[*given, *own])
            settings.append(f"{_PARAMS}=null")
            jobs = sweeps.jobs(hydras_words(stage, flags.overrides, sweep=True))
    configs = [typed_config(stage, job, flags.config_dir) for job in jobs]
    outs = [cfg.out for cfg in configs]
    unnamed = sweeps.unnamed_keys(jobs, outs) if jobs else [*fixed]
    found = []
    for number, (job, cfg) in enumerate(zip(jobs, configs, strict=True)):
        cfg.out = sweeps.place(cfg.out, job, unnamed)
        plan = preflight(cfg, check_only=True)
        swept = " ".join(word for word in job if word not in fixed.values())
        if flags.json:
            found.append({"job": number, "swept": swept, **findings(stage, cfg, plan)})
        elif flags.check:
            job_name = sweeps.job_name(number, len(jobs))
            tell([f"{job_name}: {swept or 'nothing is swept'}", *plan.lines()])
    if flags.json:
        print(json.dumps(found, indent=2))
    if not flags.check:
        home = sweeps.home([cfg.out for cfg in configs]) if jobs else "${out}"
        keys = ",".join(f'"{key}"' for key in unnamed)
        settings += [f'hydra.sweep.dir="{home}"', f"{_UNNAMED}=[{keys}]"]
        if jobs:
            settings.append(f"+hydra.job.env_set.{_JOBS}='{len(jobs)}'")
            tell([f"sweep: {len(jobs)} jobs in {home}; then rlhf-cli compare {quote(home)}"])
        _hydra_main(stage, flags, settings, sweep_job)


def sweep_job(cfg: "DictConfig") -> None:
    """One job of a sweep, in a folder of its own. Launchers import it by name."""
    from hydra.core.hydra_config import HydraConfig

    from rlhf_cli.commands.sweeps import job_name, place
    from rlhf_cli.config.compose import typed
    from rlhf_cli.reporting.console import board
    from rlhf_cli.runs import interrupts

    show_controls()  # a launcher may run this in a process of its own
    hydra = HydraConfig.get()
    stage = str(hydra.job.config_name)
    config = typed(cfg, stage)
    unnamed = hydra.job.config.override_dirname.exclude_keys
    config.out = place(config.out, hydra.overrides.task, unnamed)
    interrupts.take()  # a launcher may run this in a process of its own
    count = os.environ.get(_JOBS)
    board.job = job_name(int(hydra.job.num), int(count) if count else None)
    tell([f"{board.job}: {config.out}"])
    try:
        execute(stage, config, False, _words_of_job(hydra, config.out))
    except (UserError, RunError) as error:  # Hydra goes on, and tells of one alone at its end
        tell([f"{board.job}, out={config.out}: error: {error}"])
        interrupts.wait_no_more(f"{config.out} failed")
        raise
    # too late for this job, not for the others
    interrupts.wait_no_more(f"{config.out} is finished")


def _words_of_job(hydra: "HydraConf", out: str) -> list[str]:
    """The words that run a job by itself."""
    own = [
        f"--config-dir={source.path}"
        for source in hydra.runtime.config_sources
        if source.provider == "command-line"
    ]
    return [*own, *hydra.overrides.task, f"out={out}"]


def _hydra_main(
    stage: str, flags: Flags, settings: Sequence[str], task: "Callable[[DictConfig], None]"
) -> None:
    import hydra
    from hydra._internal.hydra import Hydra

    from rlhf_cli.config.compose import hydras_words, register_schema

    register_schema(stage)
    # Without this Hydra prints its own errors, of many lines, and exits with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    folder = [f"--config-dir={flags.config_dir}"] if flags.config_dir else []
    mode = ["--multirun"] if flags.multirun else []
    words = [
        *settings,
        f"hydra.job.name={stage}",
        *hydras_words(stage, flags.overrides, flags.multirun),
    ]
    sys.argv[1:] = [*flags.show, *mode, *folder, *words]
    path = str(catalog.shipped("conf"))
    # Else all is composed once more before, to look for hydra.mode; -m alone makes several runs.
    Hydra.get_mode = lambda *_, **__: None  # type: ignore[method-assign]
    with _one_line(stage):
        hydra.main(version_base="1.3", config_path=path, config_name=stage)(task)()


@contextmanager
def _one_line(stage: str) -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise into a UserError."""
    try:
        yield
    except Exception as error:
        line = explain(error, stage)
        if line is None:
            raise
        raise UserError(line) from error
