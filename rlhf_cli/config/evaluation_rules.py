"""Rules between the keys of evaluate, and of responses that are there already."""

from collections.abc import Iterator

from rlhf_cli.config import catalog
from rlhf_cli.config.schema.stages import EvaluateConfig, LabelConfig, Run
from rlhf_cli.config.stages import stage_name
from rlhf_cli.config.switches import written

SAMPLING = (
    *("prompts", "samples", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("beams", "min_tokens", "stop"),
)


def evaluation_rules(cfg: Run) -> Iterator[str]:
    """What best_of and algo.enumerate need, and what samples that are there already cannot tell."""
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
    yield from unsampled(cfg)


def unsampled(cfg: EvaluateConfig | LabelConfig) -> Iterator[str]:
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
