"""The jobs of a sweep, and the folder of each, which names what was swept.

A key that `out` already tells apart, as `name` does in runs/${name}/sft, is not named once more.
The name of a folder follows from the values of its own job alone: a sweep with one more value
leaves the folders of the others where they are.
"""

import hashlib
import itertools
import os
import re
from collections.abc import Collection, Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override

from rlhf_cli.config.errors import UserError

LONGEST = 40  # characters of a value in the name of a folder
LONGEST_NAME = 160  # of all of it
ODD = re.compile(r"[^\w.+-]+", re.ASCII)  # what a shell, Hydra or another system may not like


def jobs(words: Sequence[str]) -> list[list[str]]:
    """The words of each job, in Hydra's order and without its own settings.

    Raises:
        UserError: a word names its values by a pattern.
    """
    parsed = _parsed(words)
    for override in parsed:
        if isinstance(override.value(), Glob):
            key = override.get_key_element()
            raise UserError(f"{override.input_line}: name the options, as in {key}=A,B")
    return BasicSweeper.split_arguments(parsed, None)[0]


def job_name(number: int, count: int | None) -> str:
    """What people call a job that Hydra counts from 0, of so many, where that is known."""
    return f"job {number + 1}" + (f" of {count}" if count else "")


def settings(words: Sequence[str]) -> list[str]:
    """Those of Hydra's own among the words of a command."""
    return [word for word in words if _hydras(word)]


def chosen_elsewhere(words: Sequence[str]) -> bool:
    """Whether another sweeper than Hydra's own chooses the jobs, as it goes."""
    return any(re.match(r"hydra/sweeper=(?!basic$)", word) for word in words)


def fixed(words: Sequence[str]) -> dict[str, str]:
    """The words that all jobs have in common, by key."""
    parsed = [each for each in _parsed(words) if not each.is_sweep_override()]
    return {each.key_or_group: str(each.input_line) for each in parsed}


def _parsed(words: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides([each for each in words if not _hydras(each)])


def unnamed_keys(jobs: Sequence[Sequence[str]], outs: Sequence[str]) -> list[str]:
    """The keys that folders need not name: all jobs share their value, or `out` tells them apart.

    Raises:
        UserError: two jobs are the same.
    """
    values = [_values(words) for words in jobs]
    told = []
    for key in values[0]:
        alike: dict[
            tuple[str, ...], list[str]
        ] = {}  # the outs of jobs that differ in this key only
        for each, out in zip(values, outs, strict=True):
            others = tuple(value for name, value in each.items() if name != key)
            alike.setdefault(others, []).append(out)
        if all(map(_apart, alike.values())):
            told.append(key)
    shared = [key for key in values[0] if len({each[key] for each in values}) == 1]
    for unnamed in (told, shared):
        places = [place(out, words, unnamed) for out, words in zip(outs, jobs, strict=True)]
        if _apart(places):
            return unnamed
    twice = next(each for each in places if places.count(each) > 1)
    raise UserError(f"two jobs of the sweep would write {twice}: give each value once")


def _apart(places: Sequence[str]) -> bool:
    """Whether no folder is or holds another."""
    whole = sorted(os.path.join(os.path.abspath(each), "") for each in places)
    return not any(after.startswith(before) for before, after in itertools.pairwise(whole))


def place(out: str, words: Sequence[str], unnamed: Collection[str]) -> str:
    """The folder of a job.

    Args:
        out: what its config says.
        words: those of the job.
        unnamed: keys that its name leaves out.
    """
    values = {key: value for key, value in _values(words).items() if key not in unnamed}
    if not values:
        return out
    last = [key.rpartition(".")[2] for key in values]
    names = [
        short if last.count(short) == 1 else key for key, short in zip(values, last, strict=True)
    ]
    parts = [f"{key}={_plain(value)}" for key, value in zip(names, values.values(), strict=True)]
    name = "_".join(parts)
    return os.path.join(out, _marked(name, name[:LONGEST_NAME]))


def _values(words: Sequence[str]) -> dict[str, str]:
    """The value of each key as text; numbers as Hydra writes them, whatever was typed."""
    values = {}
    for each in _parsed(words):
        value = each.value()
        text = str(each.input_line).partition("=")[2]
        values[each.key_or_group] = value if isinstance(value, str) else text
    return values


def _plain(value: str) -> str:
    """A value as a part of a name."""
    kept = ODD.sub("-", value).strip("-") if ODD.search(value) else value
    return _marked(value, kept[-LONGEST:])


def _marked(text: str, kept: str) -> str:
    """What is kept of a text; where that is less, with digits that tell it from others."""
    digits = hashlib.sha256(text.encode()).hexdigest()[:6]
    return text if kept == text else "-".join(filter(None, (kept, digits)))


def _hydras(word: str) -> bool:
    return word.lstrip("+").startswith(("hydra.", "hydra/"))


def home(places: Sequence[str]) -> str:
    """The folder that gets Hydra's multirun.yaml: the innermost one that holds all jobs."""
    whole = [os.path.abspath(each) for each in places]
    parent = os.path.commonpath([os.path.dirname(each) for each in whole])
    if parent == os.path.sep:
        parent = os.path.dirname(whole[0])
    relative = os.path.relpath(parent)
    return parent if relative.startswith(os.pardir) else relative
