"""How many responses an iteration has, how many sequences an update, and how long they are."""

from typing import Any

from rlhf_cli.data.kinds import JUDGEMENTS, row_kind
from rlhf_cli.runs.inherited import context_of
from rlhf_cli.runs.sharing import ALONE, Ranks


def rows_of_update(cfg: Any, ranks: Ranks = ALONE) -> int:
    """Sequences of an update, or the most of them that one of several ranks has."""
    items, rows = items_of_update(cfg), rows_per_item(cfg)
    if cfg.samples_online:
        rows = 1  # responses are dealt out one by one
    return ranks.share(items) * rows


def items_of_update(cfg: Any) -> int:
    """What an update has that no two ranks share: responses, or rows with all of theirs."""
    items: int = getattr(cfg.algo, "minibatch_size", cfg.algo.batch_size)
    return items * rows_per_item(cfg) if cfg.samples_online else items


def rows_per_item(cfg: Any) -> int:
    """Sequences in an item of a batch."""
    if row_kind(cfg) in JUDGEMENTS:
        return 2  # a pair; rankings have more, and fill the micro-batch
    return int(getattr(cfg.algo, "group_size", 1))


def responses_of(cfg: Any) -> int:
    """Responses that an iteration samples."""
    group: int = getattr(cfg.algo, "group_size", 1)
    return int(cfg.algo.batch_size) * group


def longest_sequence(cfg: Any) -> int:
    """Tokens of prompt and response together; where nothing limits them, of a micro-batch."""
    answer = getattr(cfg.algo, "max_tokens", None) or cfg.data.max_response_tokens
    if answer is not None and cfg.data.max_prompt_tokens is not None:
        return int(cfg.data.max_prompt_tokens + answer)
    return context_of(cfg) or int(cfg.hardware.tokens_at_once)
