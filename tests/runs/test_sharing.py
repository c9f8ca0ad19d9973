"""What is told of several ranks before a run, against their numbers and by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.models import FrozenModel
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.save import save_model
from rlhf_cli.models.scorers import load_critic, load_scorer
from rlhf_cli.models.scorers import scorer_from_policy as new_scorer
from rlhf_cli.models.shards import own_part
from rlhf_cli.ranks.world import world
from rlhf_cli.runs import fitting, sharing
from rlhf_cli.runs.budgets import budget_of
from rlhf_cli.runs.fitting import sharing_lines
from rlhf_cli.runs.memory_estimate import held_always, parts_of, predicted_memory, predicted_peak
from rlhf_cli.runs.model_sizes import base_shapes, count
from rlhf_cli.runs.sharing import Ranks, gpus, ranks_of
from tests.pace import slow
from tests.ranks import on_ranks
from tests.toys import bpe, llama, model_of

CPU = torch.device("cpu")
TOKENIZER = bpe()
DATA = ["data=jsonl", "data.path=rows.jsonl", "data.max_prompt_tokens=40"]
LORA = ["model=lora", "model.lora_rank=4"]
EIGHT = Ranks(8, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a reward model of all weights, and one that is an adapter on the policy."""
    place = tmp_path_factory.mktemp("sharing")
    base = llama(len(TOKENIZER), num_hidden_layers=3, tie_word_embeddings=False)
    save_model(base, TOKENIZER, place / "policy", merge=True)
    for name, rank in (("reward", 0), ("adapter", 4)):
        config = model_of(lora_rank=rank, lora_alpha=32.0)
        scorer = new_scorer(str(place / "policy"), config, TOKENIZER, 1, CPU)
        save_model(scorer, TOKENIZER, place / name, merge=rank == 0)
    return place


def config_of(stage: str, place: Path, *words: str) -> Any:
    named = [f"policy={place}/policy", "data.max_response_tokens=24"]
    return compose(stage, [*DATA, *named, *words])


def ppo(place: Path, *words: str, reward: str = "reward") -> Any:
    return config_of("ppo", place, f"reward={place}/{reward}", *words)


# --------------------------------------------------------------------------- who there is


