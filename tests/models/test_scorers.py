"""Reward models of every family: the library's class or ours, and the heads that others made."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.batches import collate
from rlhf_cli.data.items import Tokens
from rlhf_cli.folders.manifest import RESPONSE, TOKEN, kind_of
from rlhf_cli.models.adapters import trained
from rlhf_cli.models.classifiers import load_classifier
from rlhf_cli.models.decoder import hidden_states, unwrap
from rlhf_cli.models.forward import score_head, token_scores
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.save import save_model, set_score_pad
from rlhf_cli.models.scalar_head import ScalarHead, ScalarHeadForSequenceClassification
from rlhf_cli.models.score import scores_of, token_scores_of
from rlhf_cli.models.scorers import load_critic, load_scorer, scorer_from_policy
from rlhf_cli.models.shared import SharedScorer
from rlhf_cli.models.tokenizers import fit_embeddings, load_tokenizer
from rlhf_cli.runs.remote_code import brings_code
from tests.model_families import build
from tests.pace import fast, slow
from tests.toys import FROZEN, bpe, hardware_of, llama, model_of, sequences_of

CPU = torch.device("cpu")
FULL = model_of(lora_rank=0)
LORA = model_of(lora_rank=4, lora_alpha=16.0)
SEQUENCES = sequences_of(6)
TOKENIZER = bpe()
SIZE: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
}
STATES: dict[str, Any] = {"vocab_size": len(TOKENIZER), "hidden_size": 16, "num_hidden_layers": 2}
# families that transformers has no sequence classifier for
WITHOUT: dict[str, Any] = {
    "Ernie4_5": {**SIZE, "head_dim": 8},
    "Olmoe": {**SIZE, "num_experts": 4, "num_experts_per_tok": 2},
    "Granite": {**SIZE, "embedding_multiplier": 12.0, "logits_scaling": 8.0},
    "Cohere": {**SIZE, "logit_scale": 0.1},
    "Lfm2": {**SIZE, "layer_types": ["conv", "full_attention"]},
    "Mamba": {**STATES, "state_size": 4},
}


def tiny(family: str, place: Path) -> Path:
    """A policy folder of a family as another tool would write it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**WITHOUT[family])
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    TOKENIZER.save_pretrained(place)
    return place


def scores(model: nn.Module, level: str = RESPONSE) -> Tensor:
    """Of fixed sequences of different lengths, in padded batches."""
    if level == RESPONSE:
        return scores_of(model, SEQUENCES, hardware_of())
    return torch.cat(token_scores_of(model, SEQUENCES, hardware_of()))


@torch.no_grad()
def moved(model: nn.Module) -> nn.Module:
    """The model with all trained weights elsewhere."""
    draw = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.add_(0.1 * torch.randn(weight.shape, generator=draw))
    return model


def scorer_of(place: Path, config: Any, level: str = RESPONSE) -> Any:
    return moved(scorer_from_policy(str(place), config, TOKENIZER, 7, CPU, level))


# --------------------------------------------------------------------------- classes of ours


def test_ours_gives_what_the_librarys_class_gives(tmp_path: Path) -> None:
    """Of the same weights, scores and gradients, padded to the right or left."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZE, "pad_token_id": 0, "num_labels": 1})
    library = LlamaForSequenceClassification(config).eval()
    library.save_pretrained(tmp_path)
    ours = ScalarHeadForSequenceClassification.from_pretrained(str(tmp_path)).eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0], [0, 0, 11, 12]])
    labels = torch.tensor([1.0, 0.0, 2.0])
    for given in ({}, {"attention_mask": (ids != 0).long(), "labels": labels}):
        a, b = library(ids, **given), ours(ids, **given)
        assert a.logits.shape == b.logits.shape == (3, 1)
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-6, atol=1e-6)
    a.loss.backward(), b.loss.backward()
    theirs = dict(library.named_parameters())
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight.grad, theirs[name].grad)
    assert type(ours).__mro__[1:3] == (ScalarHeadForSequenceClassification, ScalarHead)


ELSEWHERE = """
import sys, torch
from transformers import AutoModelForSequenceClassification as Sequence
from transformers import AutoModelForTokenClassification as Token
auto = Sequence if sys.argv[2] == "response" else Token
model = auto.from_pretrained(sys.argv[1], num_labels=1, trust_remote_code=True).eval()
model.save_pretrained(sys.argv[1] + "-again")
model = auto.from_pretrained(sys.argv[1] + "-again", trust_remote_code=True).eval()
for line in sys.stdin:
    ids, response = line.split("|")
    ids = torch.tensor([[int(each) for each in ids.split()]])
    logits = model(ids).logits.flatten()
    assert len(logits) == (1 if auto is Sequence else ids.shape[1])
    print(*logits[-int(response):].tolist())
