"""The first rows as tokens, for --check: templates and lengths, without torch."""

from typing import Any

from transformers import PreTrainedTokenizerFast

from rlhf_cli.config.schema.stages import Run
from rlhf_cli.data.files import is_local
from rlhf_cli.data.kinds import row_kind
from rlhf_cli.data.reading import Walk
from rlhf_cli.data.rows import Rows, walked
from rlhf_cli.data.templates import prefix_of
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.folders.generation import name_eos, read_generation
from rlhf_cli.runs.inherited import context_of

ROWS = 200  # of each source


def check_tokens(cfg: Run, rows: Rows) -> list[str]:
    """The template writes the first rows of local files, and they fit the limits.

    Args:
        cfg: of a run that starts from a folder with a tokenizer.

    Returns:
        Lines on lengths, and on what is cut or dropped.

    Raises:
        UserError: as the stage would.
    """
    room = getattr(cfg.algo, "max_tokens", None) or 0
    assert cfg.start is not None
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(cfg.start)
    settings = read_generation(cfg.start)
    name_eos(tokenizer, settings, cfg.start)
    encoder = Encoder(tokenizer, cfg.data, context_of(cfg), room, prefix_of(cfg.data))
    kind, count, whole = row_kind(cfg), 0, True
    for source in rows.places(kind).all:
        if is_local(source.path):
            walk = Walk(source, kind, cfg.data, limit=ROWS)
            first, _, _ = walked(walk)
            count, whole = count + len(encoder.items(first, kind)), whole and not walk.unread
    told = "" if whole else f"of the first {count} rows: "
    return [f"{told}{line}" for line in encoder.report()]
