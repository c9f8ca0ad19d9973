"""Rules between the keys of language models that judge."""

from collections.abc import Iterator
from dataclasses import fields

from rlhf_cli.config.schema.judges import JudgeKeys
from rlhf_cli.config.schema.stages import EvaluateConfig, LabelConfig, Run

OF_ENDPOINTS = ("judge_concurrency", "judge_timeout", "judge_tokens")
COMPARED = ("rank", "pair", "instructgpt")
"""Protocols of label whose tasks a judge of pairs can answer."""


def is_address(model: str) -> bool:
    """Whether a model is an endpoint, not a folder or hub id."""
    return model.startswith(("http://", "https://"))


def judges(cfg: Run) -> Iterator[str]:
    """Where a judge is asked."""
    if not isinstance(cfg, EvaluateConfig | LabelConfig):
        return
    if isinstance(cfg, LabelConfig):
        yield from _labels(cfg)
    if cfg.judge is None:
        return
    address = is_address(cfg.judge)
    if "@" in cfg.judge.partition("://")[2].partition("/")[0]:
        yield "judge holds a name or password: the variable JUDGE_API_KEY is for keys"
    if address and cfg.judge_model is None:
        yield f"judge={cfg.judge} needs judge_model=NAME, as the endpoint calls it"
    if not address and cfg.judge_model is not None:
        yield f"judge_model={cfg.judge_model} is for endpoints, and judge={cfg.judge} is a folder"
    unused = {each.name: each.metadata["unused"] for each in fields(JudgeKeys)}
    for name in () if address else OF_ENDPOINTS:
        if getattr(cfg, name) != unused[name]:
            yield f"{name} is for endpoints, and judge={cfg.judge} is a folder"
    if len(cfg.judge_prices) not in (0, 2):
        yield "judge_prices takes two prices, of tokens read and written, or none"
    if cfg.judge_max_cost is not None and not (address and cfg.judge_prices):
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
