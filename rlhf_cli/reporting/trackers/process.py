"""The process of one tracker: a JSON line for each thing that it is told, on standard input.

The first says of which run; figures and samples follow, and the end. It says where the run is to be
seen, and what went wrong, as JSON lines on the standard output that it was given; what libraries
print goes nowhere.
"""

import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import IO, Any

from rlhf_cli.config.secrets import redacted, redacted_within, take
from rlhf_cli.reporting.trackers.about import FINAL, About, Sample, Tracker, numbers

LAST = 60  # seconds that it has for the end, once nobody waits for it any more
LONGEST = 300  # characters of what a library complains of


def main() -> None:
    """Tell a tracker what standard input says."""
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    about = About(**json.loads(sys.stdin.readline()))
    for name in about.taken:
        if name in os.environ:
            take(name, os.environ[name])
    try:
        module = importlib.import_module(f"rlhf_cli.reporting.trackers.{about.tracker}")
        tracker: Tracker = module.begun(cleaned_run(about))
        _tell(told, "place", tracker.place)
        feed(tracker, map(json.loads, sys.stdin), told)
    except BaseException as error:  # what a library raises to end the process is a failure, too
        _tell(told, "failed", in_a_line(error))
        os._exit(1)
    os._exit(0)  # whatever threads the library has left


def feed(tracker: Tracker, messages: Iterator[dict[str, Any]], told: IO[str]) -> None:
    """Hand on figures, samples by their step, and the end.

    What a tracker does not take is left out, and said of the first: the next may be taken again, as
    after a fault of the network.
    """
    faults = Faults(told)
    samples: list[Sample] = []
    step, end = 0, None
    for message in messages:
        if (end := message.get("end")) is not None:
            break
        if samples and message["step"] != step:
            with faults.said():
                tracker.show(step, samples)
            samples = []
        step = message["step"]
        if "sample" in message:
            samples.append(redacted_within(message["sample"]))
            continue
        figures = numbers(message["figures"])
        del figures["step"]
        with faults.said():
            tracker.log(step, {clean_name(name): value for name, value in figures.items()})
    signal.alarm(LAST)
    if samples:
        with faults.said():
            tracker.show(step, samples)
    figures = numbers(end or {})
    final = {clean_name(FINAL + name): value for name, value in figures.items()}
    tracker.end(None if end is None else final)


class Faults:
    """What a tracker raises, of which the first is told."""

    def __init__(self, told: IO[str]) -> None:
        self._told, self._count = told, 0

    @contextmanager
    def said(self) -> Iterator[None]:
        """Let an error of this block cost no more than what it was about."""
        try:
            yield
        except Exception as error:
            self._count += 1
            if self._count == 1:
                _tell(self._told, "left_out", in_a_line(error))


def cleaned_run(about: About) -> About:
    """What is told of a run, without the values of secret variables; its folder lies where it
    does.
    """
    return About(**{**redacted_within(vars(about)), "out": about.out})


@lru_cache(maxsize=4096)
def clean_name(name: str) -> str:
    """The name of a metric: what a term of a reward is called may be anything."""
    return redacted(name)


def in_a_line(error: BaseException) -> str:
    """What an error says, in a line that people can read."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."


def _tell(told: IO[str], kind: str, line: str) -> None:
    try:
        print(json.dumps({kind: line}), file=told, flush=True)
    except OSError:  # the run is gone
        return
