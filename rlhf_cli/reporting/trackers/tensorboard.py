"""TensorBoard: an event file in the folder of the run, read by `tensorboard --logdir`."""

import time
from collections.abc import Mapping

import yaml
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from rlhf_cli.reporting.trackers.about import COLUMNS, SAMPLES, About, Sample

FLUSHED = 5  # seconds until what was logged can be seen


def begun(about: About) -> "TensorBoard":
    """The event file of a run, or a further one of a run that goes on."""
    return TensorBoard(about)


class TensorBoard:
    """Scalars, and as texts the settings and samples."""

    def __init__(self, about: About) -> None:
        self.place = f"tensorboard --logdir {about.out}"
        self._writer = EventFileWriter(about.out, flush_secs=FLUSHED)
        self._last: int | None = None
        self._text("run", 0, yaml.safe_dump(about.told(), sort_keys=False, allow_unicode=True))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Scalars; the first row makes TensorBoard forget what a resumed run does again."""
        if self._last is None:
            restart = SessionLog(status=SessionLog.START)
            self._add(Event(session_log=restart), step)
        self._last = step
        self._scalars(step, figures)

    def _scalars(self, step: int, figures: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._add(Event(summary=Summary(value=values)), step)

    def show(self, step: int, samples: list[Sample]) -> None:
        """Each sample as text, under the other."""
        blocks = [
            f"{name}: {value}"
            for sample in samples
            for name, value in [*zip(COLUMNS, sample, strict=True), ("", "")]
        ]
        self._text(SAMPLES, step, "\n".join(blocks))

    def end(self, figures: Mapping[str, float] | None) -> None:
        """Scalars at the last step; of a run that had only its end to do, at 0: nothing of what it
        did before is forgotten.
        """
        if figures:
            self._scalars(self._last or 0, figures)
        self._writer.close()

    def _text(self, tag: str, step: int, text: str) -> None:
        """A text as it is: what is indented is no markup."""
        block = "".join(f"    {line}\n" for line in text.split("\n"))
        self._add(Event(summary=Summary.FromString(text_pb(tag, block).SerializeToString())), step)

    def _add(self, event: Event, step: int) -> None:
        event.wall_time, event.step = time.time(), step
        self._writer.add_event(event)
