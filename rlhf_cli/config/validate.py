"""Bounds of single keys, and rules between keys: one line for the first that is broken.

No torch, and no files but those that functions of users stand in.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from rlhf_cli.config import catalog
from rlhf_cli.config.data_rules import data_rules
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.evaluation_rules import evaluation_rules
from rlhf_cli.config.hardware_rules import hardware_rules
from rlhf_cli.config.hints import unknown_value, wrong_value
from rlhf_cli.config.judge_rules import judge_rules
from rlhf_cli.config.label_rules import label_rules
from rlhf_cli.config.model_rules import model_rules
from rlhf_cli.config.online_rules import online_rules
from rlhf_cli.config.paths import is_path
from rlhf_cli.config.rollout_rules import rollout_rules
from rlhf_cli.config.schema.algorithms import Decoding
from rlhf_cli.config.schema.keys import AUTO
from rlhf_cli.config.schema.stages import (
    DpoConfig,
    GenerateConfig,
    PpoConfig,
    RewardConfig,
    Run,
    SftConfig,
)
from rlhf_cli.config.secrets import refuse_secrets
from rlhf_cli.config.selection_rules import selection_rules
from rlhf_cli.config.stages import WITHOUT_REFERENCE
from rlhf_cli.config.switches import complaints

LARGEST = 2**53 - 1  # of whole numbers: sums with them stay exact

# Where a file or folder is named, or may be.
_PATHS = (
    *("labels", "instructions", "known", "anchors"),
    *("out", "name", "policy", "reference", "reference_cache", "baselines", "anchor"),
    *("prompted", "few_shot", "best_of", "samples", "choices", "judge_prompt", "principles"),
    *("reviser", "critique_prompt", "revision_prompt"),
    "responses_cache",
    *("data.path", "data.eval_path", "data.text_path", "data.prefix"),
    "model.path",
)


def validate(stage: str, cfg: Run) -> None:
    """Check a typed config.

    Raises:
        UserError: a value is secret, out of bounds or contradicts another key.
    """
    values = {key: _value(cfg, key) for key in catalog.keys(stage)}
    refuse_secrets(values)
    for key, value in values.items():
        _check_entries(key, value)
        if catalog.keys(stage)[key].metadata["texts"]:
            _check_texts(stage, key, value)
        _check_bounds(stage, key, value)
        if key in _PATHS:
            _check_path(key, value)
    for complaint in complaints(stage, values):
        raise UserError(complaint)
    for rule in _RULES:
        for complaint in rule(cfg):
            raise UserError(complaint)


def _check_path(key: str, value: Any) -> None:
    for each in value if isinstance(value, list) else [value]:
        if each is not None and not is_path(each):
            raise UserError(f"{key}={each} cannot be a path: it is too long, or no text")


def _value(cfg: Run, key: str) -> Any:
    node: Any = cfg
    for name in key.split("."):
        node = getattr(node, name)
    return node


def _check_entries(key: str, value: Any) -> None:
    """Lists and maps hold plain values: OmegaConf lets further lists and maps pass for texts."""
    entries = {}
    if isinstance(value, list):
        entries = {f"{key}[{i}]": each for i, each in enumerate(value)}
    elif isinstance(value, dict):
        entries = {f"{key}.{name}": each for name, each in value.items()}
    for name, each in entries.items():
        if isinstance(each, list | dict) and key != "data.sources":  # read by data/sources.py
            raise UserError(f"{name} must be one value, got {each}")


def _check_texts(stage: str, key: str, value: Any) -> None:
    """A text or a list of texts, none of them empty; null says that there is none."""
    if value is None:
        return
    texts = value if isinstance(value, list) else [value]
    if not texts or any(not str(each).strip() for each in texts):
        raise UserError(f"{key} is empty; name a file, or leave it out")
    if wrong := [each for each in texts if not isinstance(each, str)]:
        raise UserError(wrong_value(stage, key, wrong[0]))


def _check_bounds(stage: str, key: str, value: Any) -> None:
    if value is None and catalog.keys(stage)[key].metadata["auto"] is None:
        return
    if known := catalog.choices(stage, key):
        for each in value if isinstance(value, list) else [value]:
            if each not in known and catalog.own_function(stage, key, each) is None:
                raise UserError(unknown_value(stage, key, each))
        return
    limits = catalog.keys(stage)[key].metadata
    if (kind := limits["auto"]) is not None:
        if value == AUTO:
            return
        if type(value) is not kind:
            raise UserError(wrong_value(stage, key, value))
    for each in value if isinstance(value, list) else [value]:
        _check_number(stage, key, each)


def _check_number(stage: str, key: str, value: Any) -> None:
    """A number, or an entry of a list of them, within the bounds of its key."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key} must be finite, got {value}")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise UserError(f"{key} must be below 2^53, got {value}")
    limits = catalog.keys(stage)[key].metadata
    within = {
        "ge": lambda bound: value >= bound,
        "gt": lambda bound: value > bound,
        "le": lambda bound: value <= bound,
        "lt": lambda bound: value < bound,
    }
    if not all(holds(limits[name]) for name, holds in within.items() if name in limits):
        raise UserError(wrong_value(stage, key, value))


# --------------------------------------------------------------------------- rules
# Each yields the complaints about one subject; only the first is shown.


