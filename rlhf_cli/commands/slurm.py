"""`rlhf-cli slurm STAGE ...`: a stage as a job of SLURM, which comes back until it is done."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.config.hints import nearest
from rlhf_cli.config.schema.keys import AUTO
from rlhf_cli.config.secrets import redacted
from rlhf_cli.config.stages import STAGES
from rlhf_cli.reporting.terminal import on_one_line

DESCRIPTION = """\
Render a job for SLURM that runs a stage, a process for each GPU, and submit it; with --check print
it on stdout instead. Before its time is up each process finishes its step and saves it, and the job
is queued again, until the stage is done."""

USAGE = "rlhf-cli slurm STAGE [GROUP=OPTION ...] [KEY=VALUE ...] [FLAG ...]"

HEAD = """\
#!/bin/bash
{directives}

"""
# By --signal=B: SLURM signals this shell alone. scancel with a signal passes it on to all
# processes; SIGTERM to srun would end them within half a minute.
# A wait that a signal ends says nothing of srun: it is waited for again.
BODY = """\
asked=
again=1
status=1
stop() {{
    asked=1 again=1
    scancel --signal=TERM "$SLURM_JOB_ID"
}}
trap stop USR1 TERM

srun --kill-on-bad-exit=1 {bound}{command} &
while [ "$again" ]; do
    again=
    wait "$!"
    status=$?
done

# 75: interrupted, and what was done is saved. Above 128: srun ended who was late after a signal.
# A job that was cancelled is no longer running, and stays so.
if [ "$status" = 75 ] || {{ [ "$asked" ] && [ "$status" -gt 128 ]; }}; then
    case "$(scontrol show job "$SLURM_JOB_ID")" in
    *JobState=RUNNING*) scontrol requeue "$SLURM_JOB_ID" ;;
    esac
fi
exit "$status"
"""
NAME = re.compile(r"[\w.,:=+@%/-]+")
TIME = re.compile(r"\d+(-\d+)?(:\d+){0,2}")
MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"slurm: {message}; see rlhf-cli slurm --help")


def _like(form: re.Pattern[str], meant: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if form.fullmatch(text) is None:
            raise argparse.ArgumentTypeError(f"expected {meant}, got {on_one_line(text) or '-'}")
        return text

    return read


def _count(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if re.fullmatch(r"\d{1,6}", text) is None or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected {least} or more, got {on_one_line(text)}")
        return int(text)

    return read


def _line(text: str) -> str:
    if on_one_line(text) != text.replace("\t", "\\t"):
        raise argparse.ArgumentTypeError("expected one line; give the flag once for each")
    return text


def _option(text: str) -> str:
    option = _line(text).removeprefix("#SBATCH").strip()
    if not option.startswith("-"):
        raise argparse.ArgumentTypeError(f"expected an option as --qos=long, got {option or '-'}")
    return option


FLAGS: dict[str, tuple[Callable[[str], object], str, str]] = {
    "partition": (_like(NAME, "a name"), "NAME", "where it is queued"),
    "account": (_like(NAME, "a name"), "NAME", "whom it is counted to"),
    "time": (_like(TIME, "a time as 24:00:00 or 2-12"), "TIME", "limit of a turn, as 24:00:00"),
    "nodes": (_count(1), "N", "machines (1)"),
    "gpus": (_count(0), "N", "GPUs of a machine, with a process each (1)"),
    "processes": (_count(1), "N", "processes of a machine, with --gpus=0"),
    "cpus": (_count(1), "N", "cores of a process"),
    "mem": (_like(MEMORY, "a size as 200G"), "SIZE", "memory of a machine, as 200G; 0 is all"),
    "job-name": (_like(NAME, "a name"), "NAME", "name of job and log (rlhf-STAGE)"),
    "warn": (_count(1), "SECONDS", "before the limit: more than a step and saving take (300)"),
    "after": (
        _like(NAME, "the number of a job"),
        "JOB",
        "wait for that job, which makes what this one reads: it is not looked for yet",
    ),
    "config": (str, "FILE", "a config of your own, as for a stage"),
    "config-dir": (str, "DIR", "options of your own, as for a stage"),
}
"""Flags with a value: how it is read, its name and its meaning."""
REPEATED: dict[str, tuple[Callable[[str], object], str, str]] = {
    "sbatch": (_option, "OPTION", "one more #SBATCH line, as --sbatch=--qos=long; again for more"),
    "setup": (_line, "LINE", "shell before the stage: --setup='module load cuda'; again for more"),
}


def parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    found = _Parser(prog="rlhf-cli slurm", description=DESCRIPTION, usage=USAGE, allow_abbrev=False)
    found.add_argument("stage", metavar="STAGE", help=", ".join(STAGES))
    what = "print the job on stdout, and on stderr what would run; submit nothing"
    found.add_argument("--check", action="store_true", help=what)
    for name, (read, value, meaning) in FLAGS.items():
        found.add_argument(f"--{name}", type=read, metavar=value, help=meaning)
    for name, (read, value, meaning) in REPEATED.items():
        flag = f"--{name}"
        found.add_argument(
            flag, type=read, metavar=value, help=meaning, action="append", default=[]
        )
    found.set_defaults(nodes=1, gpus=1, warn=300)
    return found


def flags() -> list[str]:
    """Each flag as a shell completes it: one that takes a value ends in `=`."""
    actions = parser()._actions
    named = [(each.option_strings[0], each.nargs) for each in actions if each.option_strings]
    return [f"{flag} " if takes == 0 else f"{flag}=" for flag, takes in named if len(flag) > 2]


def run(words: list[str]) -> None:
    """Check the stage's config, then print the job or submit it and print its number.

    Raises:
        UserError: the command or the config is wrong, or there is no sbatch.
        RunError: sbatch refuses.
    """
    order, overrides = parse(words)
    told = checked(order, overrides)
    script = os.fsencode(rendered(order, stage_words(order, overrides)))
    if order.check:
        lines = (on_one_line(redacted(line)) for line in told)
        print(*lines, sep="\n", file=sys.stderr, flush=True)
        raw = getattr(sys.stdout, "buffer", None)
        if raw is None:
            print(script.decode(errors="replace"), end="")
        else:
            sys.stdout.flush()
            raw.write(script)
            raw.flush()
        return
    print(submitted(script))


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of the command, and the overrides of the stage.

    Raises:
        UserError: there is no such stage or flag.
    """
    order, overrides = parser().parse_known_args(words)
    if wrong := next((word for word in overrides if word.startswith("-")), None):
        raise UserError(f"slurm: unknown flag {on_one_line(wrong)}; see rlhf-cli slurm --help")
    if order.stage not in STAGES:
        hint = nearest(order.stage, list(STAGES)) or f"; stages are {', '.join(STAGES)}"
        raise UserError(f"slurm: unknown stage {order.stage}{hint}")
    if order.processes is not None and order.gpus:
        raise UserError("slurm: --processes is for --gpus=0; else there is one for each GPU")
    order.tasks = order.gpus or order.processes or 1
    return order, overrides


