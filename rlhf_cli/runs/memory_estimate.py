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

import math
import re
from pathlib import Path
from typing import Any

from rlhf_cli.config.schema.hardware import VLLM
from rlhf_cli.config.schema.keys import AUTO
from rlhf_cli.config.schema.models import EAGER, Model, SftModel
from rlhf_cli.config.schema.stages import Run
from rlhf_cli.config.stages import DEMO_SIZE, facts_of, has_reference, row_kind_name
from rlhf_cli.data.kinds import JUDGEMENTS, kind_named
from rlhf_cli.folders.cached import folder_of
from rlhf_cli.folders.geometry import BLOCK, TABLE, Geometry, decoder_of
from rlhf_cli.folders.linear_shapes import expert_numbers
from rlhf_cli.folders.manifest import (
    RESPONSE,
    Shapes,
    adapter_base,
    beginnings,
    implicit_reward_of,
    level_of,
    read_config,
    reference_folder,
    shapes_of,
)
from rlhf_cli.rewards.specs import models_of
from rlhf_cli.runs.adapter_sizes import (
    adapter_below,
    goes_without_experts,
    is_switched_off,
    lora,
    saved_by_bits,
    trained_adapter,
)
from rlhf_cli.runs.attention import predicted_attention
from rlhf_cli.runs.inherited import context_of
from rlhf_cli.runs.provenance import models_read
from rlhf_cli.runs.sharing import ALONE, Ranks, expects_gpu, ranks_of

BYTES = 4  # of a number in float32
HEADS = ("score.", "classifier.")
EMBEDDINGS = re.compile(r"(embed_tokens|embeddings|wte)\.weight$")
UNEMBEDDING = re.compile(r"(^|\.)(lm_head|embed_out)\.")
# Tensors of the size of a chunk's logits at the peak of backward. Of a plain head, in its own
# backward pass (models/logprob_head.py): the logits, and those of a reference. Of another one, as
# measured: of log-probs, and how many more an entropy in the loss and the KL over the whole
# vocabulary take.
PLAIN, PLAIN_KL = 1, 1
LOG_PROBS, ENTROPY, FULL_KL = 3, 2, 3
# What configs call that which is done to logits beside the product.
DONE_TO_LOGITS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)
# Beside tensors, as measured: what a stage has imported, and what is held of each row.
LIBRARIES, ROW = 460 * 2**20, 200


class Unknown(Exception):
    """Why sizes are not known: a model is not on this machine, or its config is silent."""


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
        f"memory, {name}: {written(size)}" for name, size in (always | update | rollout).items()
    ]
    beside = LIBRARIES + ROW * rows
    each = " of each rank" if ranks.size > 1 else ""
    return [
        *lines,
        f"with Python, its libraries and about {rows:,} rows: {written(peak + beside)} on a CPU",
        f"predicted peak memory{each}: {written(peak)}, in the {when}",
    ]


def predicted_peak(
    cfg: Run,
    attention: str | None = None,
    width: int | None = None,
    ranks: Ranks | None = None,
    shard: str | None = None,
) -> float:
    """The sum in bytes, as `parts_of` has it.

    Raises:
        Unknown: a model is not on this machine.
    """
    always, update, rollout = parts_of(cfg, attention, width, ranks, shard)
    return sum(always.values()) + max(sum(update.values()), sum(rollout.values()))


def written(size: float) -> str:
    """Bytes as a reader takes them in."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


Parts = dict[str, float]


def parts_of(
    cfg: Any,
    attention: str | None = None,
    width: int | None = None,
    ranks: Ranks | None = None,
    shard: str | None = None,
) -> tuple[Parts, Parts, Parts]:
    """Bytes of a rank by part: held all the time, in an update, in a rollout.

    Args:
        shard: in place of hardware.shard.
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


def rows_of_update(cfg: Any, ranks: Ranks = ALONE) -> int:
    """Sequences of an update, or the most of them that one of several ranks has."""
    items, rows = items_of_update(cfg), rows_per_item(cfg)
    if cfg.samples_online:
        rows = 1  # responses are dealt out one by one
    return ranks.share(items) * rows


