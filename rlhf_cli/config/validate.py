"""Bounds of single keys and rules between keys. One line per broken rule; no torch, no files but
those that functions of users stand in."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from rlhf_cli.config import catalog
from rlhf_cli.config.data_rules import data_rules
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.hints import unknown_value, wrong_value
from rlhf_cli.config.judge_rules import judges
from rlhf_cli.config.online_rules import online
from rlhf_cli.config.paths import is_path
from rlhf_cli.config.rollout_rules import rollouts
from rlhf_cli.config.schema.algorithms import Decoding
from rlhf_cli.config.schema.keys import AUTO
from rlhf_cli.config.schema.models import Model, SftModel
from rlhf_cli.config.schema.stages import (
    DpoConfig,
    EvaluateConfig,
    GenerateConfig,
    LabelConfig,
    PpoConfig,
    RewardConfig,
    Run,
    SftConfig,
)
from rlhf_cli.config.secrets import refuse_secrets
from rlhf_cli.config.selection_rules import selection
from rlhf_cli.config.stages import WITHOUT_REFERENCE, stage_name
from rlhf_cli.config.switches import complaints, written

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
        _check_entries(stage, key, value)
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


def _check_entries(stage: str, key: str, value: Any) -> None:
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


def _scratch_model(cfg: Run) -> Iterator[str]:
    model = getattr(cfg, "model", None)
    if not isinstance(model, SftModel) or model.path is not None:
        return
    assert model.hidden_size and model.heads and model.context  # for the type checker
    if model.lora_rank or model.dtype != "float32":
        yield "a model from scratch trains all weights in float32: model.lora_rank=0 is needed"
    if model.frozen_layers:
        yield "a model from scratch trains all layers: model.frozen_layers=0 is needed"
    if model.router_aux_coef:
        yield "a model from scratch has no routers: model.router_aux_coef=null is needed"
    if model.hidden_size % model.heads:
        yield f"model.heads={model.heads} must divide model.hidden_size={model.hidden_size}"
    longest = (cfg.data.max_prompt_tokens or 0) + (cfg.data.max_response_tokens or 0)
    if model.context < longest:
        yield (
            f"model.context={model.context} is shorter than data.max_prompt_tokens + "
            f"data.max_response_tokens = {longest}; set model.context={longest} or lower them"
        )


def _lora(cfg: Run) -> Iterator[str]:
    model = getattr(cfg, "model", None)
    if isinstance(model, Model) and model.lora_rank == 0 and not model.merge_lora:
        yield "model.merge_lora=false writes an adapter, but model.lora_rank=0 trains none"
    if isinstance(model, Model):
        yield from _adapter(cfg, model)
    if isinstance(model, Model) and model.lora_rank and model.frozen_layers:
        yield (
            f"model.frozen_layers={model.frozen_layers} is for training all weights; an adapter "
            "(model.lora_rank > 0) freezes the whole base: set model.frozen_layers=0"
        )


def _adapter(cfg: Run, model: Model) -> Iterator[str]:
    use, whole = model.adapter, [*model.modules_to_save, *(["DoRA"] if model.use_dora else [])]
    if use in ("continue", "stack") and not model.lora_rank:
        yield f"model.adapter={use} trains an adapter, but model.lora_rank=0; set it to 16"
    if use == "merge" and model.lora_rank and not model.merge_lora:
        yield (
            "model.adapter=merge with model.merge_lora=false would write an adapter whose base is "
            "on no disk: set model.merge_lora=true, or export the policy first and start from that"
        )
    if use == "stack" and whole:
        yield f"model.adapter=stack adds up plain LoRA matrices, without {whole[0]}"
    if use == "stack" and getattr(cfg, "reference", None) == "bootstrap":
        yield "model.adapter=stack does not go with reference=bootstrap; continue or merge it"
    if model.quantize is not None and model.merge_lora:
        yield (
            f"model.quantize={model.quantize} writes an adapter, whose base has few bits here: set "
            "model.merge_lora=false"
        )


def _attention(cfg: Run) -> Iterator[str]:
    attention: str = cfg.model.attention
    if attention.startswith("flash") and cfg.model.dtype == "float32":
        yield f"model.attention={attention} has no float32: set model.dtype=bfloat16"


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


def _no_training(cfg: Run) -> Iterator[str]:
    if not cfg.trains:
        for name in ("save_every", "keep_checkpoints", "device_memory"):
            if getattr(cfg.hardware, name) is not None:
                yield f"hardware.{name} is for stages that train; set it to null"
        for name in ("gradient_checkpointing", "compile"):
            if getattr(cfg.hardware, name) is not False:
                yield f"hardware.{name} is for stages that train; set it to false"
        if cfg.hardware.shard != "none":
            yield "hardware.shard is for stages that train; set it to none"


def _shards(cfg: Run) -> Iterator[str]:
    quantize = getattr(cfg.model, "quantize", None)
    if quantize is not None and cfg.hardware.shard != "none":
        yield (
            f"model.quantize={quantize} holds weights that cannot be cut: set hardware.shard=none, "
            "or model.quantize=null"
        )


def _resume_points(cfg: Run) -> Iterator[str]:
    if not cfg.trains:
        return
    every, keep = cfg.hardware.save_every, cfg.hardware.keep_checkpoints
    if every is not None and not re.fullmatch(r"0*[1-9]\d*(min)?", every):
        yield f"hardware.save_every takes steps, as 25, or minutes, as 10min; got {every}"
    if keep is None:
        yield "hardware.keep_checkpoints=null is for stages that do not train; give 1 or more"


def _processes(cfg: Run) -> Iterator[str]:
    if cfg.hardware.max_restarts and cfg.hardware.processes == 1:
        yield (
            f"hardware.max_restarts={cfg.hardware.max_restarts} is for processes that this command "
            "starts: give hardware.processes, or set it to 0 (torchrun has --max-restarts)"
        )


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
    if cfg.algo.soft_labels and cfg.algo.label_smoothing:
        yield (
            f"algo.label_smoothing={cfg.algo.label_smoothing:g} is one doubt for all rows, and "
            "algo.soft_labels=true takes that of each: set one of them to 0 or false"
        )
    if aggregate is not None and aggregate not in _AGGREGATES[loss]:
        yield (
            f"algo.aggregate={aggregate} does not fit algo.loss={loss}, which takes "
            f"{' or '.join(_AGGREGATES[loss])}"
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


def _enumeration(cfg: EvaluateConfig) -> Iterator[str]:
    """What the probabilities of whole responses are needed for."""
    algo = cfg.algo
    if not algo.enumerate:
        return
    asked = f"algo.enumerate={algo.enumerate}"
    for key, value in {"reference": cfg.reference, "reward": cfg.reward}.items():
        if value is None:
            yield f"{asked} needs {key}=, which is null; give one"
    if cfg.samples is not None:
        yield f"{asked} asks a policy, but samples={cfg.samples} has all; set it to 0"
    plain = {"beams": 1, "top_k": 0, "top_p": 1, "min_p": 0, "min_tokens": 0, "stop": []}
    for name, neutral in {**plain, "repetition_penalty": 1}.items():
        if getattr(algo, name) != neutral:
            yield f"{asked} is of plain sampling: set algo.{name} to {neutral}"
    if algo.temperature == 0:
        yield f"{asked} is of plain sampling: set algo.temperature above 0"


def _evaluation(cfg: Run) -> Iterator[str]:
    """What samples that are there already cannot tell."""
    if not isinstance(cfg, EvaluateConfig):
        return
    if cfg.best_of is not None and cfg.reward is None:
        yield f"best_of={cfg.best_of} is chosen by reward=, which is null; give one"
    if cfg.best_of is not None and (cfg.algo.temperature == 0 or cfg.algo.beams > 1):
        how = "algo.temperature=0" if cfg.algo.temperature == 0 else f"algo.beams={cfg.algo.beams}"
        yield f"best_of={cfg.best_of} is for sampling, but {how} does not"
    yield from _enumeration(cfg)
    if cfg.samples is None:
        return
    asked = {"prompted": cfg.prompted, "choices": cfg.choices, "best_of": cfg.best_of}
    for key, value in asked.items():
        if value is not None:
            yield f"{key}={value} asks a policy, but samples={cfg.samples} has all; set it to null"
    if cfg.algo.temperatures:
        yield f"algo.temperatures samples, but samples={cfg.samples} has all; set it to []"
    if cfg.baselines:
        yield f"baselines are sampled from, but samples={cfg.samples} has all; set them to []"
    yield from _unsampled(cfg)


SAMPLING = (
    *("prompts", "samples", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("beams", "min_tokens", "stop"),
)


def _unsampled(cfg: EvaluateConfig | LabelConfig) -> Iterator[str]:
    """Keys of sampling that have been set, though samples=FILE has all responses; null, which is
    all prompts, is what it is read by.
    """
    start = catalog.stage_values(stage_name(cfg), {}, catalog.config_dirs())
    for name in SAMPLING:
        value, before = getattr(cfg.algo, name), start[f"algo.{name}"]
        if value is not None and (value if isinstance(value, list) else written(value)) != before:
            yield (
                f"algo.{name}={written(value)} is of sampling, but samples={cfg.samples} has all "
                f"responses; leave it at {before}"
            )


def _labelling(cfg: Run) -> Iterator[str]:
    """Who labels what."""
    if not isinstance(cfg, LabelConfig):
        return
    named = cfg.annotators
    if not named or len(set(named)) < len(named):
        yield f"annotators={named}: name each once, and at least one"
    if wrong := [
        name for name in named if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,39}", name)
    ]:
        yield f"annotators: {wrong[0]!r} names a file: up to 40 letters, digits, _, . and -"
    if cfg.who is not None and cfg.who not in named:
        yield f"who={cfg.who} is none of annotators={named}"
    if cfg.data.path == "-":
        yield "data.path=-: what labels are typed into cannot hold the rows; give a file"
    if cfg.hardware.processes not in (1, AUTO):
        yield f"hardware.processes={cfg.hardware.processes}: one process labels; set it to 1"
    if cfg.policy is None and (cfg.samples is None or cfg.reward is not None or cfg.scorers):
        yield (
            "policy=null needs samples=FILE, reward=null and scorers=[]: rewards are given a "
            "policy's tokens"
        )
    if cfg.samples is not None and cfg.baselines:
        yield f"baselines are sampled from, but samples={cfg.samples} has all; set them to []"
    if cfg.samples is not None:
        yield from _unsampled(cfg)
    if cfg.source == "reward" and cfg.reward is None and cfg.samples is None:
        yield "source=reward needs reward=..., or samples=FILE with rewards in it"
    if cfg.port and cfg.source != "page" and not cfg.review:
        yield f"port={cfg.port} is that of a page: source=page and review=true show one, or set 0"
    yield from _protocol(cfg)


def _protocol(cfg: LabelConfig) -> Iterator[str]:
    """Who can be asked what."""
    protocol = cfg.algo.protocol
    if protocol == "instructgpt" and cfg.source in ("reward", "judge"):
        yield f"algo.protocol=instructgpt asks for ratings and marks: source={cfg.source} has none"
    if protocol == "steps" and cfg.source == "reward" and cfg.reward is None:
        yield "algo.protocol=steps source=reward needs reward=... that judges steps"
    if protocol == "steps" and cfg.flip:
        yield "flip turns an answer round, but algo.protocol=steps has none to turn; set it to 0"


def _selection(cfg: Run) -> Iterator[str]:
    if not isinstance(cfg, SftConfig):
        return
    if cfg.select_by == "reward" and cfg.algo.keep != "best":
        yield f"select_by=reward chooses the best weights, but algo.keep={cfg.algo.keep}"


_RULES: tuple[Callable[[Run], Iterator[str]], ...] = (
    online,
    _scratch_model,
    _lora,
    _attention,
    _plain_text,
    _distillation,
    _picks,
    _no_training,
    _resume_points,
    _shards,
    _processes,
    _decoding,
    rollouts,
    _reward_model,
    _preferences,
    _selection,
    _evaluation,
    _labelling,
    judges,
    selection,
    data_rules,
)