def checked(order: argparse.Namespace, overrides: list[str]) -> list[str]:
    """What would run, as `rlhf-cli STAGE --check` says it.

    Raises:
        UserError: the config, a path or a row is wrong, or a job cannot have it.
    """
    from rlhf_cli.config.compose import compose
    from rlhf_cli.data.stdin import STDIN

    cfg = compose(order.stage, overrides, order.config_dir, order.config)
    if cfg.data.path == STDIN:
        raise UserError("slurm: a job has no standard input; give data.path=FILE")
    if cfg.hardware.processes not in (1, AUTO):
        raise UserError(
            f"slurm: srun starts the processes, {order.nodes} x {order.tasks} by --nodes and "
            f"--gpus: leave hardware.processes={cfg.hardware.processes} out"
        )
    if order.after is not None:
        return [f"after job {order.after}: what the stage reads is looked for when it starts"]
    from rlhf_cli.runs.preflight import preflight
    from rlhf_cli.runs.sharing import Ranks

    if cfg.hardware.device == AUTO:  # there need be no GPU here
        cfg.hardware.device = "cuda" if order.gpus else "cpu"
    ranks = Ranks(order.nodes * order.tasks, order.tasks)
    return preflight(cfg, check_only=True, ranks=ranks).lines()


def stage_words(order: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    """The command of each process."""
    here = shutil.which("rlhf-cli") or order.setup
    program = ["rlhf-cli"] if here else [sys.executable, "-P", "-m", "rlhf_cli"]
    own = {"--config": order.config, "--config-dir": order.config_dir}
    given = [f"{flag}={value}" for flag, value in own.items() if value is not None]
    return [*program, order.stage, *given, *overrides]


def rendered(order: argparse.Namespace, words: Sequence[str]) -> str:
    """The job: what SLURM is asked for, the lines before the stage, and the stage."""
    asked = {
        "job-name": order.job_name or f"rlhf-{order.stage}",
        "partition": order.partition,
        "account": order.account,
        "time": order.time,
        "nodes": order.nodes,
        "ntasks-per-node": order.tasks,
        "gpus-per-node": order.gpus or None,
        "cpus-per-task": order.cpus,
        "mem": order.mem,
        "dependency": order.after and f"afterok:{order.after}",
        "output": "%x-%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{order.warn}",
    }
    options = [f"--{name}={value}" for name, value in asked.items() if value is not None]
    lines = [f"#SBATCH {option}" for option in (*options, "--requeue", *order.sbatch)]
    setup = "".join(f"{line}\n" for line in order.setup) + "\n" * bool(order.setup)
    bound = f"--cpus-per-task={order.cpus} " if order.cpus else ""  # srun does not take it over
    return (
        HEAD.format(directives="\n".join(lines))
        + setup
        + BODY.format(bound=bound, command=shlex.join(words))
    )


def submitted(script: bytes) -> str:
    """Hand a job to sbatch; returns its number.

    Raises:
        UserError: there is no sbatch.
        RunError: it refuses.
    """
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True)
    except FileNotFoundError:
        raise UserError(
            "slurm: no sbatch on this machine; --check prints the job, to be submitted elsewhere"
        ) from None
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode:
        raise RunError(f"slurm: sbatch refuses: {on_one_line(said) or done.returncode}")
    return done.stdout.decode(errors="replace").strip().split(";")[0]  # a cluster's name follows
