"""How much memory a run will take, told without torch from the sizes in the model folders.

    peak = weights of every role + masters + gradients + AdamW's moments + copies
           + the larger of update (activations, logits) and rollout (keys, values)

Numbers are float32, 4 bytes each; where model.dtype is bfloat16, weights, activations, keys and
values have 2, and what is trained has a float32 master (models/masters.py). A model's numbers are
those in its safetensors headers; shapes of activations follow from config.json. What the
interpreter and its libraries take comes on top.

Of several ranks it is what each of them takes: its share of the sequences and, where weights are
sharded (models/sharding.py), its part of the weights, gradients and moments, and what it gathers
for a pass; a scalar head stays whole. What is trained, or written with an adapter merged into it,
is then held in float32 alone.
"""

from typing import Any

from rlhf_cli.config.schema.hardware import VLLM
from rlhf_cli.config.schema.keys import AUTO
from rlhf_cli.config.schema.models import EAGER
from rlhf_cli.config.schema.stages import Run
from rlhf_cli.config.stages import DEMO_SIZE
from rlhf_cli.folders.manifest import Shapes
from rlhf_cli.runs.adapter_sizes import goes_without_experts
from rlhf_cli.runs.attention import predicted_attention
from rlhf_cli.runs.model_sizes import BYTES, Unknown, count, start_of
from rlhf_cli.runs.pass_sizes import (
    Parts,
    activations,
    adapted_experts,
    attention_matrices,
    gathered,
    of_the_head,
)
from rlhf_cli.runs.role_sizes import roles_of
from rlhf_cli.runs.sharing import Ranks, expects_gpu, ranks_of
from rlhf_cli.runs.update_sizes import longest_sequence, responses_of, rows_of_update

# Beside tensors, as measured: what a stage has imported, and what is held of each row.
LIBRARIES, ROW = 460 * 2**20, 200
USABLE = 0.9  # of a device's memory: estimates are not exact, and allocators leave gaps


def predicted_memory(
    cfg: Run,
    rows: int,
    attention: str | None = None,
    width: int | None = None,
    ranks: Ranks | None = None,
) -> list[str]:
    """What a stage that trains will hold, a line for each part and one for the peak.

    Args:
        attention: how its model computes that, where it is loaded.
        width: bytes of a number in its products, where that is known.
        ranks: that share the run; None for those of this process.
    """
    if not cfg.trains:
        return []
    ranks = ranks_of(cfg) if ranks is None else ranks
    try:
        always, update, rollout = parts_of(cfg, attention, width, ranks)
    except Unknown as why:
        return [f"predicted peak memory: unknown {why}"]
    transient = max((update, rollout), key=lambda parts: sum(parts.values()))
    peak = sum(always.values()) + sum(transient.values())
    when = "rollout" if transient is rollout else "update"
    lines = [
        f"memory, {name}: {in_bytes(size)}" for name, size in (always | update | rollout).items()
    ]
    beside = LIBRARIES + ROW * rows
    each = " of each rank" if ranks.size > 1 else ""
    return [
        *lines,
        f"with Python, its libraries and about {rows:,} rows: {in_bytes(peak + beside)} on a CPU",
        f"predicted peak memory{each}: {in_bytes(peak)}, in the {when}",
    ]


def predicted_peak(
    cfg: Run,
    attention: str | None = None,
    width: int | None = None,
    ranks: Ranks | None = None,
    shard: str | None = None,
) -> float:
    """The bytes at the peak, of the parts and with the arguments of `parts_of`.

    Raises:
        Unknown: as of it.
    """
    always, update, rollout = parts_of(cfg, attention, width, ranks, shard)
    return sum(always.values()) + max(sum(update.values()), sum(rollout.values()))


