"""How many numbers each role of a run holds and trains: policy, reference, critic, rewards."""

from pathlib import Path
from typing import Any

from rlhf_cli.config.schema.models import Model
from rlhf_cli.config.stages import facts_of, has_reference
from rlhf_cli.folders.manifest import (
    RESPONSE,
    Shapes,
    adapter_base,
    beginnings,
    implicit_reward_of,
    level_of,
    reference_folder,
)
from rlhf_cli.rewards.specs import models_of
from rlhf_cli.runs.adapter_sizes import (
    adapter_below,
    is_switched_off,
    lora,
    saved_by_bits,
    trained_adapter,
)
from rlhf_cli.runs.model_sizes import (
    BYTES,
    adapter_shapes,
    base_shapes,
    count,
    frozen_of,
    geometry_of,
    of_text,
    trunk_of,
)
from rlhf_cli.runs.provenance import models_read


def roles_of(
    cfg: Any, shapes: Shapes, width: int = BYTES, parts: int = 1
) -> tuple[dict[str, int], dict[str, int]]:
    """Numbers that each role holds and no other does, and how many of them are trained.

    Args:
        width: bytes of a number, which those of few bits are counted in.
        parts: that weights are cut into: a model that is loaded then shares none of them.
    """
    model: Model = cfg.model
    held: dict[str, int] = {}
    trained: dict[str, int] = {}
    scores = facts_of(cfg).writes == "reward"
    role, own = ("reward model", trunk_of(shapes)) if scores else ("policy", shapes)
    adapter, frozen = trained_adapter(cfg, of_text(own)), count(frozen_of(own, model.frozen_layers))
    held[role] = count(own) - saved_by_bits(own, model, width) + adapter + adapter_below(cfg)
    trained[role] = adapter or count(own) - frozen
    if has_reference(cfg):
        held["reference"] = _reference_numbers(cfg, shapes, adapter, frozen)
    if getattr(cfg.algo, "baseline", None) == "critic":
        held["critic"], trained["critic"] = _critic_numbers(cfg, shapes, width, parts)
    if (reward := getattr(cfg, "reward", None)) is not None:
        held["reward"] = sum(_reward_numbers(cfg, path, parts) for path in models_of(reward))
    others = {"gold": getattr(cfg, "gold", None)}
    others |= {f"scorer {spec}": spec for spec in getattr(cfg, "scorers", [])}
    for name, spec in others.items():
        if spec is not None:
            held[name] = sum(count(trunk_of(base_shapes(path))) for path in models_of(spec))
    return {role: number for role, number in held.items() if number}, trained


def _reference_numbers(cfg: Any, shapes: Shapes, adapter: int, frozen: int) -> int:
    """A copy of what the policy trains; none of a fresh adapter, which is switched off."""
    if getattr(cfg.algo, "precompute_reference", False):
        return 0
    if (path := models_read(cfg).get("reference")) is not None:
        return count(base_shapes(path))
    if not adapter:
        return count(shapes) - frozen
    refreshed = getattr(cfg.algo, "refresh_reference", None) is not None
    return adapter if refreshed or not is_switched_off(cfg) else 0


def _critic_numbers(cfg: Any, shapes: Shapes, width: int, parts: int) -> tuple[int, int]:
    """What the critic holds beside the policy, and trains."""
    trunk, model = trunk_of(shapes), cfg.model
    if cfg.algo.critic == "shared":
        head = geometry_of(cfg.policy).hidden
        return head, head
    start = next(
        (
            path
            for path in models_of(cfg.reward)
            if implicit_reward_of(path) is None and level_of(path) == RESPONSE
        ),
        None,
    )
    if start is None:
        upper = count(trunk) - count(frozen_of(trunk, model.frozen_layers))
        adapter = trained_adapter(cfg, of_text(trunk)) if model.lora_rank else upper
        return adapter, adapter
    reward = trunk_of(base_shapes(start))
    if not model.lora_rank:
        frozen = count(frozen_of(reward, model.frozen_layers))
        return count(reward) - _in_common(cfg, start, parts), count(reward) - frozen
    if _on_base_of(start, cfg.policy):
        return (adapter := count(adapter_shapes(start))), adapter
    fresh = lora(of_text(reward), model)
    return count(reward) - saved_by_bits(reward, model, width) + fresh, fresh


def _reward_numbers(cfg: Any, path: str, parts: int) -> int:
    """What a reward model holds beside the policy."""
    implicit = implicit_reward_of(path)
    if implicit is not None:
        return count(base_shapes(path)) + count(base_shapes(reference_folder(path, implicit)))
    if cfg.model.lora_rank and cfg.samples_online and _on_base_of(path, cfg.policy):
        return count(adapter_shapes(path))
    return count(trunk_of(base_shapes(path))) - _in_common(cfg, path, parts)


def _in_common(cfg: Any, path: str, parts: int) -> int:
    """Numbers of the policy's frozen layers that a full reward model has, too, and shares then.

    Weights are taken for equal if they begin alike and no adapter is merged into them.
    """
    if not cfg.samples_online or parts > 1:
        return 0
    frozen = frozen_of(base_shapes(cfg.policy), cfg.model.frozen_layers)
    ours, theirs = (
        beginnings(Path(adapter_base(each) or each), frozen) for each in (cfg.policy, path)
    )
    same = {name for name in ours if ours[name] == theirs.get(name)}
    same -= _merged_into(cfg.policy) | _merged_into(path)
    return count({name: frozen[name] for name in same})


def _merged_into(path: str) -> set[str]:
    """The weights of its base that an adapter folder changes."""
    if adapter_base(path) is None:
        return set()
    layers = {name.split(".lora_")[0] for name in adapter_shapes(path) if ".lora_" in name}
    return {f"{layer.removeprefix('base_model.model.')}.weight" for layer in layers}


def _on_base_of(path: str, policy: str) -> bool:
    """Whether a folder is an adapter on the base of the policy, by its path."""
    base = adapter_base(path)
    ours = adapter_base(policy) or policy
    return base is not None and Path(base).resolve() == Path(ours).resolve()