def items_of_update(cfg: Any) -> int:
    """What an update has that no two ranks share: responses, or rows with all of theirs."""
    items: int = getattr(cfg.algo, "minibatch_size", cfg.algo.batch_size)
    return items * rows_per_item(cfg) if cfg.samples_online else items


def responses_of(cfg: Any) -> int:
    """Responses that an iteration samples."""
    group: int = getattr(cfg.algo, "group_size", 1)
    return int(cfg.algo.batch_size) * group


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


def gathered(cfg: Any, shapes: Shapes, width: int, graphs: int) -> Parts:
    """Bytes of what a rank gathers in an update where weights are sharded, and of its gradient.

    What is beside the blocks stays for a whole pass; of the blocks there are two, as the next one
    is fetched early. A gradient is summed over the ranks in float32.

    Args:
        graphs: networks that are in a pass together.
    """
    text = of_text(shapes)
    blocks: dict[int, int] = {}
    for name, shape in text.items():
        if match := BLOCK.search(name):
            blocks[int(match[1])] = blocks.get(int(match[1]), 0) + math.prod(shape)
    rest, block = count(text) - sum(blocks.values()), max(blocks.values(), default=0)
    parts = {"weights that are gathered for a pass": width * (graphs * rest + 2.0 * block)}
    if not cfg.model.lora_rank:
        parts["gradients before they are shared out"] = (width + BYTES) * float(max(rest, block))
    return parts


def width_of(cfg: Any, shapes: Shapes) -> int:
    """Bytes of a number in the products of a run, as far as can be told without torch."""
    given = cfg.model.dtype
    if given != AUTO:
        return 2 if given == "bfloat16" else BYTES
    if cfg.start is None or count(shapes) <= DEMO_SIZE:
        return BYTES
    return 2 if expects_gpu(cfg) else BYTES


def longest_sequence(cfg: Any) -> int:
    """Tokens of prompt and response together; where nothing limits them, of a micro-batch."""
    answer = getattr(cfg.algo, "max_tokens", None) or cfg.data.max_response_tokens
    if answer is not None and cfg.data.max_prompt_tokens is not None:
        return int(cfg.data.max_prompt_tokens + answer)
    return context_of(cfg) or int(cfg.hardware.tokens_at_once)


def rows_per_item(cfg: Any) -> int:
    """Sequences in an item of a batch."""
    if kind_named(row_kind_name(cfg)) in JUDGEMENTS:
        return 2  # a pair; rankings have more, and fill the micro-batch
    return int(getattr(cfg.algo, "group_size", 1))


def activations(
    cfg: Any, geometry: Geometry, tokens: int, width: int = BYTES, share: float | None = None
) -> float:
    """Bytes that backward needs of one pass through a decoder.

    A token leaves in each block 8 hidden vectors (inputs and outputs of norms and projections), 2
    of the width of keys, and 4 of the feed-forward; attention by sdpa leaves no matrix of tokens by
    tokens. Frozen blocks leave nothing. Recomputed ones leave their input, and one is whole at a
    time. One more block stands for the gradients of activations.

    Args:
        share: of the blocks that are recomputed; None is what the config says, where auto is none.
    """
    block = 8 * geometry.hidden + 2 * geometry.keys + 4 * geometry.inner
    blocks = geometry.layers - cfg.model.frozen_layers
    again = math.ceil(blocks * (share_of(cfg) if share is None else share))
    whole = blocks - again + 1 + (again > 0)
    return width * tokens * (again * geometry.hidden + whole * block)


def share_of(cfg: Any) -> float:
    """The share of blocks that a config has recomputed from the start."""
    return float(cfg.hardware.gradient_checkpointing is True)


def attention_matrices(
    cfg: Any, geometry: Geometry, tokens: int, longest: int, width: int = BYTES
) -> float:
    """Bytes of what eager attention keeps for backward: a number for each head and pair of tokens.

    Each attending block that is trained keeps one such matrix, and one more where scores are
    capped. Two more stand for the gradients in one block.
    """
    kept = 2 if geometry.capped else 1
    blocks = max(0, geometry.attending - cfg.model.frozen_layers)
    if share_of(cfg):
        blocks = min(blocks, 1)
    return width * geometry.heads * tokens * longest * (kept * blocks + 2)


