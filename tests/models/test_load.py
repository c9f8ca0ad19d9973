"""Folders in and out: what is loaded is what was saved, and adapters add up."""

import copy
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    RwkvConfig,
    RwkvForCausalLM,
)

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.config.schema.models import FrozenModel
from rlhf_cli.data.batches import collate
from rlhf_cli.folders.manifest import TOKEN
from rlhf_cli.models.decoder import hidden_states, unwrap
from rlhf_cli.models.forward import token_logprobs
from rlhf_cli.models.load import load_policy, load_weights
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.save import save_model, set_stop_ids
from rlhf_cli.models.score import logprobs_of, scores_of, token_scores_of
from rlhf_cli.models.scorers import load_scorer, scorer_from_policy
from rlhf_cli.models.shared import SharedScorer, save_scorer
from rlhf_cli.models.tokenizers import load_tokenizer, stop_ids_of
from tests.toys import FROZEN, bpe, hardware_of, llama, model_of, sequences_of

CPU = torch.device("cpu")
FULL = model_of(lora_rank=0)
LORA = model_of(lora_rank=4, lora_alpha=16.0)
SEQUENCES = sequences_of(6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy folder as another tool would write it."""
    place = tmp_path_factory.mktemp("policy")
    tokenizer = bpe()
    llama(len(tokenizer)).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def policy_of(place: Path, config: FrozenModel) -> Any:
    tokenizer = load_tokenizer(str(place), config)
    return load_policy(str(place), config, tokenizer, CPU)


def loaded(auto: Any, place: Path) -> Any:
    """What a plain transformers user gets: every weight found, none left over."""
    model, info = auto.from_pretrained(place, output_loading_info=True)
    assert not any(info.values()), info
    return model


def outputs(model: nn.Module) -> Tensor:
    """Log-probs of fixed sequences."""
    return torch.cat(logprobs_of(model, SEQUENCES, hardware_of()))


def train(model: nn.Module, steps: int = 5) -> None:
    """A few steps on whatever is trainable."""
    adam = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], 5e-2)
    for _ in range(steps):
        adam.zero_grad()
        (-token_logprobs(model, collate(SEQUENCES), chunk=99).logprobs.sum() / 30).backward()
        adam.step()


def base_weights(model: Any) -> list[Tensor]:
    return [
        weight.detach().clone() for name, weight in model.named_parameters() if "lora_" not in name
    ]


# --------------------------------------------------------------------------- full models


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_folder_makes_the_round_trip(family: str, tmp_path: Path) -> None:
    tokenizer = bpe()
    if family == "llama":
        model: Any = llama(len(tokenizer))
    else:
        size = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64)
        model = GPT2LMHeadModel(size)
    set_stop_ids(model, tokenizer, [2, 5])
    save_model(model, tokenizer, tmp_path, merge=True)
    plain = loaded(AutoModelForCausalLM, tmp_path)
    ours = policy_of(tmp_path, FULL)
    theirs = dict(plain.named_parameters())
    for name, weight in ours.named_parameters():
        assert torch.equal(weight, theirs[name]), name
    assert plain.generation_config.eos_token_id == [2, 5]
    assert plain.generation_config.pad_token_id == tokenizer.pad_token_id
    assert stop_ids_of(str(tmp_path), tokenizer) == [2, 5]
    ids = AutoTokenizer.from_pretrained(tmp_path)("the cat").input_ids
    assert ids == tokenizer("the cat").input_ids


def test_weights_that_a_family_rescales_for_inference_stay_as_they_are(tmp_path: Path) -> None:
    """RWKV halves those of its later blocks in evaluation mode, and they would be written so."""
    tokenizer = bpe()
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 4}
    sizes |= {"rescale_every": 2, "pad_token_id": 0}
    size = RwkvConfig(vocab_size=len(tokenizer), **sizes)
    RwkvForCausalLM(size).save_pretrained(tmp_path / "made")
    tokenizer.save_pretrained(tmp_path / "made")
    model = policy_of(tmp_path / "made", FULL)
    ours = outputs(model)
    save_model(model, tokenizer, tmp_path / "written", merge=False)
    made, written = (loaded(RwkvForCausalLM, tmp_path / each) for each in ("made", "written"))
    for name, weight in made.state_dict().items():
        assert torch.equal(weight, written.state_dict()[name]), name
    ids = torch.tensor([SEQUENCES[0].prompt + SEQUENCES[0].response])
    with torch.no_grad():
        theirs = written(input_ids=ids).logits[0].log_softmax(-1)[:-1]
    theirs = theirs.gather(-1, ids[0, 1:, None])[-len(SEQUENCES[0].response) :, 0]
    torch.testing.assert_close(ours[: len(theirs)], theirs, rtol=0, atol=1e-4)  # its norm's epsilon


def test_dropout_is_off_in_all_that_is_loaded(tmp_path: Path) -> None:
    tokenizer = bpe()
    size: Any = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(
        GPT2Config(**size, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for model in (
        policy_of(tmp_path, FULL),
        policy_of(tmp_path, FROZEN),
        policy_of(tmp_path, LORA),
        scorer_from_policy(str(tmp_path), FULL, tokenizer, 0, CPU),
    ):
        model.train()
        one, other = (model(collate(SEQUENCES[:1]).ids).logits for _ in range(2))
        assert torch.equal(one, other)


def test_missing_weights_are_no_random_weights(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights missing .*layers\.1\.mlp\.up_proj"):
        policy_of(tmp_path, FULL)
    with pytest.raises(UserError, match="no such head .beside the decoder: nothing"):
        load_scorer(str(folder), FROZEN, bpe(), CPU)  # a policy is no reward model


# --------------------------------------------------------------------------- scorers


def test_a_scorer_has_the_policys_trunk_and_a_fresh_head(folder: Path, tmp_path: Path) -> None:
    tokenizer = bpe()
    policy = dict(policy_of(folder, FULL).named_parameters())
    scorer: Any = scorer_from_policy(str(folder), FULL, tokenizer, 7, CPU)
    trunk = {name: weight for name, weight in scorer.named_parameters() if "score" not in name}
    assert trunk and all(torch.equal(weight, policy[name]) for name, weight in trunk.items())
    assert set(policy) - set(trunk) == {"lm_head.weight"}
    again: Any = scorer_from_policy(str(folder), FULL, tokenizer, 7, CPU)
    assert torch.equal(scorer.score.weight, again.score.weight)

    save_model(scorer, tokenizer, tmp_path, merge=True)
    plain = loaded(AutoModelForSequenceClassification, tmp_path)
    ours = load_scorer(str(tmp_path), FROZEN, tokenizer, CPU)
    scores = [scores_of(each, SEQUENCES, hardware_of()) for each in (scorer, plain, ours)]
    torch.testing.assert_close(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])
    critic = load_scorer(str(tmp_path), FULL, tokenizer, CPU)
    assert torch.equal(scores_of(critic, SEQUENCES, hardware_of()), scores[0])


def test_a_scorer_with_an_adapter_makes_the_round_trip(folder: Path, tmp_path: Path) -> None:
    tokenizer = bpe()
    scorer: Any = scorer_from_policy(str(folder), LORA, tokenizer, 7, CPU)
    trainable = {name for name, weight in scorer.named_parameters() if weight.requires_grad}
    assert any("score" in name for name in trainable)  # the head is trained too
    with torch.no_grad():
        for name, weight in scorer.named_parameters():
            if name in trainable:
                weight += 0.1
    save_model(scorer, tokenizer, tmp_path, merge=False)
    assert (tmp_path / "adapter_config.json").exists()
    expected = scores_of(scorer, SEQUENCES, hardware_of())
    for config in (FROZEN, LORA):
        again = load_scorer(str(tmp_path), config, tokenizer, CPU)
        found = scores_of(again, SEQUENCES, hardware_of())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [FULL, LORA], ids=["full", "adapter"])
def test_a_scorer_from_an_adapter_has_the_sum_as_its_trunk(
    config: Any, folder: Path, tmp_path: Path
) -> None:
    policy = policy_of(folder, LORA)
    train(policy)
    save_model(policy, bpe(), tmp_path, merge=False)
    scorer = scorer_from_policy(str(tmp_path), config, bpe(), 7, CPU)
    batch = collate(SEQUENCES)
    ours, theirs = (hidden_states(model, batch)[batch.attention] for model in (scorer, policy))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    head = unwrap(scorer).score
    assert next(head.parameters()).std().item() == pytest.approx(17**-0.5, rel=0.6)
    trained = {name for name, weight in scorer.named_parameters() if weight.requires_grad}
    assert any("score" in name for name in trained)
    assert any("layers" in name for name in trained)


def token_scores(model: nn.Module) -> Tensor:
    """Scores at all response tokens of fixed sequences."""
    return torch.cat(token_scores_of(model, SEQUENCES, hardware_of()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("config", [FULL, LORA], ids=["full", "adapter"])
def test_a_scorer_of_tokens_makes_the_round_trip(family: str, config: Any, tmp_path: Path) -> None:
    """The head has another name in other families, and a plain tool reads it at each token."""
    tokenizer = bpe()
    if family == "llama":
        model: Any = llama(len(tokenizer))
    else:
        size = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2)
        model = GPT2LMHeadModel(size)
    save_model(model, tokenizer, tmp_path / "policy", merge=True)
    scorer: Any = scorer_from_policy(str(tmp_path / "policy"), config, tokenizer, 7, CPU, TOKEN)
    trunk = hidden_states(scorer, collate(SEQUENCES))
    torch.testing.assert_close(trunk, hidden_states(model.eval(), collate(SEQUENCES)))
    before = token_scores(scorer)
    assert before.std() > 0.1
    with torch.no_grad():
        for weight in scorer.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(
                    weight.shape, generator=torch.Generator().manual_seed(0)
                )
    after = token_scores(scorer)
    assert (after - before).abs().max() > 0.1

    for merge in (True, False) if config is LORA else (True,):
        place = tmp_path / f"merge {merge}"
        save_model(scorer, tokenizer, place, merge=merge)
        assert (place / "adapter_config.json").exists() == (not merge)
        (place / "stage.json").write_text('{"kind": "reward", "level": "token"}')
        for again in (FROZEN, FULL if merge else LORA):
            found = token_scores(load_scorer(str(place), again, tokenizer, CPU))
            torch.testing.assert_close(found, after, rtol=1e-4, atol=1e-4)
        if merge:
            plain = loaded(AutoModelForTokenClassification, place).eval()
            logits = [
                plain(collate([each]).ids).logits[0, -len(each.response) :, 0] for each in SEQUENCES
            ]
            torch.testing.assert_close(torch.cat(logits), after, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------- adapters


def test_an_adapter_starts_as_the_base_and_leaves_it_alone(folder: Path) -> None:
    base, adapted = policy_of(folder, FULL), policy_of(folder, LORA)
    assert torch.equal(outputs(base), outputs(adapted))
    before = base_weights(adapted)
    trainable = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    train(adapted)
    assert (outputs(adapted) - outputs(base)).abs().max() > 0.1
    assert all(map(torch.equal, base_weights(adapted), before))


@pytest.mark.parametrize("config", [FULL, LORA], ids=["full", "adapter"])
def test_the_reference_stays_what_it_was(config: Any, folder: Path) -> None:
    model = policy_of(folder, config)
    reference = Reference(model)
    start = outputs(model)
    with reference.active() as frozen:
        assert torch.equal(outputs(frozen), start)
        assert not token_logprobs(frozen, collate(SEQUENCES), chunk=9).logprobs.requires_grad
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert not any("reference" in name for name in trainable)
    train(model)
    with reference.active() as frozen:
        assert torch.equal(outputs(frozen), start)
    after = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert after == trainable  # switching over froze nothing and thawed nothing
    assert (outputs(model) - start).abs().max() > 0.1
    assert reference.digest() == reference.hash
    with torch.no_grad(), reference.active() as frozen:
        next(iter(unwrap(frozen).model.layers[0].mlp.parameters())).add_(1e-6)
    assert reference.digest() != reference.hash


def numbers(model: nn.Module) -> int:
    """How many there are to hold."""
    return sum(weight.numel() for weight in model.parameters())


def test_a_fresh_adapter_is_switched_off_and_a_trained_one_copied(folder: Path) -> None:
    """The weights of the base exist once; the reference is the base to the bit."""
    base, adapted = policy_of(folder, FULL), policy_of(folder, LORA)
    size = numbers(adapted)
    own = size - numbers(base)
    start = outputs(base)
    reference = Reference(adapted)
    assert reference.switched_off and numbers(adapted) == size
    for _ in range(2):  # before and after training
        with reference.active() as frozen:
            assert numbers(frozen) == size
            assert torch.equal(outputs(frozen), start)
        train(adapted)
        assert not torch.equal(outputs(adapted), start)

    trained = outputs(adapted)
    later = Reference(adapted)
    assert not later.switched_off and numbers(adapted) == size + own
    train(adapted)
    with later.active() as frozen:
        torch.testing.assert_close(outputs(frozen), trained, rtol=0, atol=1e-6)
    assert (outputs(adapted) - trained).abs().max() > 0.1
    assert later.digest() == later.hash


def test_another_model_as_a_reference_is_taken_as_it_is(folder: Path) -> None:
    model = policy_of(folder, FULL)
    reference = Reference.of(model)
    assert not reference.switched_off
    with reference.active() as frozen:
        assert frozen is model
    assert not any(weight.requires_grad for weight in model.parameters())
    assert reference.digest() == reference.hash


def test_an_adapter_is_saved_merged_and_continued(folder: Path, tmp_path: Path) -> None:
    tokenizer = bpe()
    adapted = policy_of(folder, LORA)
    Reference(adapted)  # training stages hold one; it must not be saved
    train(adapted)
    expected = outputs(adapted)
    save_model(adapted, tokenizer, tmp_path / "merged", merge=True)
    save_model(adapted, tokenizer, tmp_path / "adapter", merge=False)
    assert torch.equal(outputs(adapted), expected)  # saving changed nothing
    files = {file.name for file in (tmp_path / "adapter").iterdir() if file.is_file()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    assert not any("reference" in path.name for path in tmp_path.rglob("*"))

    plain = loaded(AutoModelForCausalLM, tmp_path / "merged")
    torch.testing.assert_close(outputs(plain), expected, rtol=1e-5, atol=1e-5)
    merged = policy_of(tmp_path / "adapter", FULL)
    assert not hasattr(merged, "peft_config")
    assert all(weight.requires_grad for weight in merged.parameters())
    torch.testing.assert_close(outputs(merged), expected, rtol=1e-5, atol=1e-5)

    # the next stage goes on from base plus adapter, and its reference is that same sum
    going_on = policy_of(tmp_path / "adapter", LORA)
    reference = Reference(going_on)
    with reference.active() as frozen:
        torch.testing.assert_close(outputs(frozen), expected, rtol=0, atol=1e-5)
    train(going_on)
    with reference.active() as frozen:
        torch.testing.assert_close(outputs(frozen), expected, rtol=0, atol=1e-5)
    kept = policy_of(tmp_path / "adapter", model_of(lora_rank=8)).peft_config["default"]
    assert (kept.r, kept.lora_alpha) == (4, 16.0)  # those of its own


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("model.layers", "model.lm.layers"): weights[name] for name in weights}


def halved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the matrices of the upper block."""
    return {name: weights[name] for name in weights if "layers.1." not in name}


def with_another(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """One more than the config targets: of a norm."""
    name = "base_model.model.model.layers.0.input_layernorm.lora_A.weight"
    return {**weights, name: torch.ones(4, 16)}


def headless(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weights[name] for name in weights if ".lora_" in name}


CHANGES = {
    renamed: r"28 tensors missing, such as .*layers\.0.*28 tensors of layers that are.* \S*\.lm\.",
    halved: r"14 tensors missing, such as base_model\.model\.model\.layers\.1",
    with_another: r": 1 tensors of layers that are not there, .*input_layernorm\.lora_A\.weight",
}
WAYS: dict[str, Callable[[Path, Path], object]] = {  # of loading it; the other is the base's
    "merged": lambda place, _: policy_of(place, FULL),
    "continued": lambda place, _: policy_of(place, LORA),
    "as reference": lambda place, _: policy_of(place, FROZEN),
    "as trunk, merged": lambda place, _: scorer_from_policy(str(place), FULL, bpe(), 7, CPU),
    "as trunk, continued": lambda place, _: scorer_from_policy(str(place), LORA, bpe(), 7, CPU),
    "bootstrap": lambda place, base: load_weights(policy_of(base, LORA), str(place), LORA),
}
SCORING: dict[str, Callable[[Path, Path], object]] = {
    "reward": lambda place, _: load_scorer(str(place), FROZEN, bpe(), CPU),
    "critic": lambda place, _: load_scorer(str(place), LORA, bpe(), CPU),
    "on the policy's base": lambda place, base: load_scorer(
        str(place), FROZEN, bpe(), CPU, policy_of(base, LORA)
    ),
}


def change_weights(place: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = place / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", [*WAYS, *SCORING])
def test_every_tensor_of_an_adapter_is_accounted_for(
    way: str, change: Any, folder: Path, tmp_path: Path
) -> None:
    """None that is missing is left as it was drawn, and none that is there is left aside."""
    use = {**WAYS, **SCORING}[way]
    model = (
        policy_of(folder, LORA)
        if way in WAYS
        else scorer_from_policy(str(folder), LORA, bpe(), 7, CPU)
    )
    save_model(model, bpe(), tmp_path, merge=False)
    use(tmp_path, folder)
    change_weights(tmp_path, change)
    with pytest.raises(UserError, match=CHANGES[change]):
        use(tmp_path, folder)


@pytest.mark.parametrize("saved", [True, False], ids=["said", "not said"])
@pytest.mark.parametrize("way", SCORING)
def test_a_reward_adapter_without_its_head_gets_no_random_one(
    way: str, saved: bool, folder: Path, tmp_path: Path
) -> None:
    """Whether or not its config says that the head was saved with it."""
    save_model(scorer_from_policy(str(folder), LORA, bpe(), 7, CPU), bpe(), tmp_path, merge=False)
    change_weights(tmp_path, headless)
    if not saved:
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"modules_to_save": None}))
    with pytest.raises(UserError, match=r"1 weights missing.* score\.weight"):
        SCORING[way](tmp_path, folder)


