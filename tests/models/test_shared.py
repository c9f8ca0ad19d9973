"""Four roles on one base, frozen layers that two models share: nobody moves another's weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.data.batches import collate
from rlhf_cli.folders.manifest import RESPONSE, TOKEN
from rlhf_cli.models.adapters import trained
from rlhf_cli.models.forward import response_scores, state_values, token_logprobs
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.recompute import recompute_activations
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.save import save_model
from rlhf_cli.models.score import logprobs_of, scores_of, token_scores_of, values_of
from rlhf_cli.models.scorers import load_critic, load_scorer, scorer_from_policy
from rlhf_cli.models.shared import SharedScorer
from tests.model_families import build
from tests.model_families import model_of as family_of
from tests.toys import FROZEN, bpe, hardware_of, llama, model_of, sequences_of

CPU = torch.device("cpu")
FULL = model_of(lora_rank=0)
LORA = model_of(lora_rank=4, lora_alpha=16.0)
SEQUENCES = sequences_of(6)
BATCH = collate(SEQUENCES)
HARDWARE = hardware_of()
TOKENIZER = bpe()


def base_of(family: str) -> Any:
    """A random language model."""
    if family == "llama":
        return llama(len(TOKENIZER))
    torch.manual_seed(0)
    size = GPT2Config(vocab_size=len(TOKENIZER), n_embd=16, n_layer=2, n_head=2, n_positions=64)
    return GPT2LMHeadModel(size)


def disturb(weights: Any, seed: int = 0, size: float = 0.1) -> None:
    """Move weights as training would."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in weights:
            weight += size * torch.randn(weight.shape, generator=draw)


def make_folders(place: Path, family: str = "llama", level: str = RESPONSE) -> tuple[str, str]:
    """A policy folder, and a reward model that is an unmerged adapter on it."""
    policy, reward = place / "policy", place / "reward"
    save_model(base_of(family), TOKENIZER, policy, merge=True)
    scorer = scorer_from_policy(str(policy), LORA, TOKENIZER, 7, CPU, level)
    disturb(trained(scorer).values())
    save_model(scorer, TOKENIZER, reward, merge=False)
    (reward / "stage.json").write_text(json.dumps({"kind": "reward", "level": level}))
    return str(policy), str(reward)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_folders(tmp_path_factory.mktemp("shared"))


def policy_of(path: str, config: Any = LORA) -> Any:
    torch.manual_seed(3)  # fresh adapters are drawn
    return load_policy(path, config, TOKENIZER, CPU)


def critic_of(reward: str | None, path: str, policy: nn.Module, config: Any = LORA) -> nn.Module:
    return load_critic(reward, path, config, TOKENIZER, 5, CPU, policy)


def outputs(model: nn.Module) -> Tensor:
    return torch.cat(logprobs_of(model, SEQUENCES, HARDWARE))


def scores(model: nn.Module) -> Tensor:
    return scores_of(model, SEQUENCES, HARDWARE)


def values(model: nn.Module) -> Tensor:
    return torch.cat(values_of(model, SEQUENCES, HARDWARE))


