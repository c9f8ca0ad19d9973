"""The predicted memory against what models, graphs and caches really hold."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_cli.config.compose import compose
from rlhf_cli.config.schema.models import FrozenModel
from rlhf_cli.data.batches import collate
from rlhf_cli.data.items import Tokens
from rlhf_cli.folders.geometry import Geometry
from rlhf_cli.models.adapters import trained
from rlhf_cli.models.decoder import hidden_states
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.save import save_model
from rlhf_cli.models.scorers import load_critic, load_scorer
from rlhf_cli.models.scorers import scorer_from_policy as new_scorer
from rlhf_cli.models.scratch import build_decoder
from rlhf_cli.runs.memory_estimate import parts_of, predicted_memory, predicted_peak
from rlhf_cli.runs.model_sizes import base_shapes, from_scratch
from rlhf_cli.runs.model_sizes import count as numbers_in
from rlhf_cli.runs.pass_sizes import activations
from rlhf_cli.runs.role_sizes import roles_of
from tests.toys import bpe, llama, model_of

CPU = torch.device("cpu")
TOKENIZER = bpe()
DATA = ["data=jsonl", "data.path=rows.jsonl"]
LORA = ["model=lora", "model.lora_rank=3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a reward model of all weights, one that is an adapter, and an adapted policy."""
    place = tmp_path_factory.mktemp("memory")
    base = llama(len(TOKENIZER), num_hidden_layers=3, tie_word_embeddings=False)
    save_model(base, TOKENIZER, place / "policy", merge=True)
    path = str(place / "policy")
    for name, rank in (("reward", 0), ("adapter", 3)):
        config = model_of(lora_rank=rank, lora_alpha=32.0)
        scorer = new_scorer(path, config, TOKENIZER, 1, CPU)
        if rank:
            move(scorer)
        save_model(scorer, TOKENIZER, place / name, merge=rank == 0)
    policy = load_policy(path, model_of(lora_rank=3, lora_alpha=32.0), TOKENIZER, CPU)
    move(policy)
    save_model(policy, TOKENIZER, place / "adapted", merge=False)
    return place


def move(model: nn.Module) -> None:
    """Train, so to say."""
    with torch.no_grad():
        for weight in trained(model).values():
            weight.add_(0.1)


def config_of(stage: str, place: Path, *words: str) -> Any:
    """Folders are given by name."""
    roles = ("policy=", "reward=")
    named = [word.replace("=", f"={place}/") for word in words if word.startswith(roles)]
    others = [word for word in words if not word.startswith(roles)]
    return compose(stage, [*DATA, *named, *others])


KINDS = (  # of fresh adapters, and what is made of one that is there
    ("policy", ["model.lora_targets=[q_proj,up_proj]"]),
    ("policy", ["model.lora_targets=.*mlp.*", "model.use_dora=true"]),
    ("policy", ["model.modules_to_save=[embed_tokens]"]),
    ("adapted", ["model.adapter=stack"]),
    ("adapted", ["model.adapter=merge", "model.merge_lora=true"]),
)
CASES = [
    (policy, reward, how)
    for how in ([], ["model.frozen_layers=2"], LORA, ["algo.critic=shared"])
    for reward in ("reward", "adapter")
    for policy in ("policy", "adapted")
] + [(policy, "reward", [*LORA, *how]) for policy, how in KINDS]


@pytest.mark.parametrize(("policy", "reward", "how"), CASES)
def test_roles_hold_as_many_numbers_as_predicted(
    policy: str, reward: str, how: list[str], folder: Path
) -> None:
    cfg = config_of("ppo", folder, f"policy={policy}", f"reward={reward}", *how)
    weights, training = roles_of(cfg, base_shapes(cfg.policy))

    model: Any = load_policy(cfg.policy, cfg.model, TOKENIZER, CPU)
    reference = Reference(model)
    frozen = FrozenModel("float32", False, "auto")
    scorer = load_scorer(cfg.reward, frozen, TOKENIZER, CPU, model)
    networks = [model, reference.model, scorer]
    expected = {"policy": len_of(trained(model).values())}
    if cfg.algo.critic == "separate":
        args = (cfg.reward, cfg.policy, cfg.model, TOKENIZER, 1, CPU, model)
        networks.append(load_critic(*args))
        expected["critic"] = len_of(trained(networks[-1]).values())
    else:
        expected["critic"] = model.config.hidden_size
    held = {id(weight): weight for each in networks for weight in each.parameters()}
    head = expected["critic"] if cfg.algo.critic == "shared" else 0
    # peft keeps the head that an adapter's own head replaced, and an untrained copy of it
    slack = 4 * model.config.hidden_size
    assert abs(sum(weights.values()) - head - len_of(held.values())) <= slack
    assert training["policy"] == expected["policy"]
    assert abs(training["critic"] - expected["critic"]) <= slack


def len_of(weights: Any) -> int:
    return sum(weight.numel() for weight in weights)


