"""Rules between the keys of `hardware`, and between them and those of a stage."""

import re
from collections.abc import Iterator

from rlhf_cli.config.schema.stages import Run


def hardware_rules(cfg: Run) -> Iterator[str]:
    """What is wrong with the hardware of a run."""
    yield from _no_training(cfg)
    yield from _resume_points(cfg)
    yield from _shards(cfg)
    yield from _processes(cfg)


def _no_training(cfg: Run) -> Iterator[str]:
    if cfg.trains:
        return
    for name in ("save_every", "keep_checkpoints", "device_memory"):
        if getattr(cfg.hardware, name) is not None:
            yield f"hardware.{name} is for stages that train; set it to null"
    for name in ("gradient_checkpointing", "compile"):
        if getattr(cfg.hardware, name) is not False:
            yield f"hardware.{name} is for stages that train; set it to false"
    if cfg.hardware.shard != "none":
        yield "hardware.shard is for stages that train; set it to none"


def _resume_points(cfg: Run) -> Iterator[str]:
    if not cfg.trains:
        return
    every, keep = cfg.hardware.save_every, cfg.hardware.keep_checkpoints
    if every is not None and not re.fullmatch(r"0*[1-9]\d*(min)?", every):
        yield f"hardware.save_every takes steps, as 25, or minutes, as 10min; got {every}"
    if keep is None:
        yield "hardware.keep_checkpoints=null is for stages that do not train; give 1 or more"


def _shards(cfg: Run) -> Iterator[str]:
    quantize = getattr(cfg.model, "quantize", None)
    if quantize is not None and cfg.hardware.shard != "none":
        yield (
            f"model.quantize={quantize} holds weights that cannot be cut: set hardware.shard=none, "
            "or model.quantize=null"
        )


def _processes(cfg: Run) -> Iterator[str]:
    if cfg.hardware.max_restarts and cfg.hardware.processes == 1:
        yield (
            f"hardware.max_restarts={cfg.hardware.max_restarts} is for processes that this command "
            "starts: give hardware.processes, or set it to 0 (torchrun has --max-restarts)"
        )
