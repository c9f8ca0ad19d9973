"""A fresh LoRA adapter: the layers that model.lora_targets names, and the rest of its config."""

import re
from collections.abc import Sequence
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.models import Model
from rlhf_cli.data.time_limit import time_limit
from rlhf_cli.folders.adapter_use import STACK
from rlhf_cli.models.heads import head_name
from rlhf_cli.models.lora_places import (
    LoraPlaces,
    in_short,
    lora_places,
    peft_targets,
    without_parameters,
)
from rlhf_cli.models.towers import under
from rlhf_cli.reporting.console import say

ALL = "all-linear"


def fresh_config(model: Any, config: Model, task: str) -> Any:
    """peft's config of a fresh adapter; says which layers it adapts and which it leaves out.

    Args:
        model: without adapters.

    Raises:
        UserError: a name or expression fits no layer.
    """
    import peft

    head = None if task == "CAUSAL_LM" else head_name(model)
    names = [name for name, _ in model.named_modules()]
    for name in config.modules_to_save:
        if not any(_fits(name, module) for module in names):
            raise UserError(f"model.modules_to_save: no module is called {name}")
    places = _of_text(lora_places(model), getattr(model, "towers", []))
    chosen = targeted(model, config.lora_targets, places)
    dropout = getattr(config, "lora_dropout", 0.0)  # of sft alone
    if dropout or config.use_dora or config.adapter == STACK or config.quantize:
        chosen = without_parameters(model, chosen)
    say(adapted_line(config, chosen, places))
    settings: dict[str, Any] = {
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": dropout,
        **peft_targets(model, chosen),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "modules_to_save": [*config.modules_to_save, *([head] if head else [])] or None,
        # else the two copies of one weight would be trained apart
        "ensure_weight_tying": bool(config.modules_to_save) and is_tied(model),
        "task_type": task,
    }
    return peft.LoraConfig(**settings)


def _of_text(places: LoraPlaces, towers: list[str]) -> LoraPlaces:
    """The places outside of towers, which stay as they are."""
    kinds = (places.linear, places.experts, places.left_out, places.past)
    return LoraPlaces(*(tuple(name for name in kind if not under(name, towers)) for kind in kinds))


def is_tied(model: Any) -> bool:
    """Whether unembedding and embedding are one weight."""
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def targeted(model: Any, said: Any, places: LoraPlaces) -> LoraPlaces:
    """Those of a model's places that model.lora_targets means; embeddings and head by name alone.

    Raises:
        UserError: a name or an expression fits none.
    """
    if said == ALL:
        return places
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    known = [*places.linear, *places.experts, *places.left_out]
    known += [name for name, each in model.named_modules() if any(each is end for end in ends)]
    if isinstance(said, str) and re.fullmatch(r"[\w.]+", said):
        said = [said]
    if isinstance(said, list):
        for name in said:
            if not any(_fits(name, each) for each in known):
                raise UserError(
                    f"model.lora_targets: no layer is called {name}; there are "
                    f"{', '.join(_last_parts(known))}"
                )
        found = [each for each in known if any(_fits(name, each) for name in said)]
    else:
        found = _matching(said, known)
    return LoraPlaces(
        tuple(each for each in found if each not in places.experts),
        tuple(each for each in found if each in places.experts),
        (),
    )


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that a regular expression matches whole."""
    try:
        with time_limit():
            found = [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise UserError(f"model.lora_targets={pattern}: no regular expression: {error}") from None
    except TimeoutError as error:
        raise UserError(f"model.lora_targets={pattern}: {error}") from None
    if not found:
        raise UserError(
            f"model.lora_targets={pattern} matches the whole name of no layer; one is {names[0]}"
        )
    return found


def _fits(name: str, module: str) -> bool:
    """Whether a name stands for a module, by peft's rule: its whole name, or the end of it."""
    return f".{module}".endswith(f".{name}")


def _last_parts(names: Sequence[str]) -> list[str]:
    """The last parts of names, each once, in the order in which they come first."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def adapted_line(config: Model, chosen: LoraPlaces, places: LoraPlaces) -> str:
    """How many layers an adapter changes, which they are, and which it leaves as they are."""
    kinds = ["DoRA"] * config.use_dora + ["rsLoRA"] * config.use_rslora or ["LoRA"]
    targets = [*chosen.linear, *chosen.experts]
    line = f"adapter: {' and '.join(kinds)} of rank {config.lora_rank} on {len(targets)} layers: "
    line += ", ".join(_last_parts(targets))
    if config.modules_to_save:
        line += f"; trained whole: {', '.join(config.modules_to_save)}"
    rest = [name for name in (*places.linear, *places.experts) if name not in set(targets)]
    if rest := in_short([*rest, *places.left_out]):
        line += f"; left out, beside the head: {', '.join(rest)}"
    if places.past:
        ends = ", ".join(_last_parts(places.past))
        line += f" (of {ends} the model or its kernels read the weights past any adapter)"
    return line