def test_ranks_are_those_of_the_environment_or_of_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["hardware=cpu", "hardware.processes=3"]
    assert ranks_of(compose("sft", words)) == Ranks(3, 3)
    assert ranks_of(compose("sft", ["hardware=cpu", "hardware.processes=auto"])) == Ranks(1, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1,0")
    assert ranks_of(compose("sft", ["hardware=ddp"])) == Ranks(3, 3)
    for name, value in {
        "RANK": 5,
        "WORLD_SIZE": 16,
        "LOCAL_RANK": 5,
        "LOCAL_WORLD_SIZE": 8,
    }.items():
        monkeypatch.setenv(name, str(value))
    found = ranks_of(compose("sft", words))
    assert found == Ranks(16, 8) and str(found) == "16 on 2 machines, 8 each"
    assert [found.parts(each) for each in ("none", "hybrid", "full")] == [1, 8, 16]
    assert [found.share(items) for items in (0, 1, 16, 17)] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("shown", "number"), [("", 0), ("-1", 0), ("0", 1), ("2, 5", 2), ("0,-1,1", 1), ("GPU-ab", 1)]
)
def test_gpus_are_those_that_may_be_used(
    shown: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert gpus() == number


# --------------------------------------------------------------------------- what they hold

CASES: dict[str, list[str]] = {
    "all weights": [],
    "all weights, in bfloat16": ["model.dtype=bfloat16"],
    "a shared critic": ["algo.critic=shared"],
    "upper blocks": ["model.frozen_layers=2"],
    "an adapter": LORA,
    "an adapter, in bfloat16": [*LORA, "model.dtype=bfloat16"],
    "an adapter that is merged, in bfloat16": [
        *(*LORA, "model.dtype=bfloat16", "model.merge_lora=true"),
    ],
}


FAST = "all weights, in bfloat16", "an adapter, in bfloat16"
SLOW = [name for name in CASES if name not in FAST]


def bytes_of_a_rank(place: Path, names: list[str]) -> dict[str, int]:
    """What this rank holds of all roles of ppo once they are loaded, in each case."""
    world().shard("full")
    found = {}
    for name in names:
        words = CASES[name]
        cfg = ppo(place, *words, reward="adapter" if LORA[0] in words else "reward")
        model: Any = load_policy(cfg.policy, cfg.model, TOKENIZER, CPU)
        reference = Reference(model)
        dtype = "float32" if cfg.model.dtype == "auto" else cfg.model.dtype
        frozen = FrozenModel(dtype, False, "auto")
        networks = [model, reference.model, load_scorer(cfg.reward, frozen, TOKENIZER, CPU, model)]
        if cfg.algo.critic == "separate":
            args = (cfg.reward, cfg.policy, cfg.model, TOKENIZER, 1, CPU, model)
            networks.append(load_critic(*args))
        parts = [own_part(weight.detach()) for each in networks for weight in each.parameters()]
        held = {part.untyped_storage().data_ptr(): part.untyped_storage() for part in parts}
        found[name] = sum(storage.nbytes() for storage in held.values())
    return found


@pytest.mark.parametrize("names", [FAST, slow(SLOW)])
def test_ranks_hold_as_many_bytes_as_predicted(names: list[str], folder: Path) -> None:
    """Of both ranks together, since rows need not be even."""
    both = on_ranks(2, bytes_of_a_rank, folder, names)
    for name in names:
        words = CASES[name]
        cfg = ppo(folder, *words, reward="adapter" if LORA[0] in words else "reward")
        width = 2 if "model.dtype=bfloat16" in words else 4
        held, _ = held_always(cfg, base_shapes(cfg.policy), width, parts=2)
        weights = sum(size for part, size in held.items() if part.startswith("weights of"))
        assert weights == pytest.approx(sum(each[name] for each in both) / 2, rel=0.03), name


def test_parts_of_a_sharded_run_by_hand(folder: Path) -> None:
    """bfloat16: what is trained in 4 bytes, the others in 2; a quarter of each, and 4 rollouts."""
    words = ["model.dtype=bfloat16", "algo.batch_size=16", "algo.minibatch_size=16"]
    words += ["hardware.shard=full", "hardware.logprob_chunk=16"]
    cfg = ppo(folder, *words)
    always, update, rollout = parts_of(cfg, ranks=Ranks(4, 4))
    size = count(base_shapes(cfg.policy))
    table = 16 * len(TOKENIZER)  # embeddings; as many in the unembedding
    block = (size - 2 * table - 16) // 3
    score = size - table + 16  # the reward model has a head in place of the unembedding
    assert always["weights of the policy"] == 4 * size / 4
    assert always["weights of the reference"] == 2 * size / 4
    assert always["weights of the critic"] == 4 * score / 4
    assert always["weights of the reward"] == 2 * score / 4
    assert "float32 masters of what is trained" not in always
    assert always["gradients"] == 4 * (size + score) / 4 == always["AdamW's moments"] / 2
    rest = 2 * table + 16
    assert update["weights that are gathered for a pass"] == 2 * (2 * rest + 2 * block)
    assert update["gradients before they are shared out"] == (2 + 4) * rest
    assert "activations of 256 tokens" in update
    assert rollout["weights that are gathered to sample"] == 2 * size
    assert rollout["keys and values of 256 sampled tokens"] == 2 * 2 * 256 * 8 * 4
    server = ["hardware.rollout=vllm", "hardware.rollout_server=http://here:8000"]
    assert parts_of(ppo(folder, *words, *server), ranks=Ranks(4, 4))[2] == {}
    lines = predicted_memory(cfg, 0, ranks=Ranks(4, 4))
    assert lines[-1].startswith("predicted peak memory of each rank: ")


def test_one_process_holds_what_it_held(folder: Path) -> None:
    """hardware.shard says nothing to it."""
    assert parts_of(ppo(folder)) == parts_of(ppo(folder, "hardware.shard=full"))
    told = "note: hardware.shard=full cuts nothing: one process holds all weights"
    assert told in sharing_lines(ppo(folder, "hardware.shard=full"), Ranks())
    assert told not in sharing_lines(ppo(folder, "hardware.shard=full"), EIGHT)


# --------------------------------------------------------------------------- what is told


def test_the_work_of_each_rank_is_spelled_out(folder: Path) -> None:
    words = ["reward=length:20", "algo.batch_size=6", "algo.minibatch_size=3", "algo.group_size=4"]
    cfg = config_of("grpo", folder, *words, "hardware.tokens_per_microbatch=100")
    ranks, update, sampled, *rest = "; ".join(sharing_lines(cfg, Ranks(8, 4))).split("; ")
    assert ranks == "ranks: 8 on 2 machines, 4 each"
    assert update == (
        "an update: 12 sequences x up to 64 tokens / 8 = 128 tokens of each rank, "
        "in 2 micro-batches of up to 100"
    )
    assert sampled == "an iteration: 24 responses / 8 = up to 3 that each rank samples"
    assert rest[0].startswith("memory of each rank at its peak, by hardware.shard: none ")
    assert ", hybrid " in rest[0] and ", full " in rest[0]


def test_ranks_without_work_are_told(folder: Path) -> None:
    """A pair is learnt from by one rank."""
    lines = sharing_lines(config_of("dpo", folder, "algo.batch_size=5"), EIGHT)
    assert "10 sequences x up to 64 tokens / 8 = 128 tokens of each rank" in lines[0]
    assert lines[1].startswith("note: an update has 5 items for 8 ranks: 3 of them have nothing")


def gib(size: float) -> str:
    return f"hardware.device_memory={size / 2**30:.12f}"


def test_what_fits_a_device_is_told(folder: Path) -> None:
    peaks = {
        each: predicted_peak(ppo(folder), ranks=EIGHT, shard=each) for each in ("none", "full")
    }
    assert peaks["full"] < 0.95 * peaks["none"]
    between = (peaks["full"] + peaks["none"]) / 2 / 0.9
    (*_, last) = sharing_lines(ppo(folder, gib(between)), EIGHT)
    assert last.startswith("of the ") and last.endswith("device_memory these fit: full")
    (*_, last) = sharing_lines(ppo(folder, gib(2 * peaks["none"])), EIGHT)
    assert last.endswith("these fit: none, full")
    (*_, last) = sharing_lines(ppo(folder, gib(1000)), EIGHT)
    assert last.endswith("none fits; docs/hardware.md#memory has what makes it smaller")
    alone = ppo(folder, gib(predicted_peak(ppo(folder)) / 0.9 * 0.99))
    (line,) = sharing_lines(alone)
    assert line.startswith("note: a peak of ")
    assert line.endswith("; sharded over 2 (hardware=fsdp) it would")
    assert sharing_lines(ppo(folder)) == []


def test_a_run_that_no_memory_is_told_of_says_what_it_takes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "host_memory", lambda: None)
    assert sharing_lines(ppo(folder), EIGHT)[-1].startswith("memory of each rank")
    monkeypatch.setattr(fitting, "host_memory", lambda: 2**20)
    assert sharing_lines(ppo(folder), EIGHT)[-1] == (
        "of the 1.0 MiB that are free on this machine none fits"
    )
    assert sharing_lines(compose("dpo", [*DATA, "policy=someone/model"]), EIGHT)[1:] == []
    sampled = sharing_lines(config_of("generate", folder), EIGHT)
    assert sampled == [
        "ranks: 8 on this machine; prompts and what scores the responses are dealt out"
    ]