def in_bytes(size: float) -> str:
    """Bytes as a reader takes them in."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def parts_of(
    cfg: Any,
    attention: str | None = None,
    width: int | None = None,
    ranks: Ranks | None = None,
    shard: str | None = None,
) -> tuple[Parts, Parts, Parts]:
    """Bytes of a rank by part: held all the time, in an update, in a rollout.

    Args:
        attention, width, ranks: as of `predicted_memory`.
        shard: in place of hardware.shard.

    Raises:
        Unknown: a model is not on this machine, or its config is silent.
    """
    ranks = ranks_of(cfg) if ranks is None else ranks
    parts = ranks.parts(cfg.hardware.shard if shard is None else shard)
    shapes, geometry = start_of(cfg)
    width = width_of(cfg, shapes) if width is None else width
    always, trained = held_always(cfg, shapes, width, parts)
    algo, longest = cfg.algo, longest_sequence(cfg)
    rows = rows_of_update(cfg, ranks)
    tokens = min(cfg.hardware.tokens_at_once, rows * longest)
    several = tokens < rows * longest
    graphs = 2 if "critic" in trained and algo.critic == "separate" else 1
    update: Parts = {
        f"activations of {tokens} tokens": graphs * activations(cfg, geometry, tokens, width),
    }
    if (attention or predicted_attention(cfg)) == EAGER:
        update[f"attention between {tokens} tokens and up to {longest} each"] = (
            graphs * attention_matrices(cfg, geometry, tokens, longest, width)
        )
    fused = cfg.model.lora_rank and not goes_without_experts(cfg.model)
    if fused and (size := adapted_experts(cfg, shapes, geometry.layers)):
        update["experts together with their adapters"] = graphs * size * width / BYTES
    chunk = min(cfg.hardware.logits_at_once, tokens)
    update |= of_the_head(cfg, geometry, chunk, several, width)
    rollout: Parts = {}
    if parts > 1:
        update |= gathered(cfg, shapes, width, graphs)
    if cfg.samples_online and cfg.hardware.rollout != VLLM:
        if parts > 1:
            rollout["weights that are gathered to sample"] = width * count(shapes)
        responses = ranks.share(responses_of(cfg))
        cached = min(cfg.hardware.sampled_at_once, responses * longest)
        # a layer's cache is copied when it grows by a column
        rollout[f"keys and values of {cached} sampled tokens"] = (
            2 * width * cached * geometry.keys * (geometry.layers + 1)
        )
    return always, update, rollout


def held_always(
    cfg: Any, shapes: Shapes, width: int, parts: int = 1
) -> tuple[Parts, dict[str, int]]:
    """Bytes by part that are held all the time, and how many numbers of each role are trained.

    Args:
        parts: that weights are cut into, of which a rank holds one.
    """
    weights, trained = roles_of(cfg, shapes, width, parts)
    whole = whole_of(cfg, weights) if parts > 1 else weights
    cut = {role for role in trained if role not in whole}
    beside = not cfg.model.lora_rank or cfg.model.merge_lora  # frozen weights are written, too
    held: Parts = {}
    for role, numbers in weights.items():
        stays, exact = whole.get(role, 0), 0
        if role in cut:
            exact = numbers if beside else trained[role]
        size = BYTES * exact + width * (numbers - stays - exact)
        held[f"weights of the {role}"] = size / parts + width * stays
    here = {role: numbers / (parts if role in cut else 1) for role, numbers in trained.items()}
    if width < BYTES and (masters := sum(here[role] for role in here if role not in cut)):
        held["float32 masters of what is trained"] = BYTES * masters
    held["gradients"] = BYTES * sum(here.values())
    held["AdamW's moments"] = 2 * BYTES * sum(here.values())
    own = next(iter(here.values()))
    if getattr(cfg.algo, "ema_decay", None) is not None:
        held["average of the weights"] = BYTES * own
    if getattr(cfg.algo, "keep", "last") != "last":
        held["best weights so far"] = BYTES * own
    return held, trained


def whole_of(cfg: Any, weights: dict[str, int]) -> dict[str, int]:
    """The numbers of each role that every rank holds where weights are sharded: a value head.

    Args:
        weights: from `roles_of`.
    """
    shared = getattr(cfg.algo, "critic", None) == "shared"
    return {"critic": weights["critic"]} if shared and "critic" in weights else {}


def width_of(cfg: Any, shapes: Shapes) -> int:
    """Bytes of a number in the products of a run, as far as can be told without torch."""
    given = cfg.model.dtype
    if given != AUTO:
        return 2 if given == "bfloat16" else BYTES
    if cfg.start is None or count(shapes) <= DEMO_SIZE:
        return BYTES
    return 2 if expects_gpu(cfg) else BYTES
