"""What a stage does with an adapter folder, told without torch: go on, stack, or merge."""

from pathlib import Path
from typing import Any

from rlhf_cli.config.schema.models import FrozenModel, Model
from rlhf_cli.folders.json_forms import ADAPTER
from rlhf_cli.folders.manifest import ADAPTER_CONFIG, adapter_base, read_object

CONTINUE, STACK, MERGE = "continue", "stack", "merge"


def use_of(path: str, model: FrozenModel) -> str | None:
    """What is made of the adapter of a folder; None where the folder is no adapter.

    Args:
        model: of a stage that trains nothing, every adapter is merged.
    """
    if adapter_base(path) is None:
        return None
    if not isinstance(model, Model):
        return MERGE
    return model.adapter or (CONTINUE if model.lora_rank else MERGE)


def config_of(path: str) -> dict[str, Any]:
    """The adapter_config.json of an adapter folder."""
    return read_object(Path(path) / ADAPTER_CONFIG, ADAPTER)


def kind_of(path: str) -> str:
    """What peft calls the kind of an adapter: LORA, IA3, ..."""
    return str(config_of(path).get("peft_type") or "LORA")


def settings_of(path: str) -> dict[str, Any]:
    """The settings of an adapter folder by the keys of a stage's model."""
    config = config_of(path)
    return {
        "lora_rank": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "lora_targets": config.get("target_modules"),
        "use_rslora": bool(config.get("use_rslora")),
        "use_dora": bool(config.get("use_dora")),
        "modules_to_save": config.get("modules_to_save") or [],
    }
