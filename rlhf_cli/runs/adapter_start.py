"""What becomes of an adapter that a stage starts from: checked, said, recorded, without torch."""

from importlib.util import find_spec
from typing import Any

import yaml

from rlhf_cli.config import catalog
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.models import Model
from rlhf_cli.config.schema.stages import Run
from rlhf_cli.config.stages import stage_name
from rlhf_cli.folders.adapter_use import (
    CONTINUE,
    MERGE,
    STACK,
    config_of,
    kind_of,
    settings_of,
    use_of,
)
from rlhf_cli.folders.manifest import adapter_base


def check_adapter_use(cfg: Run) -> None:
    """model.adapter fits the policy, and settings of a fresh adapter none that goes on.

    Raises:
        UserError: the policy is no adapter, or its adapter has other settings than were given.
    """
    model: Any = cfg.model
    if not isinstance(model, Model):
        return
    if model.quantize is not None and find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantize={model.quantize} needs bitsandbytes: pip install 'rlhf-cli[qlora]'"
        )
    start = cfg.start
    if start is None or adapter_base(start) is None:
        if model.adapter is not None:
            raise UserError(
                f"model.adapter={model.adapter} is for a policy that is an adapter folder, and "
                f"{start or 'a model from scratch'} is none; leave it out"
            )
        return
    use = use_of(start, model)
    if use == MERGE and model.quantize is not None:
        raise UserError(
            f"model.quantize={model.quantize} cannot merge the adapter of {start} into a base of "
            "few bits; merge it first, or model.adapter=continue or stack"
        )
    if use != MERGE and (kind := kind_of(start)) != "LORA":
        raise UserError(
            f"{start} is an adapter of the kind {kind}, and only LoRA is trained on or stacked on; "
            "model.adapter=merge merges it into its base first"
        )
    if use == CONTINUE:
        _check_settings(cfg, start)


def _check_settings(cfg: Any, path: str) -> None:
    """An adapter that goes on keeps its own settings; what a stage starts with says nothing."""
    own = settings_of(path)
    options = catalog.shipped_options(stage_name(cfg), "model").values()
    for name, theirs in own.items():
        given = getattr(cfg.model, name)
        usual = any(_same(_read(values[f"model.{name}"]), given) for values in options)
        if not usual and not _same(theirs, given):
            shown = f"[{','.join(map(str, given))}]" if isinstance(given, list) else given
            raise UserError(
                f"{path}: its adapter goes on as it is, with {_said(own)}, and not with "
                f"model.{name}={shown}; leave that out, or train a fresh one by model.adapter="
                + ("merge" if own["use_dora"] or own["modules_to_save"] else "stack")
            )


def _read(value: Any) -> Any:
    """A value of an option, which is as it was written there, as a config holds it."""
    return yaml.safe_load(value) if isinstance(value, str) else value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return set(one) == set(other)
    return bool(one == other)


def _said(own: dict[str, Any]) -> str:
    targets = own["lora_targets"]
    where = ", ".join(sorted(targets)) if isinstance(targets, list) else targets
    kinds = [name for name in ("use_rslora", "use_dora") if own[name]]
    parts = [f"rank {own['lora_rank']}, alpha {own['lora_alpha']}", *kinds]
    parts += [f"on {where}"] if where else []
    parts += [f"{', '.join(own['modules_to_save'])} whole"] if own["modules_to_save"] else []
    return ", ".join(parts)


def adapter_lines(cfg: Run) -> list[str]:
    """What is made of the adapter that a stage starts from."""
    model: Any = cfg.model
    start = cfg.start
    if start is None or not isinstance(model, Model) or (use := use_of(start, model)) is None:
        return []
    own = settings_of(start)
    done = {
        CONTINUE: f"goes on, with its own {_said(own)}",
        STACK: f"stays as it is under a fresh one of rank {model.lora_rank}; both are written as "
        "their sum",
        MERGE: "is merged into its base",
    }[use]
    lines = [f"{start}: its adapter {done}"]
    if (dropout := config_of(start).get("lora_dropout")) and use == CONTINUE:
        kept = getattr(model, "lora_dropout", 0.0)
        lines[0] += f"; its dropout of {dropout:g} is {f'{kept:g} here' if kept else 'off'}"
    return lines


def adapter_entry(cfg: Run) -> dict[str, Any]:
    """The entry of stage.json on adapters: how training started, and over which base."""
    model: Any = cfg.model
    use = None if cfg.start is None else use_of(cfg.start, model)
    if use is None and not model.lora_rank:
        return {}
    entry = {"start": use or "fresh", "trained": bool(model.lora_rank)}
    return {"adapter": entry | ({"quantize": model.quantize} if model.quantize else {})}
