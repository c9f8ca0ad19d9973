"""`rlhf-cli report RUN...`: runs as one HTML file that needs nothing else."""

from pathlib import Path

from rlhf_cli.config.errors import UserError
from rlhf_cli.reporting.terminal import print_path

USAGE = """\
rlhf-cli report: runs as one HTML file, to look at and to hand on.

Usage: rlhf-cli report RUN ..."""


def run(words: list[str]) -> None:
    """Write the page and print where it is.

    Raises:
        UserError: there is no folder of a run.
    """
    if {"--help", "-h"} & set(words):
        print(USAGE)
        return
    if not words:
        raise UserError("report takes folders of runs: rlhf-cli report runs/demo")
    from rlhf_cli.runs.lineage import runs_in
    from rlhf_cli.views.report import report

    folders = sorted(runs_in([Path(word) for word in words]))
    file = Path("report.html")
    file.write_text(report(folders), encoding="utf-8")
    print_path(file)
