"""How many tokens a GPU takes at once, where hardware says auto: by its free memory and the sizes.

    tokens = (free memory - what is always held - keys and values - logits) / activations of one

The figures are settled once, before a model is loaded, and kept beside resume points: batches that
are cut otherwise are rounded otherwise, and a run that goes on is to end with the same bytes.
"""

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.hardware import VLLM
from rlhf_cli.config.schema.keys import AUTO
from rlhf_cli.config.schema.models import EAGER
from rlhf_cli.config.schema.stages import Run
from rlhf_cli.folders.files import write_json
from rlhf_cli.folders.json_forms import COUNT, Form
from rlhf_cli.folders.manifest import read_object
from rlhf_cli.ranks.agreement import by_main
from rlhf_cli.ranks.world import world
from rlhf_cli.rollout.slot_sampler import size_of
from rlhf_cli.runs.attention import predicted_attention
from rlhf_cli.runs.memory_estimate import USABLE, held_always, in_bytes
from rlhf_cli.runs.model_sizes import BYTES, Unknown, geometry_of, start_of
from rlhf_cli.runs.out_files import BUDGET
from rlhf_cli.runs.pass_sizes import (
    activations,
    attention_matrices,
    gathered,
    has_plain_head,
    of_the_head,
    share_of,
)
from rlhf_cli.runs.sharing import ranks_of
from rlhf_cli.runs.update_sizes import longest_sequence, responses_of, rows_of_update
from rlhf_cli.training.room import SHARES

MOST = 32768  # tokens, from which on a GPU gains nothing by more
ENOUGH = 8192  # tokens that keep it busy: rather than fewer, some blocks are recomputed
FOR_ROLLOUTS = 0.25  # of what is left: keys and values stay while weights are updated
MOST_SAMPLED = 2**20  # tokens whose keys are kept, by stages that only sample
STEP = 256  # budgets are multiples of it
UNMEASURED = 16384, 131072  # where sizes are not known

FOR_LOGITS = 0.1  # of what is left: those that are kept are not computed again in backward
CHUNKS = 1024, 8192  # positions, at least and at most

_FORM: Form = {"tokens": COUNT, "sampled": COUNT, "chunk": COUNT, "level": COUNT}


@dataclass(frozen=True)
class Budget:
    """What hardware's auto means in a run.

    tokens: in a forward and backward pass.
    sampled: whose keys and values are kept at once.
    chunk: positions whose logits exist at once.
    level: the place in SHARES of the share of blocks that are recomputed from the start.
    """

    tokens: int
    sampled: int
    chunk: int = CHUNKS[0]
    level: int = 0


def settle(
    cfg: Run, device: torch.device, width: int, goes_on: bool
) -> tuple[Budget | None, list[str]]:
    """The budget of a run on a GPU, as it was kept or by the memory that is free now.

    The config's hardware answers with it from then on.

    Args:
        width: bytes of a number in the products.
        goes_on: whether what is in `out` is its own, and not of a run that it will replace.

    Returns:
        None on a CPU, which has fixed ones, or where no key says auto; and a line that tells it.
    """
    hardware = cfg.hardware
    keys = ("tokens_per_microbatch", "rollout_tokens", "logprob_chunk")
    if device.type != "cuda" or AUTO not in [getattr(hardware, key) for key in keys]:
        return None, []
    kept = Path(cfg.out) / BUDGET
    why = "as before"
    said = by_main(lambda: _kept(kept) if goes_on else None)
    budget = None if said is None else Budget(**said)
    if budget is None:
        free = min(world().from_all(free_memory(device)))
        budget, why = budget_of(cfg, free, width), f"{in_bytes(free)} of the GPU are free"
    hardware.measured(budget.tokens, budget.sampled, budget.chunk)
    told = {
        "tokens_per_microbatch": budget.tokens,
        "rollout_tokens": budget.sampled,
        "logprob_chunk": budget.chunk,
    }
    words = [f"{name}={value}" for name, value in told.items() if getattr(hardware, name) == AUTO]
    if budget.level and hardware.gradient_checkpointing == AUTO:
        words.append(f"{SHARES[budget.level]:.0%} of the blocks recomputed")
    return budget, [f"hardware, auto: {', '.join(words)} ({why})"]


def _kept(file: Path) -> dict[str, int] | None:
    """What `keep` wrote; None where it is not there, or damaged."""
    with suppress(UserError):
        return read_object(file, _FORM) if file.is_file() else None
    return None


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that no tensor takes: what the driver has, and what torch holds in reserve."""
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + reserve


def keep(budget: Budget, out: Path) -> None:
    """Write a budget beside resume points, for a run that goes on."""
    write_json(out / BUDGET, asdict(budget))


def budget_of(cfg: Any, free: float, width: int) -> Budget:
    """What a stage can hold at once in so many bytes.

    Args:
        width: bytes of a number in the products.
    """
    room = USABLE * free
    try:
        if not cfg.trains:
            token = 2 * width * geometry_of(cfg.policy).keys * geometry_of(cfg.policy).layers
            sampled = min(FOR_ROLLOUTS * room / token, MOST_SAMPLED)
            return Budget(MOST, _rounded(sampled))
        shapes, geometry = start_of(cfg)
        ranks = ranks_of(cfg)
        parts = ranks.parts(cfg.hardware.shard)
        always, trained = held_always(cfg, shapes, width, parts)
    except Unknown:
        return Budget(*UNMEASURED)
    graphs = 2 if "critic" in trained and cfg.algo.critic == "separate" else 1
    room -= sum(always.values())
    room -= sum(gathered(cfg, shapes, width, graphs).values()) if parts > 1 else 0
    longest = longest_sequence(cfg)
    sampled = float(UNMEASURED[1])
    if cfg.samples_online and cfg.hardware.rollout != VLLM:
        token = 2 * width * geometry.keys * geometry.layers
        responses = ranks.share(responses_of(cfg))
        sampled = min(FOR_ROLLOUTS * room / token, responses * size_of(longest))
        room -= max(0.0, sampled) * token
    chunk = chunk_of(cfg, room, geometry.vocabulary)
    room -= sum(of_the_head(cfg, geometry, chunk, True, width).values())
    rows = rows_of_update(cfg, ranks)
    enough = min(ENOUGH, rows * longest)
    eager = predicted_attention(cfg) == EAGER
    beside = attention_matrices(cfg, geometry, 1, longest, width) if eager else 0.0
    levels = range(len(SHARES)) if cfg.hardware.gradient_checkpointing == AUTO else [0]
    for level in levels:
        share = SHARES[level] if level else share_of(cfg)
        tokens = room / (graphs * (activations(cfg, geometry, 1, width, share) + beside))
        if tokens >= enough:
            break
    return Budget(_rounded(min(tokens, MOST)), _rounded(sampled), chunk, level)


def chunk_of(cfg: Any, room: float, vocabulary: int) -> int:
    """Positions whose logits exist at once; those of a head that is no plain product are costly."""
    if cfg.hardware.logprob_chunk != AUTO:
        return int(cfg.hardware.logprob_chunk)
    if not has_plain_head(cfg):
        return CHUNKS[0]
    fitting = _rounded(FOR_LOGITS * room / (BYTES * vocabulary))
    return min(max(fitting, CHUNKS[0]), CHUNKS[1])


def _rounded(tokens: float) -> int:
    return max(STEP, int(tokens) // STEP * STEP)