def adapted_experts(cfg: Any, shapes: Shapes, layers: int) -> float:
    """Bytes of the sums of experts and their adapters, which backward needs.

    peft adapts what holds several experts by such a sum: one for each layer, and another for its
    gradient; where blocks are recomputed there is one layer's at a time.
    """
    kept = 1 if share_of(cfg) else layers
    return BYTES * expert_numbers(trunk_of(shapes)) * (kept + 1) / layers


def of_the_head(cfg: Any, geometry: Geometry, chunk: int, several: bool, width: int) -> Parts:
    """Bytes of a chunk's logits and, where the unembedding is trained, of the gradient that one of
    several micro-batches adds.
    """
    if facts_of(cfg).writes == "reward":  # which has scores in place of logits
        return {}
    copies = logit_copies(cfg) + (width < BYTES) / 2  # their gradient in the type of the product
    parts = {f"logits of {chunk} positions": copies * BYTES * chunk * geometry.vocabulary}
    if several and not cfg.model.lora_rank and not cfg.model.frozen_layers:
        part = BYTES * geometry.hidden * geometry.vocabulary
        parts["gradient of the unembedding from a micro-batch"] = part
    return parts


def logit_copies(cfg: Any) -> int:
    """Tensors of the size of a chunk's logits that exist at once."""
    online = cfg.samples_online
    full = online and cfg.algo.kl_in == "loss" and cfg.algo.kl_estimator == "full"
    if has_plain_head(cfg):
        return PLAIN + PLAIN_KL * full
    return LOG_PROBS + ENTROPY * (online and cfg.algo.entropy_coef > 0) + FULL_KL * full


def has_plain_head(cfg: Any) -> bool:
    """Whether logits are a plain product with the hidden states, by the words of the config."""
    if cfg.start is None:
        return True
    config = decoder_of(read_config(folder_of(adapter_base(cfg.start) or cfg.start)))
    return not any(config.get(name) for name in DONE_TO_LOGITS)


def auto_line(cfg: Any) -> list[str]:
    """What the keys of hardware that say auto will mean, for --check."""
    hardware, gpu = cfg.hardware, expects_gpu(cfg)
    at_once = {
        "tokens_per_microbatch": hardware.tokens_at_once,
        "rollout_tokens": hardware.sampled_at_once,
        "logprob_chunk": hardware.logits_at_once,
    }
    said = {
        name: "by the GPU's free memory" if gpu else str(tokens) for name, tokens in at_once.items()
    }
    said["gradient_checkpointing"] = "once memory runs out"
    said["compile"] = "if the steps after the fourth take over 3 minutes" if gpu else "false"
    told = [f"{name} {what}" for name, what in said.items() if getattr(hardware, name) == AUTO]
    return [f"hardware, auto: {', '.join(told)}"] if told else []


# --------------------------------------------------------------------------- roles


def roles_of(
    cfg: Any, shapes: Shapes, width: int = BYTES, parts: int = 1
) -> tuple[dict[str, int], dict[str, int]]:
    """Numbers that each role holds and no other does, and how many of them are trained.

    Args:
        width: bytes of a number, which those of few bits are counted in.
        parts: that weights are cut into: a model that is loaded then shares none of them.
    """
    model: Model = cfg.model
    held: dict[str, int] = {}
    trained: dict[str, int] = {}
    scores = facts_of(cfg).writes == "reward"
    role, own = ("reward model", trunk_of(shapes)) if scores else ("policy", shapes)
    adapter, frozen = trained_adapter(cfg, of_text(own)), count(frozen_of(own, model.frozen_layers))
    held[role] = count(own) - saved_by_bits(own, model, width) + adapter + adapter_below(cfg)
    trained[role] = adapter or count(own) - frozen
    if has_reference(cfg):
        held["reference"] = reference_numbers(cfg, shapes, adapter, frozen)
    if getattr(cfg.algo, "baseline", None) == "critic":
        held["critic"], trained["critic"] = critic_numbers(cfg, shapes, width, parts)
    if (reward := getattr(cfg, "reward", None)) is not None:
        held["reward"] = sum(reward_numbers(cfg, path, parts) for path in models_of(reward))
    others = {"gold": getattr(cfg, "gold", None)}
    others |= {f"scorer {spec}": spec for spec in getattr(cfg, "scorers", [])}
    for name, spec in others.items():
        if spec is not None:
            held[name] = sum(count(trunk_of(known(path))) for path in models_of(spec))
    return {role: number for role, number in held.items() if number}, trained


