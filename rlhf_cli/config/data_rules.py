"""Rules between the keys of `data`, and between them and those of a stage."""

import re
from collections.abc import Iterator

from rlhf_cli.config.schema.stages import DpoConfig, GenerateConfig, RewardConfig, Run, SftConfig


def data_rules(cfg: Run) -> Iterator[str]:
    """What is wrong with the data of a run."""
    yield from _sources(cfg)
    yield from _streaming(cfg)
    yield from _steps(cfg)
    yield from _template(cfg)
    if cfg.data.prefix is not None and not (
        isinstance(cfg, GenerateConfig)
        or (isinstance(cfg, SftConfig) and cfg.algo.loss == "distill")
    ):
        yield "data.prefix is for generate and for sft algo=distill; set it to null"


def _sources(cfg: Run) -> Iterator[str]:
    data = cfg.data
    if not data.sources:
        return
    if data.format == "demo":
        yield "data=demo brings its own rows; data=rows data.sources=[...] reads yours"
    if data.path is not None:
        yield f"data.sources takes the place of data.path={data.path}; give one of them"
    if data.max_rows is not None:
        yield "data.max_rows is for data.path; give each of data.sources a cap"


def _streaming(cfg: Run) -> Iterator[str]:
    data = cfg.data
    if not data.streaming:
        return
    if not isinstance(cfg, SftConfig | RewardConfig | DpoConfig):
        yield "data.streaming is for sft, reward and dpo, which read each row once"
        return
    if cfg.algo.max_steps is None:
        yield "data.streaming reads rows without an end; set algo.max_steps"
    if data.eval_rows is not None:
        yield "data.streaming holds out by data.eval_share, or data.eval_path; set eval_rows=null"
    if data.text_path is not None:
        yield "data.streaming mixes no plain text; set data.text_path=null"
    if any("weight" in source or "repeat" in source for source in data.sources):
        yield "data.streaming reads one source after the other; give them no weight or repeat"
    if "feedback_to_ranking" in data.convert:
        yield "data.convert: feedback_to_ranking needs all rows at once; not with data.streaming"
    if isinstance(cfg, SftConfig) and cfg.select_by == "reward":
        yield "select_by=reward needs all held-out rows; not with data.streaming"
    if isinstance(cfg, DpoConfig):
        if cfg.algo.loss == "kto":
            yield "algo.loss=kto pairs rows with others; not with data.streaming"
        if cfg.reference == "bootstrap":
            yield "reference=bootstrap learns from all rows first; not with data.streaming"
        if cfg.algo.precompute_reference or cfg.algo.epochs > 1:
            yield (
                "data.streaming scores the reference as rows come; set "
                "algo.precompute_reference=false and algo.epochs=1"
            )


def _steps(cfg: Run) -> Iterator[str]:
    try:
        re.compile(cfg.data.step_end)
    except re.error as error:
        yield f"data.step_end={cfg.data.step_end!r} is not a regular expression: {error}"


def _template(cfg: Run) -> Iterator[str]:
    template = cfg.data.template
    if template not in (None, "chat") and "{prompt}" not in template:
        yield f"data.template must be chat or contain {{prompt}}, got {template!r}"
