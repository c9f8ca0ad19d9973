"""The rows of a run as items: tokenised once, checked against its loss, dealt to its steps."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlhf_cli.config.schema.stages import Run
from rlhf_cli.data.batches import EpochBatches
from rlhf_cli.data.dataset import Dataset, dataset_of
from rlhf_cli.data.kinds import Text, row_kind
from rlhf_cli.data.look import expected_rows
from rlhf_cli.data.rows import Rows, text_data
from rlhf_cli.data.store import Items
from rlhf_cli.data.streaming import Stream, StreamBatches, streamed
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.reporting.console import Bar, say
from rlhf_cli.runs.data_checks import check_judgements, what_is_read

MANY = 50_000  # rows that take a while to read


class RunData:
    """What a stage learns from.

    stream: the batches of rows that are read while the run goes on, once they are asked for.
    """

    def __init__(self, cfg: Run, rows: Rows) -> None:
        self._cfg, self._rows = cfg, rows
        self.stream: StreamBatches[Any] | None = None

    def tokenised(self, encoder: Encoder, kind: type) -> Dataset:
        """The rows of a kind, tokenised, under a bar where that takes a while."""
        places = replace(self._rows.places(kind), watched=_watches(self._cfg))
        if self._cfg.data.streaming:
            check = self._check_row if kind is row_kind(self._cfg) else lambda row: None
            return streamed(places, kind, self._cfg.data, encoder, check)
        count = expected_rows(places)
        if count > MANY:
            say(f"reading about {count:,} rows of {places.name}")
        with Bar("rows", count) as bar:
            return dataset_of(places, kind, self._cfg.data, encoder, bar.advance)

    def judged(self, encoder: Encoder) -> Dataset:
        """Rows of the kind that the loss reads, each with what it reads of them.

        Raises:
            UserError: a row does not say it.
        """
        data = self.tokenised(encoder, row_kind(self._cfg))
        if what_is_read(self._cfg):
            known = [data.held_out] if self._cfg.data.streaming else [data.train, data.held_out]
            for side in known:  # a stream checks each row as it comes
                check_judgements(self._cfg, (item.row for item in side))
        return data

    def _check_row(self, row: Any) -> None:
        check_judgements(self._cfg, [row])

    def batches(
        self,
        items: Sequence[Any] | Stream[Any],
        batch_size: int,
        epochs: int,
        name: str,
        max_steps: int | None = None,
    ) -> EpochBatches[Any] | StreamBatches[Any]:
        """The batch of each step; resume points keep where they stand."""
        seed = self._cfg.seed
        if isinstance(items, Stream):
            assert max_steps is not None  # validate() asks for it
            self.stream = StreamBatches(items, batch_size, max_steps, seed, name)
            return self.stream
        batches: EpochBatches[Any] = EpochBatches(items, batch_size, epochs, seed, name, max_steps)
        warmup = getattr(self._cfg.algo, "warmup_steps", 0)
        if warmup >= len(batches):
            say(
                f"note: {len(batches)} updates, {warmup} of warm-up: algo.lr is never reached; "
                "lower algo.warmup_steps, or give more epochs"
            )
        return batches

    def texts(self, encoder: Encoder) -> Dataset:
        """Plain text for the pretraining mix, tokenised; empty where none is named."""
        places = self._rows.text_places()
        if places is None:
            return Dataset(Items.none(), Items.none(), [])
        with Bar("plain text", expected_rows(places)) as bar:
            return dataset_of(places, Text, text_data(self._cfg.data), encoder, bar.advance)


def _watches(cfg: Run) -> bool:
    """Whether a stage evaluates on held-out rows."""
    return getattr(cfg.algo, "eval_every", 1) is not None
