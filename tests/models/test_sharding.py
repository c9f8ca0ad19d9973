"""A model that is sharded over ranks learns, scores and writes what a whole one does."""

import copy
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.batches import collate
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.packing import SHARED
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.models.adapters import restore, snapshot, trained, unite
from rlhf_cli.models.decoder import find_parts
from rlhf_cli.models.forward import state_values, token_logprobs
from rlhf_cli.models.heads import value_head
from rlhf_cli.models.layouts import layout_of
from rlhf_cli.models.masters import master_of
from rlhf_cli.models.nonfinite import first_nonfinite
from rlhf_cli.models.placing import place
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.models.shards import is_sharded, own_part, whole
from rlhf_cli.models.shared import critic_on_base
from rlhf_cli.ranks.world import world
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.runs.policy import Policy
from rlhf_cli.training.loss_term import Loss, LossTerm
from rlhf_cli.training.optimize import Optimizer
from tests.ranks import on_ranks
from tests.toys import bpe, composed, data_of, hardware_of, llama, model_of, sequences_of

SEQUENCES = sequences_of(8)
TOKENS = sum(len(each.response) for each in SEQUENCES)
THREE = [SEQUENCES[:3], SEQUENCES[3:6], SEQUENCES[6:]]  # of which one rank has none in its turn
HARDWARE = hardware_of(gradient_checkpointing=False)
SLOW = pytest.mark.slow
CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "tied": {"tie_word_embeddings": True},
    "frozen": {"frozen": True},
    "lora": {"lora": True},
    "dora": {"lora": True, "adapter": {"use_dora": True}},
    "whole": {"lora": True, "adapter": {"modules_to_save": ["lm_head", "embed_tokens"]}},
    "bfloat16": {"dtype": "bfloat16"},
    "experts": {"experts": True},
    "capped": {"capped": True},  # logits by the model's own forward, in chunks
}


class Experts(nn.Module):
    """Two of which few tokens need the second, so that not all ranks have a gradient of it."""

    def __init__(self, one: nn.Module) -> None:
        super().__init__()
        self.each = nn.ModuleList([one, copy.deepcopy(one)])

    def forward(self, states: Tensor) -> Tensor:
        found: Tensor = self.each[0](states)
        chosen = states[..., :1] > 1.2
        return torch.where(chosen, self.each[1](states), found) if chosen.any() else found


