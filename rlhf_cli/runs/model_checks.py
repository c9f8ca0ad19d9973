"""Checks of the models that a run names: folders of the right kind, whole, of one vocabulary."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.stages import EvaluateConfig, RewardConfig, Run
from rlhf_cli.config.stages import STAGES, makers_of
from rlhf_cli.data.hub import NAME as HUB_ID
from rlhf_cli.data.parse import SUFFIXES
from rlhf_cli.folders.geometry import blocks_of
from rlhf_cli.folders.integrity import check_whole
from rlhf_cli.folders.manifest import (
    ADAPTER_CONFIG,
    LEVELS,
    RESPONSE,
    check_level,
    implicit_reward_of,
    kind_of,
    read_config,
    read_manifest,
    reference_folder,
    scalar_heads,
    shapes_of,
    tokenizer_hash,
)
from rlhf_cli.rewards.rules import RULE_NAMES, rule_of
from rlhf_cli.rewards.specs import (
    function_of,
    judges_steps,
    models_of,
    refreshed_model,
    signature_of,
    terms_of,
)
from rlhf_cli.runs.out_files import is_claimed
from rlhf_cli.runs.provenance import baselines_of, named_models

READERS = ("judge", "reviser")  # of text: their tokens may be others than the policy's
A_REWARD = "a reward output, a dpo output with a reference, a rule, or file.py:function"


def check_models(cfg: Run) -> None:
    """Every model folder exists and is of the kind that its role needs; policies share one
    vocabulary, rewards need not.
    """
    a_policy = f"an {either(makers_of('policy'))} output"
    for key, role, value in named_models(cfg):
        if role == "reward":
            check_reward(key, value)
        elif isinstance(cfg, RewardConfig) and kind_of(Path(value)) == "reward":
            check_folder(key, value, "reward", A_REWARD)
            check_level(value, LEVELS.get(cfg.algo.loss, RESPONSE))
        else:
            check_folder(
                key, value, role, "a pretrained model" if key == "model.path" else a_policy
            )
            if cfg.start is not None and value != cfg.start and key not in READERS:
                check_tokenizers(key, value, cfg.start)
    if cfg.samples_online:
        check_supervision(cfg)
    if cfg.trains and (judge := getattr(cfg, "judge", None)) is not None:
        check_judge(cfg, judge)
    cache = getattr(cfg, "reference_cache", None)
    if Path(cache or ".").is_file():
        raise UserError(f"reference_cache={cache} is a file; name a folder, or null")
    if isinstance(cfg, EvaluateConfig) and cfg.reward is None and cfg.gold is None:
        raise UserError("evaluate needs reward=... or gold=... to judge by")
    if (anchor := getattr(cfg, "anchor", None)) is not None:
        check_anchor(cfg, anchor)


def check_anchor(cfg: Any, anchor: str) -> None:
    """The policy whose rating is 0 is one of those that are rated."""
    if cfg.samples is not None:
        return  # their names stand in the file
    rated = [str(Path(path)) for path in [cfg.policy, *baselines_of(cfg)]]
    if str(Path(anchor)) not in rated:
        raise UserError(f"anchor={anchor} is none of the policies: {', '.join(rated)}")


def either(names: Sequence[str]) -> str:
    """sft, ppo or dpo."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def check_judge(cfg: Any, judge: str) -> None:
    """What labels pairs for a reward model to learn from is not that model."""
    learner = Path(refreshed_model(cfg.reward))
    if os.path.realpath(learner) in map(os.path.realpath, models_of(judge)):
        raise UserError(f"judge={judge} would teach {learner} what it says already")


def check_reward(role: str, reward: str) -> None:
    """Every term of a reward is a sound rule, a function there is, or a folder of its kind."""
    for term in terms_of(reward):
        if (function := function_of(term.spec)) is not None:
            signature_of(*function)
        elif rule_of(term.spec) is None:
            check_folder(role, term.spec, "reward", A_REWARD)


def check_supervision(cfg: Any) -> None:
    """Where steps are rewarded, a term judges steps."""
    if cfg.algo.supervision == "process":
        check_judges_steps(cfg.reward, "algo.supervision=process")


def check_judges_steps(reward: str, why: str) -> None:
    if not any(term.weight and judges_steps(term.spec) for term in terms_of(reward)):
        raise UserError(
            f"{why} needs a reward of steps, but no term of reward={reward} judges them: a reward "
            "model of steps does, and a function that names steps"
        )


def check_folder(role: str, path: str, kind: str, meant: str) -> None:
    """A local folder of the right kind with whole weights; a hub id passes."""
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{role}={path} is a file; {role} needs a folder ({meant})")
        if is_hub_id(path):
            return
        if role == "model.path":
            raise UserError(f"{role}={path} does not exist; give a folder or hub id of a model")
        made = f"run `rlhf-cli {makers_of(kind)[0]} out={path}`"
        if match := re.fullmatch(r"runs/([^/]+)/(\w+)", path):
            name = "" if match[1] == "demo" else f" name={match[1]}"
            if match[2] in STAGES:
                made = f"run `rlhf-cli {match[2]}{name}` first"
        rules = f"; rules are {', '.join(RULE_NAMES)}" if kind == "reward" else ""
        raise UserError(f"{role}={path} does not exist: {made}, or give {role}={meant}{rules}")
    manifest = read_manifest(folder)
    configs = ("config.json", "adapter_config.json")
    foreign = any((folder / name).is_file() for name in configs) and not is_claimed(folder)
    if manifest is None and not foreign:
        if inside := sorted(file.parent for file in folder.glob(f"*/{ADAPTER_CONFIG}")):
            raise UserError(
                f"{role}={path} holds adapters in folders of their own; name one: "
                f"{', '.join(map(str, inside))}"
            )
        begun = is_claimed(folder)
        way = "the command that began it goes on" if begun else "run the stage that makes it"
        raise UserError(f"{role}={path} holds no finished model; {way}")
    actual = kind_of(folder)
    if kind == "reward" and (implicit := implicit_reward_of(path)) is not None:
        reference_folder(path, implicit)
        actual = kind  # beta log(policy / reference) is a reward
    if kind == "reward" and scalar_heads(shapes_of(folder)):
        actual = kind  # a language model that has a value head, too
    if actual != kind:
        article = "reward model" if actual == "reward" else actual
        raise UserError(f"{role}={path} is a {article}; {role} needs {meant}")
    check_whole(folder)


def is_hub_id(value: str) -> bool:
    """owner/name, with no sign of being meant as a local path."""
    name = value.split(":")[0]
    local = name.startswith((".", "/", "~", "runs/")) or Path(name).suffix in SUFFIXES
    return not local and HUB_ID.fullmatch(name) is not None and not Path(name).parent.exists()


def check_tokenizers(role: str, path: str, policy: str) -> None:
    """Two local folders have the same vocabulary; hub ids are checked once loaded."""
    hashes = [tokenizer_hash(Path(place)) for place in (path, policy) if Path(place).is_dir()]
    if len(hashes) == 2 and None not in hashes and hashes[0] != hashes[1]:
        raise UserError(
            f"{role}={path} has another tokenizer than policy={policy}; train both from one model"
        )


def check_frozen_layers(cfg: Run) -> None:
    """The model has the blocks that stay as they are; one of the hub is checked once loaded."""
    frozen, path = getattr(cfg.model, "frozen_layers", 0), cfg.start
    if not frozen or path is None or not (config := read_config(Path(path))):
        return
    blocks = blocks_of(config)
    if blocks is not None and frozen > blocks:
        raise UserError(f"model.frozen_layers={frozen}, but {path} has {blocks} blocks")
