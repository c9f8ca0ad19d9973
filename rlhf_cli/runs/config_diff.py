"""How the settings of a run differ from those of the run before it in the same folder."""

from typing import Any

from rlhf_cli.config.hints import RENAMED
from rlhf_cli.config.schema.stages import Run
from rlhf_cli.config.switches import written

# hardware, a cache, the pace and limit of a judge, who hears of metrics and the folder's own path
# change no result; overwrite is an order, not a setting
IGNORED_KEYS = (
    *("who", "port", "review", "accept_partial"),  # of label: who sits there now, is that all
    *("hardware", "out", "overwrite", "reference_cache", "responses_cache"),
    *("judge_concurrency", "judge_timeout", "judge_max_cost", "tracker"),
    *("reviser_concurrency", "reviser_timeout"),
)
SHOWN_ONLY = ("algo.show_every",)
EVALUATIONS = ("algo.eval_every", "algo.eval_prompts")


def free_keys(cfg: Run, complete: bool) -> dict[str, bool]:
    """Keys that may differ from those of the run before; True where by growing only.

    Logging always may; evaluations where they choose neither weights nor the end; and an unfinished
    run may be given more steps, and keep other policies on its way.
    """
    algo = cfg.algo
    free = dict.fromkeys(SHOWN_ONLY, False)
    chooses = getattr(algo, "keep", "last") != "last"
    if not chooses and "overoptimised" not in getattr(algo, "stop_on", []):
        free |= dict.fromkeys(EVALUATIONS, False)
    if not complete:
        length = ("algo.steps",) if cfg.samples_online else ("algo.epochs", "algo.max_steps")
        free |= dict.fromkeys(length, True)
        free |= dict.fromkeys(("model.save_dtype", "algo.snapshot_every"), False)
    return free


def differing_keys(
    saved: dict[str, Any], given: dict[str, Any], free: dict[str, bool]
) -> list[str]:
    """`key: before -> now` of each value that differs, but for IGNORED_KEYS and free ones.

    Keys and values that have been renamed since the run before are read under their new names.

    Args:
        free: from `free_keys`.
    """
    flat_saved, flat_given = as_named_now(flatten(saved)), flatten(given)
    differing = []
    for name in sorted(flat_saved.keys() | flat_given.keys()):
        before, now = flat_saved.get(name), flat_given.get(name)
        if name.split(".")[0] in IGNORED_KEYS or before == now:
            continue
        grows = free.get(name)
        if grows is False or (grows and is_more(now, before)):
            continue
        differing.append(f"{name}: {written(before)} -> {written(now)}")
    return differing


def as_named_now(flat: dict[str, Any]) -> dict[str, Any]:
    """Keys and values by their names of now."""

    def now(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [now(key, each) for each in value]
        new = RENAMED.get(f"{key}={value}")
        return value if new is None else new.removeprefix(f"{key}=")

    return {RENAMED.get(key, key): now(key, value) for key, value in flat.items()}


def is_more(now: int | None, before: int | None) -> bool:
    """Whether a number of steps is greater; none is no limit."""
    return now is None or (before is not None and now > before)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; empty groups vanish."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
