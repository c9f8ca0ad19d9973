"""Adapters of every kind, ours and those of others: continued, merged, stacked, beside roles."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.data.batches import collate
from rlhf_cli.models.adapter_folders import WEIGHTS
from rlhf_cli.models.adapters import trained
from rlhf_cli.models.forward import state_values, token_logprobs
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.save import save_model
from rlhf_cli.models.score import logprobs_of, scores_of
from rlhf_cli.models.scorers import load_critic, load_scorer, scorer_from_policy
from rlhf_cli.models.shared import SharedScorer
from tests.toys import FROZEN, bpe, composed, hardware_of, llama, model_of, sequences_of

CPU = torch.device("cpu")
FULL = model_of(lora_rank=0)
LORA = model_of(lora_rank=4, lora_alpha=16.0)
SEQUENCES = sequences_of(6)
BATCH = collate(SEQUENCES)
TOKENIZER = bpe()

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"lora_dropout": 0.5},
    "rank-stabilised": {"use_rslora": True},
    "dora": {"use_dora": True, "lora_dropout": 0.3},
    "all biases": {"bias": "all"},
    "biases of LoRA's layers": {"bias": "lora_only"},
    "biases of its own": {"lora_bias": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.*v_proj": 3}},
    "one layer": {"layers_to_transform": [1]},
    "but one": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "whole ends": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "some tokens": {"trainable_token_indices": [3, 4]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "unembedding": {"target_modules": ["q_proj", "lm_head"]},
    "pissa": {"init_lora_weights": "pissa"},
    "no task": {"task_type": None},
}


def base_folder(place: Path, tied: bool) -> str:
    llama(len(TOKENIZER), attention_bias=True, tie_word_embeddings=tied).save_pretrained(place)
    TOKENIZER.save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """A policy folder, its ends tied or not."""
    return {tied: base_folder(tmp_path_factory.mktemp("base"), tied) for tied in (False, True)}


def disturb(weights: Any, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in weights:
            weight += 0.1 * torch.randn(weight.shape, generator=draw)


def foreign(base: str, place: Path, settings: dict[str, Any], rows: int | None = None) -> Any:
    """An adapter folder as peft alone writes one, all its weights moved, and its model.

    Args:
        rows: to which the base's embeddings are resized first.
    """
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows)
    whole = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], **settings}
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", **whole})
    adapted: Any = peft.get_peft_model(model, config).eval()
    disturb(weight for weight in adapted.parameters() if weight.requires_grad)
    adapted.save_pretrained(place)
    TOKENIZER.save_pretrained(place)
    return adapted


def policy_of(path: str | Path, config: Any = LORA) -> Any:
    torch.manual_seed(3)
    return load_policy(str(path), config, TOKENIZER, CPU)


def outputs(model: nn.Module) -> Tensor:
    return torch.cat(logprobs_of(model, SEQUENCES, hardware_of()))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=BATCH.ids, attention_mask=BATCH.attention.long()).logits
    return found[BATCH.attention]


def same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4)


TIED = ("whole ends", "some tokens", "embeddings", "unembedding")
QUICK = (("dora", False), ("whole ends", True))
CASES = [*((kind, False) for kind in KINDS), *((kind, True) for kind in TIED)]


@pytest.mark.parametrize(
    ("kind", "tied"),
    [pytest.param(*each, marks=[] if each in QUICK else pytest.mark.slow) for each in CASES],
)
def test_a_foreign_adapter_goes_on_beside_its_roles(
    kind: str, tied: bool, bases: dict[bool, str], tmp_path: Path
) -> None:
    theirs = foreign(bases[tied], tmp_path / "theirs", KINDS[kind])
    expected = logits(theirs)
    assert not same(expected, logits(policy_of(bases[tied], FULL)))

    policy = policy_of(tmp_path / "theirs")
    policy.train()  # as under recomputation: no dropout all the same
    assert same(logits(policy), expected)
    start = outputs(policy)
    reference = Reference(policy)
    critic = load_critic(None, str(tmp_path / "theirs"), LORA, TOKENIZER, 5, CPU, policy)
    critic.train()
    with reference.active() as frozen:
        assert torch.equal(outputs(frozen), start)
    assert torch.equal(outputs(policy), start)
    assert not {id(each) for each in trained(policy).values()} & {
        id(each) for each in trained(critic).values()
    }
    fixed = {name: weight.detach().clone() for name, weight in policy.named_parameters()}

    adam = torch.optim.SGD(trained(critic).values(), 1e-2)
    for _ in range(2):  # of a fresh head the first step moves the head alone
        adam.zero_grad()
        (state_values(critic, BATCH) - 3).square().mean().backward()
        adam.step()
    assert torch.equal(outputs(policy), start)
    for name, weight in policy.named_parameters():
        assert "critic" in name.split(".") or torch.equal(weight, fixed[name]), name

    token_logprobs(policy, BATCH, chunk=9, reference=reference).logprobs.sum().backward()
    torch.optim.SGD(trained(policy).values(), 1e-2).step()
    assert not same(outputs(policy), start)
    with reference.active() as frozen:
        assert torch.equal(outputs(frozen), start)
    assert reference.digest() == reference.hash

    save_model(policy, TOKENIZER, tmp_path / "ours", merge=False)
    plain: Any = AutoModelForCausalLM.from_pretrained(bases[tied], dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "ours")
    assert same(logits(again), logits(policy.eval()))
    assert set(load_file(tmp_path / "ours" / WEIGHTS)) <= set(
        load_file(tmp_path / "theirs" / WEIGHTS)
    )
    assert same(logits(policy_of(tmp_path / "ours")), logits(policy))
    save_model(policy, TOKENIZER, tmp_path / "merged", merge=True)
    assert same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(policy))


RESIZED = {
    **{kind: KINDS[kind] for kind in ("plain", "whole ends", "some tokens")},
    "whole input": {"modules_to_save": ["embed_tokens"]},
    "both ends": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        pytest.param(kind, tied, marks=[] if (kind, tied) == QUICK[1] else pytest.mark.slow)
        for kind in RESIZED
        for tied in (False, True)
    ],
)
def test_an_adapter_of_a_model_that_was_resized(
    kind: str, tied: bool, bases: dict[bool, str], tmp_path: Path
) -> None:
    """Of added tokens and padding peft writes whole embeddings, some of them twice."""
    theirs = foreign(bases[tied], tmp_path / "theirs", RESIZED[kind], rows=len(TOKENIZER) + 7)
    policy = policy_of(tmp_path / "theirs")
    assert same(logits(policy), logits(theirs))
    disturb(trained(policy).values())
    save_model(policy, TOKENIZER, tmp_path / "ours", merge=False)
    names = set(load_file(tmp_path / "ours" / WEIGHTS))
    assert names <= set(load_file(tmp_path / "theirs" / WEIGHTS))
    assert kind != "whole ends" or not [name for name in names if ".modules_to" in name]
    assert same(logits(policy_of(tmp_path / "ours")), logits(policy))
    plain: Any = AutoModelForCausalLM.from_pretrained(bases[tied], dtype=torch.float32)
    plain.resize_token_embeddings(len(TOKENIZER) + 7)
    again: Any = peft.PeftModel.from_pretrained(plain, tmp_path / "ours")
    assert same(logits(again), logits(policy))
    assert same(logits(policy_of(tmp_path / "theirs", FULL)), logits(theirs))


def test_biases_of_matrices_are_kept_or_refused(bases: dict[bool, str], tmp_path: Path) -> None:
    kind = KINDS["biases of its own"]
    foreign(bases[False], tmp_path / "theirs", kind)
    with pytest.raises(UserError, match="stack adds up plain LoRA"):
        policy_of(tmp_path / "theirs", model_of(lora_rank=4, adapter="stack"))
    llama(len(TOKENIZER)).save_pretrained(tmp_path / "without")
    TOKENIZER.save_pretrained(tmp_path / "without")
    theirs = foreign(str(tmp_path / "without"), tmp_path / "alone", kind)
    apart = model_of(lora_rank=4, merge_lora=False)
    assert same(logits(policy_of(tmp_path / "alone", apart)), logits(theirs))
    for config in (FULL, model_of(lora_rank=4, merge_lora=True)):  # before any work
        with pytest.raises(UserError, match="q_proj has none to merge them into"):
            policy_of(tmp_path / "alone", config)


# --------------------------------------------------------------------------- fresh ones

FRESH: dict[str, dict[str, Any]] = {
    "all linear": {},
    "names": {"lora_targets": ["q_proj", "layers.1.mlp.up_proj"]},
    "one name": {"lora_targets": "q_proj"},
    "a pattern": {"lora_targets": r".*\.1\..*_proj"},
    "dora, rslora": {"use_dora": True, "use_rslora": True},
    "whole": {"modules_to_save": ["embed_tokens"], "lora_targets": ["q_proj"]},
}
LAYERS = dict(zip(FRESH, (14, 3, 2, 7, 14, 2), strict=True))


@pytest.mark.parametrize(
    "kind",
    [pytest.param(each, marks=[] if each == "whole" else pytest.mark.slow) for each in FRESH],
)
def test_plain_peft_reads_what_was_trained(
    kind: str, bases: dict[bool, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = policy_of(bases[True], model_of(lora_rank=4, lora_alpha=16.0, **FRESH[kind]))
    assert f"on {LAYERS[kind]} layers" in capsys.readouterr().err
    reference = Reference(policy)
    assert reference.switched_off == (kind != "dora, rslora")
    with reference.active() as frozen:
        torch.testing.assert_close(outputs(frozen), outputs(policy), rtol=0, atol=1e-5)
    disturb(trained(policy).values())
    save_model(policy, TOKENIZER, tmp_path, merge=False)
    plain = AutoModelForCausalLM.from_pretrained(bases[True], dtype=torch.float32)
    again: Any = peft.PeftModel.from_pretrained(plain, tmp_path)
    assert same(logits(again), logits(policy))
    save_model(policy, TOKENIZER, tmp_path / "merged", merge=True)
    assert same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(policy))


def test_dropout_of_sft_is_drawn_in_its_updates_alone(
    bases: dict[bool, str], tmp_path: Path
) -> None:
    words = ["model=pretrained_lora", "model.lora_rank=4", "model.lora_dropout=0.5"]
    policy = policy_of(bases[False], compose("sft", words).model)
    disturb(trained(policy).values())
    still = outputs(policy)
    assert torch.equal(outputs(policy), still)  # evaluation, rollouts, scores
    policy.train()
    drawn = []
    for step in (1, 1, 2):
        torch.manual_seed(step)
        drawn.append(token_logprobs(policy, BATCH, chunk=99).logprobs.sum().item())
    assert drawn[0] == drawn[1] != drawn[2]
    save_model(policy, TOKENIZER, tmp_path, merge=False)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.5
    again = policy_of(tmp_path).train()  # in the next stage there is none
    assert same(outputs(again), still) and torch.equal(outputs(again), outputs(again))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"lora_targets": ["q_porj"]},
            "model.lora_targets: no layer is called q_porj; there ",
        ),
        ({"lora_targets": "q_proj|v_proj"}, "matches the whole name of no layer; one is model.lay"),
        ({"lora_targets": "*"}, "no regular expression: nothing to repeat"),
        ({"modules_to_save": ["lm_haed"]}, "model.modules_to_save: no module is called lm_haed"),
    ],
)
def test_targets_that_are_not_there(
    changes: dict[str, Any], line: str, bases: dict[bool, str]
) -> None:
    with pytest.raises(UserError, match=re.escape(line)):
        policy_of(bases[False], model_of(lora_rank=4, **changes))


# --------------------------------------------------------------------------- stacked, merged


def test_a_stack_is_written_as_one_plain_adapter(bases: dict[bool, str], tmp_path: Path) -> None:
    theirs = foreign(bases[False], tmp_path / "theirs", KINDS["patterns"])
    targets = ["q_proj", "up_proj"]
    config = model_of(lora_rank=4, lora_alpha=16.0, adapter="stack", lora_targets=targets)
    policy = policy_of(tmp_path / "theirs", config)
    assert same(logits(policy), logits(theirs))
    start = outputs(policy)
    reference = Reference(policy)
    critic: Any = load_critic(None, str(tmp_path / "theirs"), config, TOKENIZER, 5, CPU, policy)
    with torch.no_grad(), reference.active() as frozen:
        assert torch.equal(outputs(frozen), start)
        ours = policy.base_model.model.model(BATCH.ids).last_hidden_state
        assert torch.equal(critic.trunk(input_ids=BATCH.ids).last_hidden_state, ours)
    assert not any("below" in name for name in trained(policy))
    disturb(trained(policy).values())
    assert not same(outputs(policy), start)
    with reference.active() as frozen:
        assert torch.equal(outputs(frozen), start)
    assert reference.digest() == reference.hash
    reference.refresh()
    with reference.active() as frozen:
        assert torch.equal(outputs(frozen), outputs(policy))

    save_model(policy, TOKENIZER, tmp_path / "sum", merge=False)
    plain = AutoModelForCausalLM.from_pretrained(bases[False], dtype=torch.float32)
    again: Any = peft.PeftModel.from_pretrained(plain, tmp_path / "sum")
    assert same(logits(again), logits(policy))
    assert set(again.peft_config) == {"default"}
    assert same(logits(policy_of(tmp_path / "sum")), logits(policy))  # and it goes on
    save_model(policy, TOKENIZER, tmp_path / "merged", merge=True)
    assert same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(policy))


def scorer_folder(scorer: Any, place: Path) -> str:
    """A reward folder of an adapted scorer, its weights moved."""
    disturb(trained(scorer).values())
    save_model(scorer, TOKENIZER, place, merge=False)
    (place / "stage.json").write_text('{"kind": "reward"}')
    return str(place)


def scores(model: nn.Module) -> Tensor:
    return scores_of(model, SEQUENCES, hardware_of())


@pytest.mark.slow
def test_a_reward_model_is_stacked_on_a_policys_adapter(
    bases: dict[bool, str], tmp_path: Path
) -> None:
    foreign(bases[False], tmp_path / "theirs", {})
    config = model_of(lora_rank=4, adapter="stack")
    scorer = scorer_from_policy(str(tmp_path / "theirs"), config, TOKENIZER, 7, CPU)
    path = scorer_folder(scorer, tmp_path / "reward")
    assert scores(scorer).std() > 0.01
    assert same(scores(load_scorer(path, FROZEN, TOKENIZER, CPU)), scores(scorer))
    shared = load_scorer(path, FROZEN, TOKENIZER, CPU, policy_of(bases[False]))
    assert isinstance(shared, SharedScorer)
    assert same(scores(shared), scores(scorer))


@pytest.mark.slow
def test_embeddings_that_a_policy_brings_along_are_not_lent(
    bases: dict[bool, str], tmp_path: Path
) -> None:
    reward = scorer_from_policy(bases[False], LORA, TOKENIZER, 7, CPU)
    path = scorer_folder(reward, tmp_path / "reward")
    theirs = foreign(bases[False], tmp_path / "theirs", {}, rows=len(TOKENIZER) + 7)
    disturb(theirs.get_input_embeddings().parameters())
    theirs.save_pretrained(tmp_path / "theirs")
    policy = policy_of(tmp_path / "theirs", model_of(lora_rank=4, merge_lora=False))
    expected = scores(reward)
    assert same(scores(load_scorer(path, FROZEN, TOKENIZER, CPU, policy)), expected)


@pytest.mark.slow
def test_a_fresh_adapter_over_a_merged_one_lends_its_base_to_no_other(
    bases: dict[bool, str], tmp_path: Path
) -> None:
    theirs = foreign(bases[False], tmp_path / "theirs", {})
    reward = scorer_from_policy(bases[False], LORA, TOKENIZER, 7, CPU)
    path = scorer_folder(reward, tmp_path / "reward")
    config = model_of(lora_rank=4, adapter="merge", merge_lora=True)
    policy = policy_of(tmp_path / "theirs", config)
    assert same(logits(policy), logits(theirs))
    assert Reference(policy).switched_off  # the reference is the sum that was merged
    found = load_scorer(path, FROZEN, TOKENIZER, CPU, policy)
    assert not isinstance(found, SharedScorer)
    assert same(scores(found), scores(reward))
    with pytest.raises(UserError, match="set model.merge_lora=true, or export"):
        save_model(policy, TOKENIZER, tmp_path / "alone", merge=False)


# --------------------------------------------------------------------------- other kinds

OTHERS: dict[str, Any] = {
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "loha": peft.LoHaConfig(target_modules=["q_proj"]),
    "lokr": peft.LoKrConfig(target_modules=["q_proj"]),
    "oft": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4),
    "vera": peft.VeraConfig(target_modules=["q_proj"]),
    "adalora": peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9),
    "layer norms": peft.LNTuningConfig(target_modules=["norm"]),
}
PROMPTS: dict[str, Any] = {
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=3),
}


def other(base: str, place: Path, config: Any) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.task_type = "CAUSAL_LM"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted: Any = peft.get_peft_model(model, config).eval()
    disturb(weight for weight in adapted.parameters() if weight.requires_grad)
    adapted.save_pretrained(place)
    return adapted


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_adapters_of_other_kinds_are_merged(
    kind: str, bases: dict[bool, str], tmp_path: Path
) -> None:
    theirs = other(bases[False], tmp_path, OTHERS[kind])
    assert not same(logits(theirs), logits(policy_of(bases[False], FULL)))
    for config in (FULL, FROZEN, model_of(lora_rank=4, adapter="merge")):
        assert same(logits(policy_of(tmp_path, config)), logits(theirs))
    with pytest.raises(UserError, match="are not trained on"):
        policy_of(tmp_path)


@pytest.mark.parametrize("kind", PROMPTS)
def test_adapters_that_put_tokens_before_the_text_are_refused(
    kind: str, bases: dict[bool, str], tmp_path: Path
) -> None:
    other(bases[False], tmp_path, PROMPTS[kind])
    with pytest.raises(UserError, match="put tokens before the text"):
        policy_of(tmp_path, FULL)


def test_settings_that_this_peft_does_not_know_are_told_or_refused(
    bases: dict[bool, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = foreign(bases[False], tmp_path, {})
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "use_warp": True, "warp_config": None}))
    assert same(logits(policy_of(tmp_path)), logits(theirs))
    assert "peft knows no use_warp=True; left out" in capsys.readouterr().err
    file.write_text(json.dumps({**content, "alora_invocation_tokens": [3]}))
    with pytest.raises(UserError, match="alora_invocation_tokens does not act by its matrices"):
        policy_of(tmp_path, FULL)


# --------------------------------------------------------------------------- quantised bases


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_roles_share_a_base_of_few_bits(kind: str, bases: dict[bool, str], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    words = ["model=qlora", "model.lora_rank=4", "model.lora_alpha=16", f"model.quantize={kind}"]
    config = composed("dpo", *words).model
    policy = policy_of(bases[False], config)
    held = {name: weight.dtype for name, weight in policy.named_parameters()}
    few = {name for name in held if held[name] in (torch.uint8, torch.int8)}
    assert len(few) == 14  # every linear layer of two blocks; the head is as it was
    assert {held[name] for name in held.keys() - few} == {torch.float32}
    assert set(trained(policy)).isdisjoint(few)

    start = outputs(policy)
    reference = Reference(policy)
    critic = load_critic(None, bases[False], config, TOKENIZER, 5, CPU, policy)
    adam = torch.optim.AdamW([*trained(policy).values(), *trained(critic).values()], 1e-2)
    for _ in range(2):
        adam.zero_grad()
        scored = token_logprobs(policy, BATCH, chunk=9, reference=reference)
        loss = (state_values(critic, BATCH) - 3).square().mean() - scored.logprobs.sum() / 20
        loss.backward()
        adam.step()
    assert not same(outputs(policy), start)
    with reference.active() as frozen:
        assert torch.equal(outputs(frozen), start)
    assert reference.digest() == reference.hash

    save_model(policy, TOKENIZER, tmp_path, merge=False)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert {weight.dtype for weight in written.values()} == {torch.float32}
    again = policy_of(tmp_path, config)
    assert same(outputs(again), outputs(policy))
    assert not same(outputs(policy_of(tmp_path)), outputs(policy))  # over the base in float32