"""


def scores_elsewhere(place: Path, level: str, home: Path) -> Tensor:
    """What a process without this package gives, one sequence after the other."""
    lines = [f"{' '.join(map(str, [*e.prompt, *e.response]))}|{len(e.response)}" for e in SEQUENCES]
    environment = {**os.environ, "HF_HOME": str(home), "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(place), level],
        input="\n".join(lines),
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return torch.tensor([float(each) for each in run.stdout.split()])


@pytest.mark.parametrize(
    ("family", "level"),
    [
        ("Ernie4_5", RESPONSE),
        ("Mamba", TOKEN),
        ("Olmoe", RESPONSE),
    ],
)
@pytest.mark.slow
def test_other_tools_load_the_folder_of_ours(family: str, level: str, tmp_path: Path) -> None:
    """Here no code of a folder runs, and the folder is not said to bring any."""
    scorer = scorer_of(tiny(family, tmp_path / "policy"), FULL, level)
    assert type(scorer).__name__.startswith("ScalarHead")
    place = tmp_path / "reward"
    save_model(scorer, TOKENIZER, place, merge=True)
    assert kind_of(place) == "reward" and not brings_code(place)
    (place / "stage.json").write_text(f'{{"kind": "reward", "level": "{level}"}}')
    found = scores_elsewhere(place, level, tmp_path)
    torch.testing.assert_close(found, scores(scorer, level), rtol=1e-5, atol=1e-5)
    (place / "scalar_head.py").write_text("raise SystemExit('was run')")
    for config in (FROZEN, replace(FROZEN, trust_remote_code=True)):
        again = load_scorer(str(place), config, TOKENIZER, CPU)
        torch.testing.assert_close(scores(again, level), scores(scorer, level), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "family",
    fast(["Ernie4_5"], WITHOUT),
)
def test_every_family_has_reward_models_and_critics(family: str, tmp_path: Path) -> None:
    """In full and with LoRA, of responses and tokens: written = loaded, padded = unpadded."""
    policy = tiny(family, tmp_path / "policy")
    # peft refuses to adapt what Mamba's kernels take weights of
    for config in (FULL,) if family == "Mamba" else (FULL, LORA):
        for level in (RESPONSE, TOKEN):
            place = tmp_path / f"{level} {config.lora_rank}"
            scorer = scorer_of(policy, config, level)
            assert isinstance(unwrap(scorer), ScalarHead)
            expected = scores(scorer, level)
            alone = [
                token_scores_of(scorer, [each], hardware_of())[0][-1 if level == RESPONSE else 0 :]
                for each in SEQUENCES
            ]
            torch.testing.assert_close(torch.cat(alone), expected, rtol=1e-4, atol=1e-4)
            save_model(scorer, TOKENIZER, place, merge=config is FULL)
            (place / "stage.json").write_text(f'{{"kind": "reward", "level": "{level}"}}')
            assert (place / "scalar_head.py").is_file()
            again = load_scorer(str(place), FROZEN, TOKENIZER, CPU)
            torch.testing.assert_close(scores(again, level), expected, rtol=1e-5, atol=1e-5)
    whole = load_policy(str(policy), FULL, TOKENIZER, CPU)
    assert not scores(load_critic(None, str(policy), FULL, TOKENIZER, 7, CPU, whole)).any()
    if family == "Mamba":
        return
    adapted = load_policy(str(policy), LORA, TOKENIZER, CPU)
    place = tmp_path / f"{RESPONSE} 4"
    shared = load_scorer(str(place), FROZEN, TOKENIZER, CPU, adapted)
    assert isinstance(shared, SharedScorer)
    expected = scores(load_scorer(str(place), FROZEN, TOKENIZER, CPU))
    torch.testing.assert_close(scores(shared), expected, rtol=1e-5, atol=1e-5)
    assert not scores(load_critic(None, str(policy), LORA, TOKENIZER, 7, CPU, adapted)).any()


@pytest.mark.parametrize("family", fast(["llama4"], ["llama4", "qwen2_5_vl"]))
def test_a_model_that_sees_becomes_a_scorer(family: str, tmp_path: Path) -> None:
    """Of a policy in full and of an adapter: on the policy's own states, and written = loaded."""
    base, policy = str(tmp_path / "base"), str(tmp_path / "policy")
    build(family, base)
    tokenizer = load_tokenizer(base, FROZEN)
    save_model(moved(load_policy(base, LORA, tokenizer, CPU)), tokenizer, Path(policy), merge=False)
    batch = collate([Tokens([21, 9, 30], [11, 12, 13])], CPU)
    for start in (base, policy):
        states = hidden_states(load_policy(start, FULL, tokenizer, CPU), batch)
        for config in (FULL, LORA):
            scorer = scorer_from_policy(start, config, tokenizer, 7, CPU)
            expected = score_head(scorer, states)
            torch.testing.assert_close(token_scores(scorer, batch), expected)
            written = tmp_path / f"{Path(start).name} {config.lora_rank}"
            save_model(moved(scorer), tokenizer, written, merge=config is FULL)
            again = load_scorer(str(written), FROZEN, tokenizer, CPU)
            found, theirs = (token_scores(each, batch) for each in (again, scorer))
            torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)


