"""`rlhf-cli report RUN...`: runs as one HTML file that needs nothing else."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.hints import nearest
from rlhf_cli.reporting.terminal import print_path

if TYPE_CHECKING:
    from rlhf_cli.views.report import Runs

USAGE = """\
rlhf-cli report: runs as one HTML file, to look at and to hand on. It needs no network.

Usage: rlhf-cli report RUN ... [out=FILE] [pictures=png|svg]
       rlhf-cli report name=NAME [...]

  RUN            folders of runs, and of what holds runs, such as a chain or a sweep
  name=NAME      runs/NAME, as stages write there
  out=FILE       the file; report.html in RUN, or in what all of them lie in
  pictures=png   what is drawn as files too, in a folder beside it; or pictures=svg

Lineage, labels and who agrees with whom, figures of policies, frontier, win rates, ratings, rewards
before and after, calibration, samples, curves of every stage, settings and how runs differ. Runs
that differ in their seed alone are drawn as their mean. A run that goes on, or has stopped, is
shown as far as it is."""
KEYS = ("name", "out", "pictures")
KINDS = ("png", "svg")
FILE = "report.html"


def run(words: list[str]) -> None:
    """Write the page and print where it is.

    Raises:
        UserError: there is no folder of a run, a key is wrong, or the file cannot be written.
    """
    if {"--help", "-h"} & set(words):
        print(USAGE)
        return
    places, keys = parse(words)
    from rlhf_cli.views.report import report, runs_at

    runs = runs_at(places)
    file = Path(keys["out"]) if "out" in keys else default_file(places)
    check_ours(file)
    if "pictures" in keys:
        check_pictures(file)
    text = report(runs, title_of(places))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        from rlhf_cli.folders.files import write_text

        write_text(file, text)
        if "pictures" in keys:
            write_pictures(runs, pictures_beside(file), keys["pictures"])
    except OSError as error:
        raise UserError(f"report: cannot write {file}: {error.strerror}") from error
    said = f"{len(runs.records)} runs, {len(runs.figures)} figures, {len(text) / 1e6:.1f} MB"
    print(f"report: {said}; open it in a browser", file=sys.stderr)
    print_path(file)


def parse(words: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """The folders, and the values of keys.

    Raises:
        UserError: there is no folder, or no such key or value.
    """
    keys: dict[str, str] = {}
    places = []
    for word in words:
        key, equals, value = word.partition("=")
        if word.startswith("-"):
            raise UserError(f"report: unknown flag {word}; see rlhf-cli report --help")
        if not equals or Path(word).exists():
            places.append(Path(word))
        elif key not in KEYS:
            hint = nearest(key, KEYS) or f"; it takes {', '.join(KEYS)}"
            raise UserError(f"report: no key {key}{hint}")
        elif not value:
            raise UserError(f"report: {key}= has no value")
        else:
            keys[key] = value
    if "name" in keys:
        places.append(Path("runs", keys["name"]))
    if keys.get("pictures", KINDS[0]) not in KINDS:
        raise UserError(f"report: pictures={keys['pictures']} is neither png nor svg")
    if not places:
        raise UserError("report takes folders of runs: rlhf-cli report runs/demo, or name=demo")
    return places, keys


def default_file(places: Sequence[Path]) -> Path:
    """report.html in the one place, or in the folder that all places lie in."""
    import os

    if len(places) == 1:
        return places[0] / FILE
    common = os.path.commonpath([os.path.abspath(place) for place in places])
    return Path(os.path.relpath(common)) / FILE


def check_ours(file: Path) -> None:
    """Nothing is overwritten but an earlier report.

    Raises:
        UserError: the file is something else.
    """
    from rlhf_cli.views.html import MADE_BY, POLICY_START

    if file.is_dir():
        raise UserError(f"report: out={file} is a folder; name a file in it")
    if not file.exists():
        return
    with file.open(encoding="utf-8", errors="replace") as stream:
        start = stream.read(POLICY_START)
    if MADE_BY not in start:
        raise UserError(f"report: {file} is there and no report; give out= another name")


def pictures_beside(file: Path) -> Path:
    """The folder of a page's pictures: its name without the end."""
    return file.with_suffix("")


def check_pictures(file: Path) -> None:
    """They lie in no folder of a run, whose files are known, and in no file.

    Raises:
        UserError: the name of the page leads there.
    """
    from rlhf_cli.runs.lineage import runs_in

    folder = pictures_beside(file)
    if folder == file or (folder.exists() and not folder.is_dir()):
        raise UserError(
            f"report: pictures go to a folder {folder}: give out= a name as {folder}.html"
        )
    if folder in runs_in([folder]):
        raise UserError(f"report: pictures would go into the run {folder}; give out= another name")


def title_of(places: Sequence[Path]) -> str:
    """What the page is called: the places' names."""
    from rlhf_cli.reporting.terminal import on_one_line

    names = [on_one_line(place.resolve().name) for place in places]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def write_pictures(runs: "Runs", folder: Path, kind: str) -> None:
    """Each figure of the page as a file in a folder."""
    from rlhf_cli.reporting.plots import write_picture

    folder.mkdir(exist_ok=True)
    for name, figure in runs.figures.items():
        write_picture(folder / f"{name}.{kind}", figure.panels, figure.title)