def reference_numbers(cfg: Any, shapes: Shapes, adapter: int, frozen: int) -> int:
    """A copy of what the policy trains; none of a fresh adapter, which is switched off."""
    if getattr(cfg.algo, "precompute_reference", False):
        return 0
    if (path := models_read(cfg).get("reference")) is not None:
        return count(known(path))
    if not adapter:
        return count(shapes) - frozen
    refreshed = getattr(cfg.algo, "refresh_reference", None) is not None
    return adapter if refreshed or not is_switched_off(cfg) else 0


def critic_numbers(cfg: Any, shapes: Shapes, width: int, parts: int) -> tuple[int, int]:
    """What the critic holds beside the policy, and trains."""
    trunk, model = trunk_of(shapes), cfg.model
    if cfg.algo.critic == "shared":
        return (head := hidden_of(cfg)), head
    start = next(
        (
            path
            for path in models_of(cfg.reward)
            if implicit_reward_of(path) is None and level_of(path) == RESPONSE
        ),
        None,
    )
    if start is None:
        upper = count(trunk) - count(frozen_of(trunk, model.frozen_layers))
        adapter = trained_adapter(cfg, of_text(trunk)) if model.lora_rank else upper
        return adapter, adapter
    reward = trunk_of(known(start))
    if not model.lora_rank:
        frozen = count(frozen_of(reward, model.frozen_layers))
        return count(reward) - in_common(cfg, start, parts), count(reward) - frozen
    if on_base_of(start, cfg.policy):
        return (adapter := count(adapter_shapes(start))), adapter
    fresh = lora(of_text(reward), model)
    return count(reward) - saved_by_bits(reward, model, width) + fresh, fresh


def reward_numbers(cfg: Any, path: str, parts: int) -> int:
    """What a reward model holds beside the policy."""
    implicit = implicit_reward_of(path)
    if implicit is not None:
        return count(known(path)) + count(known(reference_folder(path, implicit)))
    if cfg.model.lora_rank and cfg.samples_online and on_base_of(path, cfg.policy):
        return count(adapter_shapes(path))
    return count(trunk_of(known(path))) - in_common(cfg, path, parts)


def in_common(cfg: Any, path: str, parts: int) -> int:
    """Numbers of the policy's frozen layers that a full reward model has, too, and shares then.

    Weights are taken for equal if they begin alike and no adapter is merged into them.
    """
    if not cfg.samples_online or parts > 1:
        return 0
    frozen = frozen_of(known(cfg.policy), cfg.model.frozen_layers)
    ours, theirs = (
        beginnings(Path(adapter_base(each) or each), frozen) for each in (cfg.policy, path)
    )
    same = {name for name in ours if ours[name] == theirs.get(name)}
    same -= merged_into(cfg.policy) | merged_into(path)
    return count({name: frozen[name] for name in same})


def merged_into(path: str) -> set[str]:
    """The weights of its base that an adapter folder changes."""
    if adapter_base(path) is None:
        return set()
    layers = {name.split(".lora_")[0] for name in adapter_shapes(path) if ".lora_" in name}
    return {f"{layer.removeprefix('base_model.model.')}.weight" for layer in layers}


def on_base_of(path: str, policy: str) -> bool:
    """Whether a folder is an adapter on the base of the policy, by its path."""
    base = adapter_base(path)
    ours = adapter_base(policy) or policy
    return base is not None and Path(base).resolve() == Path(ours).resolve()


