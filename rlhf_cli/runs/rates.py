"""Learning rates for models of any size, where the config leaves them open.

A rate that suits a model of 130,000 weights ruins one of 7 billion, so `algo.lr=null` stands for a
rate by the size of the model that is trained, known from the headers of its weights. A rate that is
given, by a word or an option, is taken as it is.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.stages import Run
from rlhf_cli.config.stages import DEMO_SIZE, stage_name
from rlhf_cli.folders.manifest import adapter_base
from rlhf_cli.rewards.specs import refreshed_model
from rlhf_cli.runs.begun import config_of
from rlhf_cli.runs.model_sizes import Unknown, base_shapes, count
from rlhf_cli.runs.out_files import is_claimed

SIZES = (DEMO_SIZE, 5e8, 3e9, 15e9)
RATES = {  # up to each of SIZES, and above the last
    "sft": (5e-3, 1e-4, 5e-5, 2e-5, 1e-5),
    "reward": (2e-3, 3e-5, 2e-5, 9e-6, 5e-6),
    "dpo": (2e-4, 5e-6, 1e-6, 5e-7, 2e-7),
    "ppo": (3e-4, 3e-6, 2e-6, 1e-6, 5e-7),
    "grpo": (5e-4, 3e-6, 2e-6, 1e-6, 5e-7),
    "critic": (1e-3, 1e-5, 1e-5, 9e-6, 5e-6),
    "refresh": (5e-4, 3e-5, 2e-5, 9e-6, 5e-6),
}
LORA_TIMES = 10
IN_NAME = re.compile(r"(?:(\d+)x)?(\d+(?:\.\d+)?)([MB])(?![A-Za-z0-9])", re.IGNORECASE)


def rate_of(role: str, parameters: float, adapter: bool) -> float:
    """The peak learning rate of a stage, or of the critic or the refreshed reward model.

    Full weights are trained as published: sft 2e-5 at 7B (Alpaca, Zephyr 2310.16944) and about
    1e-5 above (InstructGPT 2203.02155), more for small models, as SmolLM's recipes have it; reward
    models and critics 9e-6 (InstructGPT, 6B), 1.5e-5 at 1.3B (2009.01325); dpo 5e-7 at 7B and 8B
    and 2e-7 at 70B (Zephyr, Tulu 3 2411.15124), 1e-6 below (2305.18290, SmolLM2); ppo and grpo
    1e-6 at 7B (2402.03300), 3e-6 for small ones (TRL). Adapters take ten times that ("LoRA without
    regret", Thinking Machines 2025; TRL). The demo's rates were tuned on it, with either.

    Args:
        role: a name in RATES.
        parameters: of the whole model, also where an adapter is all that is trained.
    """
    place = sum(parameters > size for size in SIZES)
    rate = RATES[role][place]
    return rate * LORA_TIMES if adapter and place else rate


def choose_rates(cfg: Run) -> list[str]:
    """Fill in the rates that a config leaves open; a line on each, with its reason."""
    if not cfg.trains:
        return []
    algo: Any = cfg.algo
    lines = []
    if algo.lr is None:
        lines.append(_choose(cfg, "lr", stage_name(cfg), cfg.start))
    if getattr(algo, "baseline", None) == "critic" and algo.value_lr is None:
        lines.append(_choose(cfg, "value_lr", "critic", cfg.start))
    if getattr(algo, "refresh_reward", None) is not None and algo.refresh_lr is None:
        learner = refreshed_model(cfg.reward)  # type: ignore[attr-defined]
        lines.append(_choose(cfg, "refresh_lr", "refresh", learner))
    return lines


def _choose(cfg: Any, key: str, role: str, path: str | None) -> str:
    """Fill in one rate; returns the line on it."""
    adapter = cfg.model.lora_rank > 0 and role != "refresh"
    parameters = 0.0 if path is None else size_of(path, called(cfg, path))
    if parameters is None:
        # a folder that is gone or damaged; a run that has finished without need of it stays so
        rate = _of_the_run_before(cfg, key) or rate_of(role, float("inf"), adapter)
        reason = f"{role} of a model of unknown size, taken for a large one"
    else:
        rate = rate_of(role, parameters, adapter)
        size = "from scratch" if path is None else f"of {written(parameters)} parameters"
        how = "an adapter" if adapter else "full weights"
        reason = f"{role} of a model {size}, "
        reason += (
            f"{how}; that of the demo is {RATES[role][0]:g}"
            if parameters > DEMO_SIZE
            else "as of the demo"
        )
    setattr(cfg.algo, key, rate)
    return f"algo.{key}: {rate:g} ({reason})"


def called(cfg: Run, path: str) -> str:
    """The size by which the option of a family calls a model of the hub, as 4b."""
    model: Any = cfg.model
    size = getattr(model, "size", None)
    return size if size is not None and model.sizes.get(size) == path else ""


def size_of(path: str, called: str = "") -> float | None:
    """The parameters of a local model, or those that the name of one on the hub tells.

    Args:
        called: its size, where the name may not tell.
    """
    with suppress(Unknown, UserError):
        return count(base_shapes(path))
    with suppress(UserError):
        name = adapter_base(path) or path
        if Path(name).exists():
            return None
        for text in (name.rpartition("/")[2], called):
            if told := IN_NAME.search(text):
                times, number, unit = told.groups()
                return int(times or 1) * float(number) * {"m": 1e6, "b": 1e9}[unit.lower()]
    return None


def written(parameters: float) -> str:
    """A number of parameters as models are called by it."""
    if parameters >= 1e9:
        return f"{parameters / 1e9:.3g}B"
    return f"{parameters / 1e6:.3g}M"


def _of_the_run_before(cfg: Run, key: str) -> float | None:
    """The rate of the run that `out` is of, if it is one."""
    out = Path(cfg.out)
    with suppress(UserError, KeyError):
        rate = config_of(out)["algo"][key] if is_claimed(out) else None
        return rate if isinstance(rate, float) else None
    return None