def model_on_ranks(
    over: str,
    dtype: str = "float32",
    lora: bool = False,
    frozen: bool = False,
    experts: bool = False,
    capped: bool = False,
    adapter: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """A decoder as it is after loading; `over` is what hardware.shard says."""
    world().shard(over)
    model: Any = llama(**settings)
    if capped:
        torch.manual_seed(5)
        sizes = {**model.config.to_dict(), "head_dim": 4, "final_logit_softcapping": 3.0}
        model = Gemma2ForCausalLM(Gemma2Config(**sizes)).eval()
    if experts:
        model.model.layers[1].mlp = Experts(model.model.layers[1].mlp)
    find_parts(model)
    if frozen:
        model.model.layers[0].requires_grad_(False)
    if lora:
        torch.manual_seed(3)
        given: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        config = peft.LoraConfig(**given, **(adapter or {}))
        model = peft.get_peft_model(model, config)
        unite(model)
    place(model, model_of(), getattr(torch, dtype), CPU)
    return model.eval()


def learnt(over: str, **kind: Any) -> dict[str, Any]:
    """Six steps of a policy with its reference, and with a critic on its base or a value head."""
    policy = model_on_ranks(over, **kind)
    reference = Reference(policy)
    head = value_head(policy)
    critic: nn.Module = critic_on_base(policy, "critic", head) if kind.get("lora") else head

    def loss(sequences: list[Tokens]) -> Loss:
        batch = collate(sequences)
        on_trunk = None if kind.get("lora") else head
        scored = token_logprobs(
            policy, batch, chunk=5, with_entropy=True, value_head=on_trunk, reference=reference
        )
        values = state_values(critic, batch) if scored.values is None else scored.values
        assert scored.kl is not None
        errors = ((values - 1).square() * batch.response).sum()
        total = 0.1 * scored.kl.sum() - scored.logprobs.sum() + errors
        return total, {"kl": scored.kl.sum().detach()}

    config = replace(composed("dpo").algo, lr=1e-3, max_grad_norm=0.5)
    networks = {"policy": (policy, 1e-3), "critic": (critic, 1e-3)}
    optimizer = Optimizer(networks, config, 9, HARDWARE)
    term = LossTerm(THREE, loss, TOKENS)
    reports = [optimizer.step([term]) for _ in range(6)]
    moments = sum(own_part(each).numel() for each in optimizer.tensors().values())
    with reference.active() as frozen:
        theirs = numbers(logprobs_of(frozen, SEQUENCES, HARDWARE))
    unmoved = reference.digest() == reference.hash
    reference.refresh()
    with reference.active() as frozen:
        refreshed = numbers(logprobs_of(frozen, SEQUENCES, HARDWARE))
    return {
        "reports": reports,
        "weights": numbers([whole(each.detach()).flatten() for each in weights_of(policy)]),
        "scores": numbers(logprobs_of(policy, SEQUENCES, HARDWARE)),
        "reference": theirs,
        "refreshed": refreshed,
        "unmoved": unmoved,
        "moments": moments,
        "held": sum(own_part(each).numel() for each in policy.parameters()),
        "masters": sum(master_of(each) is not each for each in policy.parameters()),
        "layout": layout_of(policy, HARDWARE),
    }


def numbers(tensors: list[Tensor]) -> list[float]:
    """As they can be sent between processes that end."""
    found: list[float] = torch.cat(tensors).tolist()
    return found


def weights_of(model: nn.Module) -> list[Tensor]:
    return list(trained(model).values())


def all_kinds(over: str, kinds: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: learnt(over, **kind) for name, kind in kinds.items()}


@pytest.mark.parametrize(
    ("over", "size", "names"),
    [
        ("full", 2, ["tied", "dora"]),
        pytest.param(
            *("full", 2, ["full", "frozen", "bfloat16", "experts", "capped", "whole"]),
            marks=SLOW,
        ),
        pytest.param("full", 3, [*KINDS], marks=SLOW),
        pytest.param("hybrid", 4, [*KINDS], marks=SLOW),
    ],
)
def test_ranks_learn_what_one_process_learns_and_hold_their_part_of_it(
    over: str, size: int, names: list[str]
) -> None:
    kinds = {name: KINDS[name] for name in names}
    one = all_kinds("none", kinds)
    for rank in on_ranks(size, all_kinds, over, kinds):
        for name, found in rank.items():
            alone = one[name]
            near = 6e-3 if name == "bfloat16" else 1e-5
            assert found["weights"] == pytest.approx(alone["weights"], rel=0, abs=near)
            assert found["unmoved"] and found["layout"] == alone["layout"]
            assert found["layout"] == SHARED or name in ("experts", "capped")
            if name == "bfloat16":
                assert found["masters"] == 0  # parts are float32 themselves
                continue
            assert found["scores"] == pytest.approx(alone["scores"], rel=0, abs=1e-4)
            assert found["reference"] == alone["reference"]
            assert found["refreshed"] == found["scores"]
            for ours, theirs in zip(found["reports"], alone["reports"], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
            share = found["held"] / alone["held"]
            if over == "full":
                # rows that three ranks cannot share alike: of 4 of an adapter they have 2, 2 and 0
                uneven = (0.2 if "lora" in KINDS[name] else 0.06) if size == 3 else 0.04
                assert abs(share - 1 / size) < uneven
                assert abs(found["moments"] / alone["moments"] - 1 / size) < uneven


def test_a_mesh_of_one_learns_the_same_to_the_bit() -> None:
    kinds = {name: KINDS[name] for name in ("full", "lora")}
    (found,) = on_ranks(1, all_kinds, "full", kinds)
    for name, alone in all_kinds("none", kinds).items():
        assert found[name]["reports"] == alone["reports"]
        assert found[name]["weights"] == alone["weights"]


# --------------------------------------------------------------------------- other passes


def beside_training() -> dict[str, Any]:
    """What else is done with a sharded model."""
    tokenizer = bpe()
    model = model_on_ranks("full", vocabulary=len(tokenizer))
    encoder = Encoder(tokenizer, data_of())
    policy = Policy.of(model, encoder, HARDWARE)
    prompts = encoder.prompts([Prompt(text) for text in ("the cat", "a dog", "two")])
    rollouts = policy.engine.sample(prompts, Sampling(7), samples=2, seed=3)
    logprobs, before = logprobs_of(model, SEQUENCES, HARDWARE), snapshot(model)
    for weight in weights_of(model):
        own_part(weight).data.zero_()
    restore(model, before)
    restored = numbers(logprobs_of(model, SEQUENCES, HARDWARE))
    values = dict(trained(model))
    if world().rank == 1:
        own_part(values["model.norm.weight"])[-1] = float("nan")
    return {
        "told": not_by_forward(),
        "texts": [each.text for each in rollouts],
        "sharded": all(map(is_sharded, model.parameters())),
        "restored": restored == numbers(logprobs),
        "bad": first_nonfinite(values),
    }


def not_by_forward() -> str:
    """What is said of a decoder that uses a block's weights outside of the block."""
    world().shard("full")
    model = llama()
    block = model.model.layers[1]
    model.model.layers[0].mlp.forward = lambda states: block.mlp.gate_proj.weight.sum() + states
    with pytest.raises(UserError) as told:
        place(model, model_of(), torch.float32, CPU)
    return str(told.value)


@pytest.mark.slow
def test_it_is_sampled_from_restored_and_looked_through_or_refused() -> None:
    world().shard("none")
    tokenizer = bpe()
    encoder = Encoder(tokenizer, data_of())
    policy = Policy.of(llama(len(tokenizer)), encoder, HARDWARE)
    prompts = encoder.prompts([Prompt(text) for text in ("the cat", "a dog", "two")])
    texts = [each.text for each in policy.engine.sample(prompts, Sampling(7), samples=2, seed=3)]
    for found in on_ranks(2, beside_training):
        assert found["texts"] == texts and found["sharded"] and found["restored"]
        assert found["told"].startswith("LlamaForCausalLM cannot be sharded (hardware.shard=none ")
        assert "\n" not in found["told"]
        assert found["bad"] == "model.norm.weight"  # on both ranks, though one has it
