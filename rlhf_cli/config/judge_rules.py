"""Rules between the keys of language models that judge, and of those that revise."""

from collections.abc import Iterator
from dataclasses import fields

from rlhf_cli.config.schema.stages import EvaluateConfig, GenerateConfig, LabelConfig, Run

JUDGES_THERE = ("judge_concurrency", "judge_timeout", "judge_tokens")
REVISES_THERE = ("reviser_concurrency", "reviser_timeout")
"""Keys that are for endpoints alone."""
COMPARED = ("rank", "pair", "instructgpt")
"""Protocols of label whose tasks a judge of pairs can answer."""


def is_address(model: str) -> bool:
    """Whether a model is an endpoint, not a folder or hub id."""
    return model.startswith(("http://", "https://"))


def judge_rules(cfg: Run) -> Iterator[str]:
    """What a judge or a reviser needs, and which keys are for endpoints alone."""
    if isinstance(cfg, GenerateConfig):
        yield from _revises(cfg)
    if not isinstance(cfg, EvaluateConfig | LabelConfig):
        return
    if isinstance(cfg, LabelConfig):
        yield from _labels(cfg)
    if cfg.judge is None:
        return
    yield from _endpoint(cfg, "judge", JUDGES_THERE)
    if len(cfg.judge_prices) not in (0, 2):
        yield "judge_prices takes two prices, of tokens read and written, or none"
    if cfg.judge_max_cost is not None and not (is_address(cfg.judge) and cfg.judge_prices):
        yield f"judge_max_cost={cfg.judge_max_cost:g} is for endpoints with judge_prices"
    if isinstance(cfg, LabelConfig) or cfg.samples is not None:
        return
    if cfg.judge_samples > cfg.algo.samples:
        yield f"judge_samples={cfg.judge_samples} exceeds algo.samples={cfg.algo.samples}"


def _labels(cfg: LabelConfig) -> Iterator[str]:
    """Where a judge labels, or stands beside people."""
    protocol = cfg.algo.protocol
    if cfg.judge is not None and protocol not in COMPARED:
        yield (
            f"judge={cfg.judge} compares responses, and algo.protocol={protocol} asks of one "
            "alone: take rank or pair"
        )
    if cfg.source != "judge":
        return
    if cfg.judge is None:
        yield "source=judge needs judge=DIR, or the address of an endpoint"
    if len(cfg.annotators) > 1:
        yield f"source=judge: one judge labels; annotators={cfg.annotators} names more"
    if cfg.instructions is not None:
        yield "source=judge reads judge_prompt and principles: set instructions to null"


def _revises(cfg: GenerateConfig) -> Iterator[str]:
    """Where responses are revised."""
    if cfg.algo.revisions and cfg.algo.keep_best is not None:
        yield (
            f"algo.revisions={cfg.algo.revisions} and algo.keep_best={cfg.algo.keep_best} both "
            "write demonstrations.jsonl: take one, and the other in another out"
        )
    if cfg.reviser is not None:
        yield from _endpoint(cfg, "reviser", REVISES_THERE)


def _endpoint(cfg: Run, key: str, there: tuple[str, ...]) -> Iterator[str]:
    """What belongs to an endpoint, and to it alone.

    Args:
        there: keys that are for endpoints.
    """
    model, named = getattr(cfg, key), f"{key}_model"
    address, name = is_address(model), getattr(cfg, named)
    if "@" in model.partition("://")[2].partition("/")[0]:
        yield f"{key} holds a name or password: the variable {key.upper()}_API_KEY is for keys"
    if address and name is None:
        yield f"{key}={model} needs {named}=NAME, as the endpoint calls it"
    if not address and name is not None:
        yield f"{named}={name} is for endpoints, and {key}={model} is a folder"
    unused = {each.name: each.metadata["unused"] for each in fields(cfg) if each.name in there}
    for each, value in unused.items() if not address else ():
        if getattr(cfg, each) != value:
            yield f"{each} is for endpoints, and {key}={model} is a folder"