def test_a_model_from_scratch_has_the_size_that_is_foretold() -> None:
    cfg: Any = compose("sft", ["model=tiny"])
    model = cfg.model
    decoder = build_decoder(model, model.vocab_size, 0)
    norm = model.hidden_size  # the last one
    assert numbers_in(from_scratch(model)[0]) == len_of(decoder.parameters()) - norm


def saved_bytes(model: nn.Module, batch: Any) -> int:
    """What backward of the trunk holds, weights aside."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden_states(model, batch)
    return sum(found.values())


@pytest.mark.parametrize(("inner", "key_heads"), [(64, 4), (256, 4), (128, 2)])
def test_activations_are_what_autograd_keeps(inner: int, key_heads: int) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4}
    model = llama(40, intermediate_size=inner, num_key_value_heads=key_heads, **sizes)
    batch = collate([Tokens(list(range(1, 17)), list(range(1, 17)))] * 8)
    cfg = compose("dpo", DATA)
    geometry = Geometry.of(model.config.to_dict())
    assert geometry == Geometry(4, 64, 16 * key_heads, inner, 40, 4, 4, False)
    predicted = activations(cfg, geometry, batch.ids.numel())
    kept = saved_bytes(model, batch)
    one = predicted / 5  # the block that stands for the gradients
    assert 0.97 * (predicted - one) < kept < 1.1 * (predicted - one)


def test_parts_of_a_run_by_hand(folder: Path) -> None:
    """hidden 16, inner 32, 3 blocks, keys of width 8; 4 bytes a number."""
    cfg = config_of(
        *("ppo", folder, "policy=policy", "reward=adapter", "data.max_prompt_tokens=10"),
        *("data.max_response_tokens=6", "algo.batch_size=8", "algo.minibatch_size=4"),
        *("hardware.rollout_tokens=100", "hardware.logprob_chunk=16", "algo.ema_decay=0.9"),
    )
    always, update, rollout = parts_of(cfg)
    shapes = base_shapes(cfg.policy)
    size = numbers_in(shapes)
    assert always["weights of the policy"] == 4 * size
    assert always["average of the weights"] == 4 * size
    assert always["AdamW's moments"] == 2 * always["gradients"]
    block = 8 * 16 + 2 * 8 + 4 * 32
    # 4 rollouts of 16 tokens, of policy and critic
    assert update["activations of 64 tokens"] == 2 * 4 * 64 * 4 * block
    assert update["logits of 16 positions"] == 4 * 16 * len(TOKENIZER)
    assert rollout["keys and values of 100 sampled tokens"] == 2 * 4 * 100 * 8 * 4
    elsewhere = replace(cfg, hardware=replace(cfg.hardware, rollout="vllm"))
    assert parts_of(elsewhere) == (always, update, {}), "a server has memory of its own"
    lines = predicted_memory(cfg, 1000)
    assert len(lines) == len(always) + len(update) + len(rollout) + 2
    whole = (predicted_peak(cfg) + 460 * 2**20 + 200 * 1000) / 2**20
    assert lines[-2].endswith(f"about 1,000 rows: {whole:.1f} MiB on a CPU")
    assert predicted_peak(cfg) == sum(always.values()) + sum(update.values())
    assert (
        lines[-1] == f"predicted peak memory: {predicted_peak(cfg) / 2**20:.1f} MiB, in the update"
    )


def test_parts_of_a_run_in_bfloat16_by_hand(folder: Path) -> None:
    """Weights, activations, keys and values of 2 bytes; masters, gradients and moments of 4."""
    words = ["policy=policy", "reward=adapter", "data.max_prompt_tokens=10", "algo.batch_size=8"]
    words += ["data.max_response_tokens=6", "algo.minibatch_size=4", "hardware.rollout_tokens=100"]
    words += ["hardware.tokens_per_microbatch=32"]
    plain = parts_of(config_of("ppo", folder, *words))
    always, update, rollout = parts_of(config_of("ppo", folder, *words, "model.dtype=bfloat16"))
    halved = {name for name in plain[0] if name.startswith("weights of the ")}
    for name, size in plain[0].items():
        assert always.pop(name) == size / (2 if name in halved else 1), name
    assert always == {"float32 masters of what is trained": plain[0]["gradients"]}
    assert rollout == {"keys and values of 100 sampled tokens": 2 * 2 * 100 * 8 * 4}
    assert update["activations of 32 tokens"] == plain[1]["activations of 32 tokens"] / 2
    # logits in float32, their gradient in bfloat16; there are two micro-batches
    assert update["logits of 32 positions"] == 6 * 32 * len(TOKENIZER)
    assert update["gradient of the unembedding from a micro-batch"] == 4 * 16 * len(TOKENIZER)


def test_hub_models_are_unknown() -> None:
    cfg = compose("dpo", [*DATA, "policy=someone/model"])
    assert predicted_memory(cfg, 0) == [
        "predicted peak memory: unknown until someone/model is on this machine"
    ]
    assert predicted_memory(compose("generate", [*DATA, "policy=someone/model"]), 0) == []
