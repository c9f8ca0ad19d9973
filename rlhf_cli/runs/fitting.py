"""What each of several ranks does and holds, for each way to shard, and which fit a device."""

from typing import Any

from rlhf_cli.config.schema.hardware import VLLM
from rlhf_cli.runs.memory_estimate import LIBRARIES, USABLE, in_bytes, predicted_peak
from rlhf_cli.runs.model_sizes import Unknown
from rlhf_cli.runs.sharing import ALONE, Ranks, expects_gpu, gpu_memory, host_memory, ranks_of
from rlhf_cli.runs.update_sizes import (
    items_of_update,
    longest_sequence,
    responses_of,
    rows_of_update,
)

SHARDS = "none", "hybrid", "full"
MOST_RANKS = 4096  # that are tried


def sharing_lines(cfg: Any, ranks: Ranks | None = None) -> list[str]:
    """How several ranks share the work; of one process only what does not fit.

    Args:
        ranks: None for those of this run.
    """
    ranks = ranks_of(cfg) if ranks is None else ranks
    lines = work_lines(cfg, ranks) if ranks.size > 1 else []
    if not cfg.trains:
        return lines
    if ranks.size == 1 and (shard := cfg.hardware.shard) != "none":
        lines.append(f"note: hardware.shard={shard} cuts nothing: one process holds all weights")
    try:
        return lines + memory_lines(cfg, ranks)
    except Unknown:  # which the prediction of the peak tells
        return lines


def work_lines(cfg: Any, ranks: Ranks) -> list[str]:
    """Ranks x micro-batches x tokens, of an update and of sampling."""
    if not cfg.trains:
        return [f"ranks: {ranks}; prompts and what scores the responses are dealt out"]
    hardware, longest = cfg.hardware, longest_sequence(cfg)
    items, rows, own = items_of_update(cfg), rows_of_update(cfg), rows_of_update(cfg, ranks)
    tokens = min(hardware.tokens_at_once, own * longest)
    batches = -(-own * longest // hardware.tokens_at_once)
    lines = [
        f"ranks: {ranks}; an update: {rows} sequences x up to {longest:,} tokens / {ranks.size} = "
        f"{own * longest:,} tokens of each rank, in {batches} micro-batch{'es' * (batches > 1)} of "
        f"up to {tokens:,}"
    ]
    if cfg.samples_online and hardware.rollout != VLLM:
        responses = responses_of(cfg)
        lines.append(
            f"an iteration: {responses} responses / {ranks.size} = up to {ranks.share(responses)} "
            "that each rank samples"
        )
    if items < ranks.size:
        lines.append(
            f"note: an update has {items} items for {ranks.size} ranks: {ranks.size - items} of "
            "them have nothing to do; a larger batch, or fewer ranks"
        )
    return lines


def memory_lines(cfg: Any, ranks: Ranks) -> list[str]:
    """The peak of each rank for each way to shard, and which of them fit."""
    ways = [each for each in SHARDS if each == "none" or can_be(cfg, each, ranks)]
    peaks = {each: predicted_peak(cfg, ranks=ranks, shard=each) for each in ways}
    lines = []
    if ranks.size > 1:
        told = ", ".join(f"{each} {in_bytes(peak)}" for each, peak in peaks.items())
        lines.append(f"memory of each rank at its peak, by hardware.shard: {told}")
    room, what = device_of(cfg)
    if room is None:
        return lines
    fitting = [each for each, peak in peaks.items() if fits(cfg, peak, room, ranks)]
    if ranks.size == 1:
        peak = in_bytes(peaks["none"])
        return [] if fitting else [f"note: a peak of {peak} does not fit {what}{wider(cfg, room)}"]
    if fitting:
        return [*lines, f"of {what} these fit: {', '.join(fitting)}"]
    return [*lines, f"of {what} none fits{wider(cfg, room, ranks)}"]


def can_be(cfg: Any, shard: str, ranks: Ranks) -> bool:
    """Whether a way to shard is another than those before it, and possible."""
    if cfg.model.quantize is not None or ranks.size == 1:
        return False
    return shard == "full" or ranks.size > ranks.local


def device_of(cfg: Any) -> tuple[float | None, str]:
    """The bytes of a device, and its name for messages; None where nothing says them."""
    if (given := cfg.hardware.device_memory) is not None:
        return given * 2**30, f"the {given:g} GiB of hardware.device_memory"
    if expects_gpu(cfg):
        found = gpu_memory()
        return found, "" if found is None else f"the {in_bytes(found)} of the GPU"
    found = host_memory()
    return found, "" if found is None else f"the {in_bytes(found)} that are free on this machine"


def fits(cfg: Any, peak: float, room: float, ranks: Ranks) -> bool:
    """Whether ranks of this peak fit a device: each its own GPU, or all of a machine its memory."""
    if expects_gpu(cfg) or cfg.hardware.device_memory is not None:
        return peak <= USABLE * room
    return ranks.local * (peak + LIBRARIES) <= room


def wider(cfg: Any, room: float, ranks: Ranks = ALONE) -> str:
    """The least number of GPUs, doubled step by step, over which the weights would fit."""
    if not expects_gpu(cfg) and cfg.hardware.device_memory is None:
        return ""
    size = ranks.size
    while cfg.model.quantize is None and (size := size * 2) <= MOST_RANKS:
        more = Ranks(size, ranks.local)
        if fits(cfg, predicted_peak(cfg, ranks=more, shard="full"), room, more):
            return f"; sharded over {size} (hardware=fsdp) it would"
    return "; docs/hardware.md#memory has what makes it smaller"