def test_a_router_that_is_called_as_heads_are_is_not_trained(tmp_path: Path) -> None:
    """peft trains all modules of those names whole; of policies, of adapters and again."""
    build("longcat_flash", base := str(tmp_path / "base"))
    policy, reward = tmp_path / "policy", tmp_path / "reward"
    adapted = load_policy(base, LORA, load_tokenizer(base, FROZEN), CPU)
    save_model(moved(adapted), TOKENIZER, policy, merge=False)
    save_model(scorer_of(policy, LORA), TOKENIZER, reward, merge=False)
    for scorer in (scorer_of(Path(base), LORA), load_scorer(str(reward), LORA, TOKENIZER, CPU)):
        heads = [name for name in trained(scorer) if "lora_" not in name]
        assert heads == ["base_model.model.score.modules_to_save.default.weight"]


@pytest.mark.parametrize(
    ("family", "elsewhere"),
    [
        ("qwen2_5_vl", False),
        *(slow(each, True) for each in ("qwen2_5_vl", "mistral3", "gemma3")),
    ],
)
def test_weights_of_other_names_on_disk_are_found(
    family: str, elsewhere: bool, tmp_path: Path
) -> None:
    """Of families whose folders name them otherwise than the modules do, which go by the class."""
    policy = tmp_path / "policy"
    build(family, policy)
    tokenizer: Any = load_tokenizer(str(policy), FROZEN)
    full, adapted = (
        moved(scorer_from_policy(str(policy), config, tokenizer, 7, CPU)) for config in (FULL, LORA)
    )
    expected = {"full": scores(full), "adapted": scores(adapted)}
    other = str(tiny("Ernie4_5", tmp_path / "other"))
    scorer_from_policy(other, FULL, TOKENIZER, 7, CPU)  # names of one family are not another's
    for name, scorer in (("full", full), ("adapted", adapted)):
        place = tmp_path / name
        save_model(scorer, tokenizer, place, merge=scorer is full)
        again = load_scorer(str(place), FROZEN, tokenizer, CPU)
        torch.testing.assert_close(scores(again), expected[name], rtol=1e-5, atol=1e-5)
    with_head = list(load_file(policy / "model.safetensors"))
    without = {each for each in with_head if "lm_head" not in each} | {"score.weight"}
    assert set(load_file(tmp_path / "full" / "model.safetensors")) == without
    base = ScalarHeadForSequenceClassification.from_pretrained(str(policy))
    plain = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapted")).eval()
    torch.testing.assert_close(scores(plain), expected["adapted"], rtol=1e-5, atol=1e-5)
    if elsewhere:
        found = scores_elsewhere(tmp_path / "full", RESPONSE, tmp_path)
        torch.testing.assert_close(found, expected["full"], rtol=1e-5, atol=1e-5)


