"""`rlhf-cli STAGE ...`: flags, composition through hydra.main, sweeps, and the run itself."""

import argparse
import gc
import importlib
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, NoReturn

from rlhf_cli.config import catalog
from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.config.hints import check_overrides, explain, nearest
from rlhf_cli.config.paths import is_path
from rlhf_cli.config.secrets import redacted
from rlhf_cli.reporting.terminal import print_path, printable, show_controls

if TYPE_CHECKING:
    from hydra.conf import HydraConf
    from omegaconf import DictConfig

    from rlhf_cli.runs.preflight import Plan

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
    else:
        (_sweep if flags.multirun else _single)(stage, flags, words)


def _single(stage: str, flags: Flags, words: list[str]) -> None:
    # The task only hands the config over: errors of the stage then pass no frame of Hydra's, which
    # would print a line of its own.
    from rlhf_cli.config.compose import typed

    composed: list[DictConfig] = []

    def keep(cfg: "DictConfig") -> None:
        composed.append(cfg)

    _hydra_main(stage, flags, _SINGLE, keep)
    _execute(stage, typed(composed[0], stage), flags.check, words, flags.json)


def _sweep(stage: str, flags: Flags, _: list[str]) -> None:
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
            found.append({"job": number, "swept": swept, **_as_json(stage, cfg, plan)})
        elif flags.check:
            job_name = sweeps.job_name(number, len(jobs))
            _tell([f"{job_name}: {swept or 'nothing is swept'}", *plan.lines()])
    if flags.json:
        print(json.dumps(found, indent=2))
    if not flags.check:
        home = sweeps.home([cfg.out for cfg in configs]) if jobs else "${out}"
        keys = ",".join(f'"{key}"' for key in unnamed)
        settings += [f'hydra.sweep.dir="{home}"', f"{_UNNAMED}=[{keys}]"]
        if jobs:
            settings.append(f"+hydra.job.env_set.{_JOBS}='{len(jobs)}'")
            _tell([f"sweep: {len(jobs)} jobs in {home}; then rlhf-cli compare {quote(home)}"])
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
    _tell([f"{board.job}: {config.out}"])
    try:
        _execute(stage, config, False, _words_of_job(hydra, config.out))
    except (UserError, RunError) as error:  # Hydra goes on, and tells of one alone at its end
        _tell([f"{board.job}, out={config.out}: error: {error}"])
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

    from rlhf_cli.config.compose import hydras_words, register_schemas

    register_schemas()
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


def _tell(lines: list[str]) -> None:
    """Lines on stderr, fit to be seen; nobody need hear them."""
    if not lines:
        return
    try:
        shown = (printable(redacted(line)) for line in lines)
        print(*shown, sep="\n", file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _execute(stage: str, cfg: Any, check: bool, words: list[str], as_json: bool = False) -> None:
    """Check or run a config; `words` after the stage make it again, for further processes."""
    with _disk_faults(cfg):
        out = _checked_run(stage, cfg, check, words, as_json)
    if out is not None:
        _tell_path(out)


def _tell_path(out: Path) -> None:
    """The path on stdout. Where that is closed, full or read by nobody the work is done all the
    same, and a line says where it lies.
    """
    fault = "it is closed"
    try:
        if sys.stdout is not None:
            print_path(out)
            return
    except (OSError, ValueError) as error:
        fault = getattr(error, "strerror", None) or str(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes to it again at exit
    from rlhf_cli.reporting.console import say

    say(f"{out} is written; stdout did not take its path: {fault}")


@contextmanager
def _disk_faults(cfg: Any) -> Iterator[None]:
    """A full, read-only or forbidden disk ends a run in one line."""
    from rlhf_cli.folders.files import disk_fault
    from rlhf_cli.runs.out_folder import what_is_kept

    try:
        yield
    except OSError as error:
        fault = disk_fault(error)
        if fault is None:
            raise
        kept = what_is_kept(Path(cfg.out))
        if kept is None:
            kept = "nothing was saved yet"
        elif cfg.trains:
            kept = f"what was saved after {kept} is whole"
        else:
            kept = f"{kept} are kept"
        place = "" if error.filename else f"out={cfg.out}: "
        raise RunError(
            f"{place}{fault}; {kept}; once that is mended the same command goes on"
        ) from error


def _as_json(stage: str, cfg: Any, plan: "Plan") -> dict[str, Any]:
    """What a check found, for programs: the facts, then the lines that people are shown.

    Numbers are null where they are not known.
    """
    from rlhf_cli.runs.memory_estimate import predicted_peak
    from rlhf_cli.runs.model_sizes import Unknown
    from rlhf_cli.runs.out_folder import FINISHED

    peak = None
    with suppress(Unknown):
        peak = round(predicted_peak(cfg)) if cfg.trains and plan.state != FINISHED else None
    return {
        "stage": stage,
        "out": cfg.out,
        "state": plan.state,
        "parameters": int(plan.parameters) if 0 < plan.parameters < math.inf else None,
        "peak_bytes": peak,
        "doing": plan.doing,
        "rows": plan.counted,
        "code": plan.code,
        "plan": plan.sums,
        "memory": plan.memory,
    }


def _checked_run(stage: str, cfg: Any, check: bool, words: list[str], as_json: bool) -> Path | None:
    """The folder that the stage wrote, now or before; None after a check, and where another
    process has told it.
    """
    from rlhf_cli.ranks.environment import place
    from rlhf_cli.runs.out_folder import FINISHED, tidy
    from rlhf_cli.runs.preflight import preflight

    # Importing torch and transformers makes millions of objects that never die. Without the
    # collector walking through them again and again it takes a third less time.
    gc.disable()
    plan = preflight(cfg, check_only=check)
    gc.freeze()  # nor as the process ends
    if as_json:
        print(json.dumps(_as_json(stage, cfg, plan), indent=2))
        return None
    if check:
        _tell(plan.lines())
        return None
    asked_again = getattr(cfg, "review", False)  # what people have labelled is looked at anew
    # known without torch: a chain flies by again
    if plan.state == FINISHED and place() is None and not asked_again:
        tidy(Path(cfg.out))
        _tell([f"{cfg.out}: already finished; nothing to do"])
        return Path(cfg.out)
    if cfg.hardware.processes != 1:
        from rlhf_cli.commands.launch import launch, processes_of

        if (processes := processes_of(cfg)) > 1:
            launch(cfg, plan, [stage, *words], processes)
            return None
    _tell(plan.at_once())
    from rlhf_cli.reporting.trackers.outlets import leave_all

    module = importlib.import_module(f"rlhf_cli.stages.{stage}")
    gc.freeze()
    gc.enable()
    try:
        out: Path = module.run(cfg, plan)
    finally:  # a job of a sweep may fail, and the next begin
        leave_all()
    return out