def test_this_machine_says_what_is_free() -> None:
    free = sharing.host_memory()
    assert free is not None and 2**24 < free < 2**46
    found = sharing.gpu_memory()
    assert found is None or found > 2**30


def test_device_memory_is_for_stages_that_train(folder: Path) -> None:
    with pytest.raises(UserError, match="hardware.device_memory is for stages that train"):
        config_of("generate", folder, "hardware.device_memory=80")


def test_what_auto_takes_of_a_gpu_goes_by_the_part_that_a_rank_holds() -> None:
    sizes = ["model.hidden_size=512", "model.layers=8", "model.heads=8", "algo.batch_size=512"]
    words = [*sizes, "hardware.processes=8", "hardware.logprob_chunk=1024"]
    cut = compose("sft", [*words, "hardware.shard=full"])
    whole = compose("sft", words)
    (held, update, _), (all_of_it, _, _) = parts_of(cut), parts_of(whole)
    free = 4e9
    here, there = budget_of(cut, free, 4).tokens, budget_of(whole, free, 4).tokens
    spared = sum(all_of_it.values()) - sum(held.values())
    spared -= update["weights that are gathered for a pass"]
    spared -= update["gradients before they are shared out"]
    token = update["activations of 4096 tokens"] / 4096
    assert spared > 3e8 and there > 1024
    assert here - there == pytest.approx(spared / token, abs=256)