def test_an_adapter_of_ours_loads_with_peft_alone(tmp_path: Path) -> None:
    policy = tiny("Ernie4_5", tmp_path / "policy")
    scorer = scorer_of(policy, LORA)
    save_model(scorer, TOKENIZER, tmp_path / "reward", merge=False)
    base = ScalarHeadForSequenceClassification.from_pretrained(str(policy))
    plain = peft.PeftModel.from_pretrained(base, str(tmp_path / "reward")).eval()
    found = [plain(torch.tensor([[*e.prompt, *e.response]])).logits.item() for e in SEQUENCES]
    torch.testing.assert_close(torch.tensor(found), scores(scorer), rtol=1e-5, atol=1e-5)


def test_a_class_of_the_library_is_used_where_it_is_sound(tmp_path: Path) -> None:
    """With what sees. RoBERTa's has a hidden layer under its head, BERT's reads a pooler."""
    llama(len(TOKENIZER)).save_pretrained(tmp_path / "llama")
    model, _ = load_classifier(str(tmp_path / "llama"), FROZEN, RESPONSE, fresh=True)
    assert type(model) is LlamaForSequenceClassification
    heads = {f"linear_{part}": 8 for part in ("key_head_dim", "value_head_dim")}
    seeing = transformers.Qwen3_5Config(
        text_config={
            **SIZE,
            **heads,
            "head_dim": 8,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 2,
            "layer_types": ["linear_attention", "full_attention"],
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "deepstack_visual_indexes": [],
        },
    )
    transformers.Qwen3_5ForConditionalGeneration(seeing).save_pretrained(tmp_path / "seeing")
    model, _ = load_classifier(str(tmp_path / "seeing"), FROZEN, RESPONSE, fresh=True)
    assert isinstance(model.model.visual, nn.Module)
    for kind, head in (("Roberta", "classifier.dense.bias"), ("Bert", "classifier.bias")):
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=len(TOKENIZER),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=1,
        )
        place = tmp_path / kind
        getattr(transformers, f"{kind}ForSequenceClassification")(config).save_pretrained(place)
        said = f"{kind}ForSequenceClassification is another kind of model .*{head}"
        with pytest.raises(UserError, match=said):
            load_scorer(str(place), FROZEN, TOKENIZER, CPU)


# --------------------------------------------------------------------------- adapters and tokens


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("added", [[], ["<a>", "<b>"]], ids=["no pad", "more tokens"])
def test_a_reward_adapter_loads_whatever_its_tokenizer_lacks_or_adds(
    family: str, added: list[str], tmp_path: Path
) -> None:
    """It holds no embedding but rows of added tokens, and loads beside any policy and elsewhere."""
    tokenizer: Any = bpe()
    if family == "llama":
        model: Any = llama(len(tokenizer))
    else:
        size: dict[str, Any] = {
            "vocab_size": len(tokenizer),
            "n_embd": 16,
            "n_layer": 1,
            "n_head": 2,
        }
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size))
    model.save_pretrained(tmp_path / "policy")
    tokenizer.pad_token = None
    tokenizer.add_tokens(added)
    tokenizer.save_pretrained(tmp_path / "policy")
    policy, place = str(tmp_path / "policy"), tmp_path / "reward"
    read = [*SEQUENCES[:2], Tokens([5], [len(tokenizer) - 1, 6])]
    own: Any = load_tokenizer(policy, FROZEN)
    scorer = moved(scorer_from_policy(policy, LORA, own, 7, CPU))
    expected = scores_of(scorer, read, hardware_of())
    set_score_pad(scorer, own, [2], whole=False)
    save_model(scorer, own, place, merge=False)
    held = load_file(place / "adapter_model.safetensors")
    kinds = ("lora_", "score.", *(["trainable_tokens_delta"] if added else []))
    assert all(any(kind in name for kind in kinds) for name in held)

    own = load_tokenizer(str(place), FROZEN)
    for base in (None, load_policy(policy, FULL, own, CPU), load_policy(policy, LORA, own, CPU)):
        again = load_scorer(str(place), FROZEN, own, CPU, base)
        torch.testing.assert_close(scores_of(again, read, hardware_of()), expected)
    critic = load_scorer(str(place), LORA, own, CPU, base)
    torch.testing.assert_close(scores_of(critic, read, hardware_of()), expected)
    plain: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        policy, num_labels=1, pad_token_id=own.pad_token_id
    )
    fit_embeddings(plain, own, policy)
    plain = peft.PeftModel.from_pretrained(plain, str(place)).eval()
    found = [plain(torch.tensor([[*each.prompt, *each.response]])).logits.item() for each in read]
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------- heads of others