def _plain_text(cfg: Run) -> Iterator[str]:
    if cfg.data.format == "demo" or cfg.data.text_path is not None:
        return
    if isinstance(cfg, PpoConfig) and cfg.algo.ptx_coef > 0:
        yield f"algo.ptx_coef={cfg.algo.ptx_coef:g} needs plain text: give data.text_path"
    if isinstance(cfg, SftConfig) and cfg.algo.text_mix:
        yield (
            f"algo.text_mix={cfg.algo.text_mix:g} needs plain text: give data.text_path "
            f"or set algo.text_mix=0"
        )


def _distillation(cfg: Run) -> Iterator[str]:
    if not isinstance(cfg, SftConfig) or cfg.algo.loss != "distill":
        return
    if cfg.model.path is None:
        yield "algo.loss=distill learns from the model that it starts from: give model.path"
    if cfg.data.prefix is None:
        yield "algo.loss=distill learns what a prefix does: give data.prefix=FILE"
    if cfg.algo.text_mix != 0:
        yield "algo.loss=distill learns from responses alone: set algo.text_mix=0"
    if cfg.model.dropout or cfg.model.lora_dropout:
        yield "algo.loss=distill compares two passes: set model.dropout=0 and model.lora_dropout=0"
    if cfg.data.streaming:
        yield "algo.loss=distill reads each row twice; set data.streaming=false"


def _picks(cfg: Run) -> Iterator[str]:
    """What generate makes rows of is there to choose from."""
    if not isinstance(cfg, GenerateConfig):
        return
    best, pairs, samples = cfg.algo.keep_best, cfg.algo.pairs, cfg.algo.samples
    if cfg.reward is None and best is not None:
        yield f"algo.keep_best={best} picks by reward: give reward="
    if cfg.reward is None and pairs == "best_worst":
        yield "algo.pairs=best_worst picks by reward: give reward="
    if best is not None and best > samples:
        yield f"algo.keep_best={best} of algo.samples={samples}: give as many samples, or more"
    if pairs == "best_worst" and samples == 1:
        yield "algo.pairs=best_worst picks from several: algo.samples=1 gives one"


def _decoding(cfg: Run) -> Iterator[str]:
    algo = getattr(cfg, "algo", None)
    if not isinstance(algo, Decoding):
        return
    if algo.max_tokens is not None and algo.min_tokens > algo.max_tokens:
        yield f"algo.min_tokens={algo.min_tokens} exceeds algo.max_tokens={algo.max_tokens}"
    if algo.beams > 1:
        neutral = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0}
        for name, value in neutral.items():
            if getattr(algo, name) != value:
                yield (
                    f"algo.beams={algo.beams} does not sample, so algo.{name} must be {value}, "
                    f"got {getattr(algo, name):g}"
                )
        if algo.samples > algo.beams:
            yield f"algo.samples={algo.samples} exceeds algo.beams={algo.beams}"
        if algo.stop:
            yield f"algo.stop works with sampling only, but algo.beams={algo.beams}"
        if getattr(algo, "temperatures", []):
            yield f"algo.temperatures is for sampling, but algo.beams={algo.beams}; set it to []"


_AGGREGATES = {"process": ("product", "min"), "token": ("mean", "sum")}


def _reward_model(cfg: Run) -> Iterator[str]:
    if not isinstance(cfg, RewardConfig):
        return
    loss, aggregate = cfg.algo.loss, cfg.algo.aggregate
    if aggregate is not None and aggregate not in _AGGREGATES[loss]:
        yield (
            f"algo.aggregate={aggregate} does not fit algo.loss={loss}, which takes "
            f"{' or '.join(_AGGREGATES[loss])}"
        )


def _doubts(cfg: Run) -> Iterator[str]:
    """How far labels are believed is said once."""
    if not isinstance(cfg, RewardConfig | DpoConfig):
        return
    if cfg.algo.soft_labels and cfg.algo.label_smoothing:
        yield (
            f"algo.label_smoothing={cfg.algo.label_smoothing:g} is one doubt for all rows, and "
            "algo.soft_labels=true takes that of each: set one of them to 0 or false"
        )


def _preferences(cfg: Run) -> Iterator[str]:
    if not isinstance(cfg, DpoConfig):
        return
    algo = cfg.algo
    if (algo.desirable_weight is None) != (algo.undesirable_weight is None):
        yield "algo.desirable_weight and algo.undesirable_weight are given together or not at all"
    if algo.loss in WITHOUT_REFERENCE:
        if algo.precompute_reference:
            yield f"algo.precompute_reference=true, but algo.loss={algo.loss} has no reference"
        if cfg.reference not in (None, "bootstrap"):
            yield f"reference={cfg.reference} is not used by algo.loss={algo.loss}; set it to null"


def _best_weights(cfg: Run) -> Iterator[str]:
    if not isinstance(cfg, SftConfig):
        return
    if cfg.select_by == "reward" and cfg.algo.keep != "best":
        yield f"select_by=reward chooses the best weights, but algo.keep={cfg.algo.keep}"


_RULES: tuple[Callable[[Run], Iterator[str]], ...] = (
    online_rules,
    model_rules,
    _plain_text,
    _distillation,
    _picks,
    hardware_rules,
    _decoding,
    rollout_rules,
    _reward_model,
    _doubts,
    _preferences,
    _best_weights,
    evaluation_rules,
    label_rules,
    judge_rules,
    selection_rules,
    data_rules,
)