def numbers(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


# --------------------------------------------------------------------------- one base


@pytest.mark.parametrize("level", [RESPONSE, TOKEN])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_reward_adapter_scores_on_the_policys_base_as_it_does_alone(
    family: str, level: str, tmp_path: Path
) -> None:
    path, reward_path = make_folders(tmp_path, family, level)
    alone = load_scorer(reward_path, FROZEN, TOKENIZER, CPU)
    policy = policy_of(path)
    before, size = outputs(policy), numbers(policy)
    shared = load_scorer(reward_path, FROZEN, TOKENIZER, CPU, policy).requires_grad_(False)
    assert isinstance(shared, SharedScorer)
    for model in (shared, load_scorer(reward_path, FROZEN, TOKENIZER, CPU, policy)):  # and another
        assert isinstance(model, SharedScorer)
        torch.testing.assert_close(scores(model), scores(alone), rtol=1e-5, atol=1e-6)
        ours, theirs = (
            torch.cat(token_scores_of(each, SEQUENCES, HARDWARE)) for each in (model, alone)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert set(policy.peft_config) == {"default", "reward", "reward2"}
    assert torch.equal(outputs(policy), before)
    assert numbers(policy) < 2 * size  # a few matrices of rank 4 more; the base is there once
    assert scores(alone).std() > 0.01
    assert not any(weight.requires_grad for weight in shared.parameters())


def test_each_role_trains_its_own_weights_and_moves_no_other(folders: tuple[str, str]) -> None:
    path, reward_path = folders
    policy = policy_of(path)
    start = outputs(policy)
    reference = Reference(policy)
    reward = load_scorer(reward_path, FROZEN, TOKENIZER, CPU, policy).requires_grad_(False)
    critic = critic_of(reward_path, path, policy)
    assert isinstance(critic, SharedScorer)
    assert torch.equal(scores(critic), scores(reward))  # it starts as a copy
    assert torch.equal(outputs(policy), start)

    ours, theirs = trained(policy), trained(critic)
    assert ours and theirs
    assert not {id(each) for each in ours.values()} & {id(each) for each in theirs.values()}
    assert all(".default." in name for name in ours)
    assert any("score" in name for name in theirs)
    fixed = {
        name: weight.detach().clone()
        for name, weight in policy.named_parameters()
        if ".default." not in name and ".critic." not in name
    }
    first_scores, first_values = scores(reward), values(critic)

    adam = torch.optim.AdamW([*ours.values(), *theirs.values()], 2e-2)
    for _ in range(4):
        adam.zero_grad()
        scored = token_logprobs(policy, BATCH, chunk=4, reference=reference)
        assert scored.kl is not None
        loss = (state_values(critic, BATCH) - 3).square().mean() + scored.kl.sum()
        loss = loss - scored.logprobs.sum() / 20
        with torch.no_grad():
            response_scores(reward, BATCH)  # a switch between forward and backward loses nothing
        loss.backward()
        touched = [each for each in (*ours.values(), *theirs.values()) if each.grad is None]
        assert not touched
        adam.step()

    assert (outputs(policy) - start).abs().max() > 0.01
    assert (values(critic) - first_values).abs().max() > 0.01
    assert torch.equal(scores(reward), first_scores)
    with reference.active() as frozen:
        assert torch.equal(outputs(frozen), start)
    assert reference.digest() == reference.hash
    now = dict(policy.named_parameters())
    assert all(torch.equal(now[name], weight) for name, weight in fixed.items())
    assert set(trained(policy)) == set(ours) and set(trained(critic)) == set(theirs)


def test_policy_and_critic_learn_what_they_learn_apart(folders: tuple[str, str]) -> None:
    """Gradients on a shared base are those of the policy alone and of the critic alone."""
    path, reward_path = folders
    policy, lonely = policy_of(path), policy_of(path)
    for each in (policy, lonely):
        disturb(trained(each).values(), seed=1)
    critic = critic_of(reward_path, path, policy)
    alone: Any = load_scorer(reward_path, LORA, TOKENIZER, CPU)

    loss = token_logprobs(policy, BATCH, chunk=9).logprobs.sum()
    (loss + state_values(critic, BATCH).sum()).backward()
    token_logprobs(lonely, BATCH, chunk=9).logprobs.sum().backward()
    state_values(alone, BATCH).sum().backward()
    for ours, theirs in ((policy, lonely), (critic, alone)):
        torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=1e-4, atol=1e-5)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Those of the trained weights, by names that do not tell where an adapter lies."""
    found = {}
    for name, weight in trained(model).items():
        place = name.replace("/", ".").replace(".default.", ".").removeprefix("weights.")
        found["score" if ".score." in f".{place}" else place] = weight.grad
    assert all(each is not None for each in found.values())
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recomputed_activations_are_those_of_the_adapter_that_acted(
    family: str, tmp_path: Path
) -> None:
    """Backward runs when the policy acts again; the critic's blocks must not be recomputed by it"""
    path, reward_path = make_folders(tmp_path, family)
    found = []
    for recompute in (False, True):
        policy = policy_of(path)
        disturb(trained(policy).values(), seed=1)
        reference = Reference(policy)
        critic = critic_of(reward_path, path, policy)
        disturb(trained(policy).values(), seed=2)
        if recompute:
            recompute_activations(policy)
            recompute_activations(critic)
        scored = token_logprobs(policy, BATCH, chunk=2, reference=reference)
        assert scored.kl is not None
        loss = scored.logprobs.sum() + scored.kl.sum() + state_values(critic, BATCH).sum()
        for _ in range(2):  # a graph that is kept is recomputed twice
            loss.backward(retain_graph=True)
        weights = [*trained(policy).values(), *trained(critic).values()]
        found.append([weight.grad for weight in weights])
        assert policy.acting == ["default"]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_recomputation_leaves_layers_below_the_trained_ones_out(folders: tuple[str, str]) -> None:
    policy = policy_of(folders[0], model_of(frozen_layers=1))
    recompute_activations(policy)
    passes = [0, 0]

    def count(block: int) -> Any:
        def hook(*_: Any) -> None:
            passes[block] += 1

        return hook

    for i, block in enumerate(policy.model.layers):
        block.mlp.register_forward_pre_hook(count(i))
    token_logprobs(policy, BATCH, chunk=9).logprobs.sum().backward()
    assert passes == [1, 2]


def test_a_critic_without_a_reward_model_starts_as_the_policy_with_values_of_zero(
    folders: tuple[str, str], tmp_path: Path
) -> None:
    path, _ = folders
    trained_before = policy_of(path)
    disturb(trained(trained_before).values())
    save_model(trained_before, TOKENIZER, tmp_path, merge=False)
    for start in (path, str(tmp_path)):  # a fresh adapter, and one that goes on
        policy = policy_of(start)
        critic = critic_of(None, start, policy)
        assert isinstance(critic, SharedScorer)
        assert (values(critic) == 0).all()
        ours = policy.base_model.model.model(BATCH.ids).last_hidden_state
        theirs = critic.trunk(input_ids=BATCH.ids).last_hidden_state
        assert torch.equal(ours, theirs)
        assert all(weight.requires_grad for weight in critic.parameters())


def test_only_the_policys_adapter_is_saved(folders: tuple[str, str], tmp_path: Path) -> None:
    path, reward_path = folders
    policy = policy_of(path)
    disturb(trained(policy).values())
    expected = outputs(policy)
    Reference(policy)
    load_scorer(reward_path, FROZEN, TOKENIZER, CPU, policy)
    critic_of(reward_path, path, policy)
    save_model(policy, TOKENIZER, tmp_path / "adapter", merge=False)
    save_model(policy, TOKENIZER, tmp_path / "merged", merge=True)
    folders_inside = [file for file in (tmp_path / "adapter").iterdir() if file.is_dir()]
    assert not folders_inside
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == len(trained(policy))
    assert torch.equal(outputs(policy), expected)
    torch.testing.assert_close(outputs(policy_of(str(tmp_path / "adapter"))), expected)
    merged = policy_of(str(tmp_path / "merged"), FULL)
    torch.testing.assert_close(outputs(merged), expected, rtol=1e-4, atol=1e-5)


def test_a_reward_model_of_its_own_base_keeps_its_own_weights(
    folders: tuple[str, str], tmp_path: Path
) -> None:
    path, reward_path = folders
    twin = tmp_path / "twin"  # the same weights elsewhere are the same base
    shutil.copytree(path, twin)
    shared = load_scorer(reward_path, FROZEN, TOKENIZER, CPU, policy_of(str(twin)))
    assert isinstance(shared, SharedScorer)

    other = tmp_path / "other"
    save_model(llama(len(TOKENIZER), seed=9), TOKENIZER, other, merge=True)
    full = tmp_path / "full"
    save_model(scorer_from_policy(path, FULL, TOKENIZER, 7, CPU), TOKENIZER, full, merge=True)
    for policy, reward in ((policy_of(str(other)), reward_path), (policy_of(path), str(full))):
        own = load_scorer(reward, FROZEN, TOKENIZER, CPU, policy)
        assert not isinstance(own, SharedScorer)
        assert set(policy.peft_config) == {"default"}
        alone = load_scorer(reward, FROZEN, TOKENIZER, CPU)
        assert torch.equal(scores(own), scores(alone))


# --------------------------------------------------------------------------- frozen layers


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_frozen_layers_get_no_gradient_and_do_not_move(family: str, tmp_path: Path) -> None:
    config = model_of(frozen_layers=1)
    save_model(base_of(family), TOKENIZER, tmp_path, merge=True)
    policy = policy_of(str(tmp_path), config)
    frozen = {
        name: weight.clone()
        for name, weight in policy.named_parameters()
        if any(part in name for part in ("embed_tokens", "layers.0.", "wte", "wpe", "h.0."))
    }
    assert len(frozen) > 8
    assert set(frozen) == set(dict(policy.named_parameters())) - set(trained(policy))
    reference = Reference(policy)
    start = outputs(policy)
    adam = torch.optim.AdamW(trained(policy).values(), 1e-2, weight_decay=0.1)
    for _ in range(3):
        (-token_logprobs(policy, BATCH, chunk=9).logprobs.sum()).backward()
        adam.step()
    now = dict(policy.named_parameters())
    for name, weight in frozen.items():
        assert now[name].grad is None, name
        assert torch.equal(now[name], weight), name
    assert all(weight.grad is not None for weight in trained(policy).values())

    # the reference is what it was; it holds the policy's own frozen tensors and copies of the rest
    with reference.active() as model:
        assert torch.equal(outputs(model), start)
        held = dict(model.named_parameters())
    assert {name for name in held if held[name] is now[name]} == set(frozen)
    assert reference.digest() == reference.hash

    critic = critic_of(None, str(tmp_path), policy, config)
    shared = {name for name, weight in critic.named_parameters() if weight is now.get(name)}
    assert shared == set(frozen)
    assert set(trained(critic)) == set(dict(critic.named_parameters())) - shared


def test_more_frozen_layers_than_blocks_are_refused(folders: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="model.frozen_layers=3, but the model has 2 blocks"):
        policy_of(folders[0], model_of(frozen_layers=3))
    with pytest.raises(UserError, match="set model.frozen_layers=0"):
        compose("dpo", ["model=lora", "model.frozen_layers=1"])
    with pytest.raises(UserError, match="from scratch trains all layers"):
        compose("sft", ["model=tiny", "model.frozen_layers=1"])


def test_the_lowest_blocks_are_frozen_whatever_else_there_are_as_many_of(tmp_path: Path) -> None:
    build("longcat_flash", tmp_path, num_hidden_layers=2)  # a block has two layers of attention
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    blocks = len(model.model.layers)  # 1, or 2: versions count differently
    refusal = f"model.frozen_layers={blocks + 1}, but the model has {blocks} blocks"
    with pytest.raises(UserError, match=refusal):
        policy_of(str(tmp_path), model_of(frozen_layers=blocks + 1))
    policy = policy_of(str(tmp_path), model_of(frozen_layers=blocks))
    assert set(trained(policy)) == {"model.norm.weight", "lm_head.weight"}


def test_a_family_that_recomputes_nothing_is_refused(tmp_path: Path) -> None:
    model: Any = family_of("llama")
    model.supports_gradient_checkpointing = False  # as of GPT, CTRL, JetMoE
    with pytest.raises(UserError, match="LlamaForCausalLM cannot compute its blocks again"):
        recompute_activations(model)


def test_a_tied_unembedding_is_frozen_with_the_embeddings(tmp_path: Path) -> None:
    tied = llama(len(TOKENIZER), tie_word_embeddings=True)
    save_model(tied, TOKENIZER, tmp_path, merge=True)
    policy = policy_of(str(tmp_path), model_of(frozen_layers=1))
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    assert not policy.lm_head.weight.requires_grad
    with Reference(policy).active() as frozen:
        theirs: Any = frozen
        assert theirs.lm_head.weight is policy.lm_head.weight