def foreign(place: Path, kind: str = "LlamaForSequenceClassification", **changes: Any) -> Tensor:
    """A reward model with a head of other names: a new tensor for each change, None without it.

    Returns its scores without a bias.
    """
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZE, "num_labels": 1})
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(place)
    TOKENIZER.save_pretrained(place)
    weights = load_file(place / "model.safetensors")
    head = weights.pop("score.weight")
    for name, value in changes.items():
        weights[name.replace("__", ".")] = head if value is True else value
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    file = place / "config.json"
    file.write_text(file.read_text().replace("LlamaForSequenceClassification", kind))
    return scores(model)


@pytest.mark.parametrize(
    ("kind", "names", "bias"),
    [
        ("LlamaForSequenceClassification", {"score__weight": True}, 0.0),
        ("LlamaForSequenceClassification", {"score__weight": True, "score__bias": 1}, 0.5),
        ("LlamaForRewardModel", {"rm_head__weight": True, "rm_head__bias": 1}, 0.5),
        ("LlamaForCausalLM", {"v_head__summary__weight": True, "lm_head__weight": 2}, 0.0),
        ("Scorer", {"regression_head__weight": True, "mean": 1}, 0.0),
    ],
)
def test_a_head_of_any_name_is_found(
    kind: str, names: dict[str, Any], bias: float, tmp_path: Path, capsys: Any
) -> None:
    """One with a bias, one beside an unembedding, and what is left out is said."""
    others = {1: torch.tensor([0.5]), 2: torch.randn(len(TOKENIZER), 16)}
    given = {name: value if value is True else others[value] for name, value in names.items()}
    expected = foreign(tmp_path, kind, **given) + bias
    assert kind_of(tmp_path) == ("policy" if kind == "LlamaForCausalLM" else "reward")
    scorer = load_scorer(str(tmp_path), FROZEN, TOKENIZER, CPU)
    torch.testing.assert_close(scores(scorer), expected, rtol=1e-6, atol=1e-6)
    assert ("are left out: mean\n" in capsys.readouterr().err) == ("mean" in names)
    save_model(scorer, TOKENIZER, tmp_path / "again", merge=True)
    again = load_scorer(str(tmp_path / "again"), FROZEN, TOKENIZER, CPU)
    assert torch.equal(scores(again), scores(scorer))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"score__weight": (3, 16)}, "its head score gives 3 labels"),
        ({"q_head__weight": (3, 16)}, r"no such head \(beside the decoder: q_head.weight\)"),
        (
            {"v_head__0__weight": (8, 16), "v_head__2__weight": (1, 8)},
            r"no such head \(beside the decoder: v_head.0.weight, v_head.2.weight\)",
        ),
        ({"a__weight": (1, 16), "b__weight": (1, 16)}, "beside the decoder: a.weight, b.weight"),
        ({}, "beside the decoder: nothing"),
    ],
)
def test_another_head_is_refused_by_name(changes: Any, said: str, tmp_path: Path) -> None:
    weights: dict[str, Any] = {name: torch.randn(shape) for name, shape in changes.items()}
    foreign(tmp_path, **weights)
    with pytest.raises(UserError, match=said):
        load_scorer(str(tmp_path), FROZEN, TOKENIZER, CPU)
