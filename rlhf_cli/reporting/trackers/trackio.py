"""Trackio: on this machine, or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says."""

from collections.abc import Mapping

import trackio

from rlhf_cli.reporting.trackers.about import COLUMNS, SAMPLES, About, Sample


def begun(about: About) -> "Trackio":
    """A run of Trackio, or the same one again."""
    return Trackio(about)


class Trackio:
    """Figures, tables of samples, the settings as config."""

    def __init__(self, about: About) -> None:
        self._step = 0
        self._run = trackio.init(
            project=about.project,
            name=about.name,
            resume="allow" if about.resumed else "never",
            config=about.told(),
            embed=False,
        )
        self.place = f"trackio show --project {about.project}"

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """A row."""
        self._step = step
        self._run.log(dict(figures), step=step)

    def show(self, step: int, samples: list[Sample]) -> None:
        """A table."""
        self._run.log({SAMPLES: trackio.Table(columns=[*COLUMNS], data=samples)}, step=step)

    def end(self, figures: Mapping[str, float] | None) -> None:
        """A row at the last step."""
        if figures:
            self.log(self._step, figures)
        self._run.finish()