FOREIGN: dict[str, Any] = {
    "some layers": peft.LoraConfig(target_modules=["q_proj", "v_proj"]),
    "embeddings": peft.LoraConfig(target_modules=["q_proj", "embed_tokens"]),
    "unembedding": peft.LoraConfig(target_modules=["q_proj", "lm_head"]),
    "whole layers": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "magnitudes": peft.LoraConfig(target_modules=["q_proj"], use_dora=True),
    "ranks by layer": peft.LoraConfig(target_modules="all-linear", rank_pattern={"q_proj": 2}),
    "some tokens": peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 4]),
    "vera": peft.VeraConfig(target_modules=["q_proj"]),
    "ia3": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "loha": peft.LoHaConfig(target_modules=["q_proj"]),
}


def foreign_adapter(folder: Path, place: Path, kind: str) -> Any:
    """An adapter as peft alone makes one, all its weights moved."""
    config = copy.deepcopy(FOREIGN[kind])
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(0)
    adapted: Any = peft.get_peft_model(policy_of(folder, FULL), config).eval()
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    save_model(adapted, bpe(), place, merge=False)
    return adapted


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_adapters_of_any_kind_are_loaded_whole(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    theirs = foreign_adapter(folder, tmp_path, kind)
    assert (outputs(theirs) - outputs(policy_of(folder, FULL))).abs().max() > 1e-3
    ways = [FULL]
    if isinstance(FOREIGN[kind], peft.LoraConfig):
        ways.append(model_of(lora_rank=8, lora_alpha=8.0))
    for config in ways:
        torch.testing.assert_close(
            outputs(policy_of(tmp_path, config)), outputs(theirs), rtol=1e-4, atol=1e-4
        )
        mask = collate(SEQUENCES).attention
        scorer = scorer_from_policy(str(tmp_path), config, bpe(), 7, CPU)
        found, expected = (
            hidden_states(each, collate(SEQUENCES))[mask] for each in (scorer, theirs)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["embeddings", "magnitudes"])
def test_the_reference_of_a_foreign_adapter_is_all_of_it(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    theirs = foreign_adapter(folder, tmp_path, kind)
    policy = policy_of(tmp_path, model_of(lora_rank=8, lora_alpha=8.0))
    with Reference(policy).active() as frozen:
        torch.testing.assert_close(outputs(frozen), outputs(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["some layers", "embeddings", "magnitudes"])
def test_a_foreign_reward_adapter_on_the_policys_base_is_all_of_it(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    config = copy.deepcopy(FOREIGN[kind])
    config.task_type, config.modules_to_save = "SEQ_CLS", ["score"]
    base = scorer_from_policy(str(folder), FULL, bpe(), 7, CPU)
    adapted: Any = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    save_model(adapted, bpe(), tmp_path / "reward", merge=False)
    shared: Any = load_scorer(str(tmp_path / "reward"), FROZEN, bpe(), CPU, policy_of(folder, LORA))
    expected = scores_of(adapted, SEQUENCES, hardware_of())
    torch.testing.assert_close(
        scores_of(shared, SEQUENCES, hardware_of()), expected, rtol=1e-4, atol=1e-4
    )
    assert isinstance(shared, SharedScorer)
    (tmp_path / "again").mkdir()
    save_scorer(shared, str(tmp_path / "reward"), tmp_path / "again")
    before, after = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("reward", "again")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_plain_peft_loads_our_adapter(folder: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    adapted = policy_of(folder, LORA)
    train(adapted)
    save_model(adapted, bpe(), tmp_path, merge=False)
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(outputs(theirs), outputs(adapted), rtol=0, atol=1e-5)


def test_an_adapter_keeps_its_kind_of_scale_under_a_new_head(folder: Path, tmp_path: Path) -> None:
    """A rank-stabilised adapter scales by alpha / sqrt(r); the scorer's trunk must as well."""
    policy = policy_of(folder, FULL)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        use_rslora=True,
        lora_dropout=0.5,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    adapted: Any = peft.get_peft_model(policy, config)
    train(adapted)
    save_model(adapted.eval(), bpe(), tmp_path, merge=False)
    trunks = [
        hidden_states(scorer_from_policy(str(tmp_path), each, bpe(), 7, CPU), collate(SEQUENCES))
        for each in (FULL, LORA)  # merged, and continued
    ]
    mask = collate(SEQUENCES).attention
    torch.testing.assert_close(trunks[0][mask], trunks[1][mask], rtol=1e-4, atol=1e-4)


def test_the_dropout_of_a_foreign_adapter_is_off(folder: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=16, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted: Any = peft.get_peft_model(policy_of(folder, FULL), config)
    train(adapted)
    save_model(adapted, bpe(), tmp_path, merge=False)
    again = policy_of(tmp_path, LORA).train()
    assert torch.equal(outputs(again), outputs(again))


def test_an_adapter_folder_names_its_own_eos_ids(folder: Path, tmp_path: Path) -> None:
    tokenizer = bpe(chat=True)
    model = load_policy(str(folder), LORA, tokenizer, CPU)
    eos, turn = (int(tokenizer.convert_tokens_to_ids(each)) for each in ("</s>", "<|end|>"))  # type: ignore[arg-type]
    set_stop_ids(model, tokenizer, [eos, turn])
    save_model(model, tokenizer, tmp_path, merge=False)
    assert stop_ids_of(str(tmp_path), tokenizer) == [eos, turn]


def test_bfloat16_loads_and_scores_near_float32(folder: Path, tmp_path: Path) -> None:
    half = policy_of(folder, model_of(dtype="bfloat16"))
    exact = outputs(policy_of(folder, FULL))
    assert not torch.equal(outputs(half), exact)
    torch.testing.assert_close(outputs(half), exact, rtol=0.1, atol=0.1)
    scorer = scorer_from_policy(str(folder), model_of(dtype="bfloat16"), bpe(), 7, CPU)
    scores = scores_of(scorer, sequences_of(40), hardware_of())
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())  # the head does not round to ties


def test_an_added_pad_token_is_never_likely(folder: Path, tmp_path: Path) -> None:
    """Logits far below zero would make a random row, whose logit is near zero, certain."""
    tokenizer = bpe()
    model = llama(len(tokenizer), tie_word_embeddings=False)
    with torch.no_grad():  # every logit about -30, as in some pretrained models
        model.model.norm.weight.fill_(1.0)
        direction = torch.ones(model.config.hidden_size)
        model.lm_head.weight.mul_(0.1)
        model.model.embed_tokens.weight.add_(direction)
        hidden = model.model(torch.tensor([[5]])).last_hidden_state[0, 0]
        model.lm_head.weight.sub_(30 * hidden / hidden.norm() ** 2)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<added>"]})
    grown: Any = load_policy(str(tmp_path), FULL, tokenizer, CPU)
    probabilities = grown(torch.tensor([[5]])).logits[0, -1].softmax(-1)
    assert probabilities[-1] < 0.1


# --------------------------------------------------------------------------- bad weights, no room


def spoilt(place: Path, file: str, name: str, bad: float) -> str:
    """Put a bad number into a weight of a folder; returns the weight's name there."""
    weights = load_file(place / file)
    (found,) = [each for each in weights if each.endswith(name)]
    weights[found].view(-1)[-1] = bad
    save_file(weights, place / file, {"format": "pt"})
    return found


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(folder: Path, tmp_path: Path, bad: float) -> None:
    """Of a policy, and of a policy whose trunk a scorer would take."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    name = spoilt(tmp_path, "model.safetensors", "layers.1.mlp.up_proj.weight", bad)
    line = re.escape(f"{tmp_path}: weight {name} holds a NaN or an infinity")
    with pytest.raises(UserError, match=line):
        policy_of(tmp_path, FULL)
    with pytest.raises(UserError, match=line):
        scorer_from_policy(str(tmp_path), FULL, bpe(), 7, CPU)


@pytest.mark.parametrize("config", [FULL, LORA, FROZEN], ids=["merged", "continued", "frozen"])
def test_an_adapter_that_is_not_finite_is_refused(
    folder: Path, tmp_path: Path, config: FrozenModel
) -> None:
    save_model(policy_of(folder, LORA), bpe(), tmp_path, merge=False)
    spoilt(tmp_path, "adapter_model.safetensors", "layers.0.mlp.up_proj.lora_B.weight", math.nan)
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj\.lora_B\.weight holds a NaN"):
        policy_of(tmp_path, config)


def test_a_reward_adapter_that_is_not_finite_is_refused_on_a_shared_base(
    folder: Path, tmp_path: Path
) -> None:
    save_model(scorer_from_policy(str(folder), LORA, bpe(), 7, CPU), bpe(), tmp_path, merge=False)
    spoilt(tmp_path, "adapter_model.safetensors", "score.weight", math.nan)
    with pytest.raises(UserError, match="score.weight holds a NaN"):
        load_scorer(str(tmp_path), FROZEN, bpe(), CPU, policy_of(folder, LORA))


def test_a_model_that_does_not_fit_says_how_large_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = sum(each.numel() for each in load_file(folder / "model.safetensors").values())

    def full(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    line = re.escape(f"out of memory while loading {folder}: {count} weights x 4 bytes = 0.00 GiB")
    with pytest.raises(RunError, match=line):
        policy_of(folder, FULL)
