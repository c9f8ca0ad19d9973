"""The encoder of a stage where no model is loaded: to look at rows, or to check them."""

from typing import Any

from rlhf_cli.config.schema.stages import SftConfig
from rlhf_cli.data.kinds import Demonstration, Text, reply_text
from rlhf_cli.data.rows import Rows
from rlhf_cli.data.templates import CHAT, PLAIN, TextTemplate, prefix_of, turns_of
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.models.scratch import learn_tokenizer
from rlhf_cli.models.tokenizers import load_tokenizer, stop_ids_of
from rlhf_cli.runs.inherited import check_context, context_of

LEARNT_FROM = 100_000  # rows, at most, that a new tokenizer learns from


def encoder_of(cfg: Any, rows: Rows) -> Encoder:
    """The encoder with which a stage reads its own rows."""
    room = getattr(cfg.algo, "max_tokens", None) or 0
    if cfg.start is None:
        tokenizer = new_tokenizer(cfg, rows)
    else:
        tokenizer = load_tokenizer(cfg.start, cfg.model)
    context = context_of(cfg)
    check_context(cfg, cfg.start, context)  # of the hub it is known now that its tokenizer is here
    prefix = "" if cfg.trains else prefix_of(cfg.data)
    encoder = Encoder(tokenizer, cfg.data, context, room, prefix)
    if cfg.start is not None:
        encoder.ends_with(stop_ids_of(cfg.start, tokenizer))
    return encoder


def new_tokenizer(cfg: SftConfig, rows: Rows) -> Any:
    """A tokenizer learnt from the first training rows."""
    assert cfg.model.vocab_size is not None
    texts: list[Any] = rows.split(Demonstration, LEARNT_FROM).train
    if cfg.algo.text_mix != 0:
        texts = texts + rows.texts(LEARNT_FROM).train
    return learn_tokenizer([written(row, cfg) for row in texts], cfg.model.vocab_size)


def written(row: Demonstration | Text, cfg: SftConfig) -> str:
    """A row as the text that a new tokenizer learns from."""
    if isinstance(row, Text):
        return row.text
    reply, template = reply_text(row.completion), cfg.data.template or PLAIN
    if isinstance(row.prompt, str) and template != CHAT:
        return TextTemplate(template).fill(row.prompt, row.columns, row.source) + reply
    turns = turns_of(row.prompt, row.columns)
    return "\n".join(map(reply_text, turns)) + reply