# --------------------------------------------------------------------------- sizes


def start_of(cfg: Any) -> tuple[Shapes, Geometry]:
    """The shapes of the model that a stage starts from."""
    if cfg.start is None:
        return from_scratch(cfg.model)
    return known(cfg.start), geometry_of(cfg.start)


def geometry_of(path: str) -> Geometry:
    """The widths of a folder's decoder."""
    try:
        return Geometry.of(read_config(folder_of(adapter_base(path) or path)))
    except KeyError as missing:
        raise Unknown(f"for {path}: its config.json says no {missing.args[0]}") from None


def hidden_of(cfg: Any) -> int:
    """The width of the policy's hidden states."""
    return geometry_of(cfg.policy).hidden


def known(path: str) -> Shapes:
    """The shapes of a full model, or of the base of an adapter folder."""
    shapes = shapes_of(folder_of(adapter_base(path) or path))
    if not shapes:
        raise Unknown(f"until {path} is on this machine")
    return shapes


def adapter_shapes(path: str) -> Shapes:
    """The shapes of an adapter folder's own weights."""
    return shapes_of(Path(path))


def from_scratch(model: SftModel) -> tuple[Shapes, Geometry]:
    """What models/scratch.py builds."""
    assert model.hidden_size and model.layers and model.vocab_size and model.heads
    d, inner = model.hidden_size, model.hidden_size * 8 // 3
    shapes: Shapes = {"model.embed_tokens.weight": (model.vocab_size, d)}
    for i in range(model.layers):
        block = f"model.layers.{i}."
        shapes |= {f"{block}self_attn.{name}_proj.weight": (d, d) for name in "qkvo"}
        shapes |= {f"{block}mlp.{name}_proj.weight": (inner, d) for name in ("gate", "up", "down")}
        shapes |= {f"{block}norms.weight": (2 * d,)}
    return shapes, Geometry(
        model.layers, d, d, inner, model.vocab_size, model.heads, model.layers, False
    )


def count(shapes: Shapes) -> int:
    """How many numbers there are."""
    return sum(math.prod(shape) for shape in shapes.values())


def trunk_of(shapes: Shapes) -> Shapes:
    """Without the unembedding."""
    return {name: shape for name, shape in shapes.items() if not UNEMBEDDING.search(name)}


def of_text(shapes: Shapes) -> Shapes:
    """Without towers, which get no adapter."""
    towers = towers_of(shapes)
    return {name: shape for name, shape in shapes.items() if name not in towers}


def towers_of(shapes: Shapes) -> Shapes:
    """What text does not pass through in a model that sees or hears, which is never trained.

    The decoder holds the token embeddings, the longest matrix outside all blocks among those that
    are called so, and blocks of its own; blocks beside it are an encoder of something else, and the
    rest is that one's projector.
    """
    free = [name for name in trunk_of(shapes) if not (BLOCK.search(name) or TABLE.search(name))]
    matrices = [name for name in free if len(shapes[name]) == 2 and not name.startswith(HEADS)]
    if not matrices:
        return {}
    tables = [name for name in matrices if EMBEDDINGS.search(name)] or matrices
    embeddings = max(tables, key=lambda name: shapes[name][0])
    blocks = [name for name in shapes if BLOCK.search(name)]
    decoder = embeddings.removesuffix("weight")
    while decoder and not any(name.startswith(decoder) for name in blocks):
        decoder = decoder[: decoder.rstrip(".").rfind(".") + 1]
    beside = {
        name: shape
        for name, shape in trunk_of(shapes).items()
        if not name.startswith((decoder, *HEADS))
    }
    return beside if any(map(BLOCK.search, beside)) else {}


def frozen_of(shapes: Shapes, layers: int) -> Shapes:
    """Towers, and the embeddings and the lowest blocks, if any are frozen."""
    towers = towers_of(shapes)
    if not layers:
        return towers
    return towers | {
        name: shape
        for name, shape in trunk_of(shapes).items()
        if (int(match[1]) < layers if (match := BLOCK.search(name)) else len(shape) == 2)
        and not name.startswith(HEADS)
    }
