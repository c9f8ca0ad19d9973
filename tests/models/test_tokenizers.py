"""Tokenizers as families have them: where they begin and end, pads, and rows for added tokens."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.kinds import Demonstration, Prompt
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.masters import master_of
from rlhf_cli.models.save import save_model, set_score_pad, set_stop_ids, spare_token
from rlhf_cli.models.score import scores_of
from rlhf_cli.models.scorers import load_scorer, scorer_from_policy
from rlhf_cli.models.tokenizers import ids_of_no_token, load_tokenizer, same_ids, stop_ids_of
from rlhf_cli.rollout.decode import decode
from rlhf_cli.rollout.native import NativeEngine
from rlhf_cli.rollout.sampling import Sampling
from tests.families import family
from tests.toys import FROZEN, bpe, characters, data_of, hardware_of, llama, model_of, sequences_of

CPU = torch.device("cpu")
FULL, LORA = model_of(lora_rank=0), model_of(lora_rank=2, merge_lora=False)
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(names: list[str]) -> Tokenizer:
    """Byte-level BPE with these special tokens and no others, from id 0 on."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings: Any = {"special_tokens": names, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(["Greet Ann"], trainers.BpeTrainer(vocab_size=270, **settings))
    return tokenizer


def glm() -> PreTrainedTokenizerFast:
    """Two tokens begin every text; there is no BOS, and the pad token is EOS."""
    names = ["</s>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"]
    tokenizer = byte_level(names)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=[("[gMASK]", 1), ("<sop>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", chat_template=GLM
    )


def bare() -> PreTrainedTokenizerFast:
    """One special token, which is BOS, EOS and UNK, as of GPT-2."""
    names: Any = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>")
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(["</s>"]), **names)


def folder_of(place: Path, tokenizer: Any, rows: int | None = None, **changes: Any) -> str:
    """A model folder with this tokenizer."""
    llama(rows or len(tokenizer), **changes).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


# --------------------------------------------------------------------------- beginnings


def test_prompts_begin_with_all_that_the_tokenizer_begins_texts_with() -> None:
    """Once: where a row or a chat template spells it, it is not put there again."""
    tokenizer = glm()
    start = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    assert tokenizer("a").input_ids[:2] == start
    rows = [Prompt("Hi Ann"), Prompt("[gMASK]<sop>Hi Ann")]
    for how in ({}, {"template": "chat"}, {"special_tokens": "keep"}):
        encoder = Encoder(tokenizer, data_of(**how))
        for _, ids in encoder.prompts(rows[: 1 if "template" in how else 2]):
            assert ids[:2] == start and not set(start) & set(ids[2:])
    for how in ({}, {"template": "chat"}):  # a prompt that is cut keeps its beginning
        encoder = Encoder(tokenizer, data_of(**how, max_prompt_tokens=6, long_prompts="cut"))
        ((_, ids),) = encoder.prompts([Prompt("Hi Ann and all the others here")])
        assert len(ids) == 6 and ids[:2] == start


# --------------------------------------------------------------------------- ends


def demonstration(reply: str = "Hi") -> Demonstration:
    return Demonstration("Greet", reply)


def test_what_ended_responses_before_still_does_but_where_replies_hold_it() -> None:
    """EOS 2 and a turn's end stay; of 5 and the added ids, what stands inside replies goes."""
    tokenizer = family("llama3", CHATML)
    end, other = (tokenizer.get_vocab()[each] for each in ("<|im_end|>", "<|eot_id|>"))
    eos = tokenizer.eos_token_id
    encoder = Encoder(tokenizer, data_of(template="chat"))
    encoder.ends_with([eos, other])
    encoder.demonstrations([demonstration()])
    assert encoder.stop_ids == sorted([eos, end, other])
    inside = tokenizer("!", add_special_tokens=False).input_ids[-1]
    encoder.ends_with([inside])
    encoder.demonstrations([demonstration("Hi! And so on")])
    assert encoder.stop_ids == sorted([eos, end, other])
    assert any("ends none now: !" in line for line in encoder.report())
    again = Encoder(tokenizer, data_of(template="chat"))  # rows that were kept are not read again
    again.ends_with([eos, other, inside])
    again.remember(encoder.seen())
    assert again.stop_ids == encoder.stop_ids


def test_an_eos_that_the_tokenizer_lacks_is_the_generation_configs(tmp_path: Path) -> None:
    tokenizer = family("llama3", CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = None
    path = folder_of(tmp_path, tokenizer, eos_token_id=None)
    generation = tmp_path / "generation_config.json"
    generation.unlink()
    with pytest.raises(UserError, match="no EOS token, and no generation config names one; set"):
        Encoder(load_tokenizer(path, FROZEN), data_of())
    generation.write_text(json.dumps({"eos_token_id": [end, 10**6]}))
    found = load_tokenizer(path, FROZEN)
    assert (found.eos_token, found.eos_token_id) == ("<|im_end|>", end)
    assert stop_ids_of(path, found) == [end]  # no model draws the other one
    assert Encoder(found, data_of()).demonstrations([demonstration()])[0].response[-1] == end
    generation.unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": end}))
    assert load_tokenizer(path, FROZEN).eos_token_id == end
    for bad in ("2", True, [2, -1]):
        generation.write_text(json.dumps({"eos_token_id": bad}))
        with pytest.raises(UserError, match=re.escape(f"eos_token_id={bad} is not a whole")):
            load_tokenizer(path, FROZEN)


# --------------------------------------------------------------------------- pads


def test_a_pad_token_that_is_eos_hides_no_eos_from_the_loss(tmp_path: Path) -> None:
    path = folder_of(tmp_path, glm())
    found = load_tokenizer(path, FROZEN)
    assert found.pad_token_id == found.eos_token_id  # as it was
    (tokens,) = Encoder(found, data_of()).demonstrations([demonstration()])
    assert tokens.response[-1] == found.eos_token_id and tokens.loss is None


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [(glm(), "<|user|>"), (family("llama3"), "<pad>"), (bare(), None)],
    ids=["pad is eos", "a pad token", "eos alone"],
)
def test_the_pad_token_of_a_reward_model_ends_no_response(
    tokenizer: Any, expected: str | None
) -> None:
    tokenizer.chat_template = None
    assert spare_token(tokenizer, [tokenizer.eos_token_id]) == expected


def test_a_table_that_grows_as_it_is_written_grows_in_float32(tmp_path: Path) -> None:
    """In bfloat16, too, a reward model without a token to spare gets one at its end."""
    path = folder_of(tmp_path / "policy", bare())
    found = load_tokenizer(path, FROZEN)
    scorer = scorer_from_policy(path, model_of(dtype="bfloat16"), found, 7, CPU)
    exact = {name: master_of(weight).clone() for name, weight in scorer.named_parameters()}
    set_score_pad(scorer, found, [int(found.eos_token_id)], whole=True)
    save_model(scorer, found, tmp_path / "out", merge=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert len(written[name]) == len(exact[name]) + 1
    assert all(torch.equal(value, written[each][: len(value)]) for each, value in exact.items())


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize("tokenizer", [glm(), bare()], ids=["glm", "gpt2"])
def test_transformers_reads_scores_where_ours_stand(
    tokenizer: Any, adapter: bool, tmp_path: Path
) -> None:
    """At the EOS, though it is the pad token of the policy, or there is none."""
    from transformers import AutoModelForSequenceClassification

    path = folder_of(tmp_path / "policy", tokenizer)
    found, eos = load_tokenizer(path, FROZEN), int(tokenizer.eos_token_id)
    scorer = scorer_from_policy(path, LORA if adapter else FULL, found, 7, CPU)
    sequences = sequences_of(3)
    for sequence in sequences:
        sequence.response[-1] = eos
    expected = scores_of(scorer, sequences, hardware_of())
    set_score_pad(scorer, found, [eos], whole=not adapter)
    save_model(scorer, found, tmp_path / "out", merge=False)
    assert same_ids(load_tokenizer(str(tmp_path / "out"), FROZEN), load_tokenizer(path, FROZEN))
    again = load_scorer(str(tmp_path / "out"), FROZEN, load_tokenizer(path, FROZEN), CPU)
    torch.testing.assert_close(scores_of(again, sequences, hardware_of()), expected)
    pad = AutoTokenizer.from_pretrained(tmp_path / "out").pad_token_id
    if adapter and pad is None:
        return  # an adapter has no row for one; a batch of one needs none
    theirs: Any = AutoModelForSequenceClassification
    if adapter:
        base = theirs.from_pretrained(path, num_labels=1)
        plain: Any = peft.PeftModel.from_pretrained(base, tmp_path / "out")
        base.config.pad_token_id = pad
    else:
        plain = theirs.from_pretrained(tmp_path / "out")
        assert plain.config.pad_token_id == pad
    ids = [sequence.prompt + sequence.response for sequence in sequences]
    width = max(map(len, ids))
    padded = torch.tensor([each + [pad] * (width - len(each)) for each in ids])
    mask = torch.tensor([[1] * len(each) + [0] * (width - len(each)) for each in ids])
    with torch.no_grad():
        scores = plain(padded, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------- rows of tokens


def added() -> PreTrainedTokenizerFast:
    tokenizer = bpe()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>"]})
    return tokenizer


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_added_tokens_start_at_the_mean(
    tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = added()
    rows = len(tokenizer) - 2
    path = folder_of(tmp_path, tokenizer, rows, tie_word_embeddings=tied)
    state = torch.random.get_rng_state()
    model: Any = load_policy(path, FULL, tokenizer, CPU)
    assert torch.equal(torch.random.get_rng_state(), state)
    plain: Any = AutoModelForCausalLM.from_pretrained(path)
    for ours, theirs in (
        (model.get_input_embeddings().weight, plain.get_input_embeddings().weight),
        (model.get_output_embeddings().weight, plain.get_output_embeddings().weight),
    ):
        assert torch.equal(ours[:rows], theirs)
        assert torch.equal(ours[rows:], theirs.mean(0).expand(2, -1))
    said = f"has 2 tokens more than the model has rows, {rows} (<a>, <b>): new rows start at"
    assert said in " ".join(capsys.readouterr().err.split())
    load_policy(path, FROZEN, tokenizer, CPU)
    assert not capsys.readouterr().err  # told where it is trained


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_holds_and_trains_the_rows_of_added_tokens_alone(
    tied: bool, tmp_path: Path
) -> None:
    """It goes on, is merged, is scored by, and loads with plain peft on the base."""
    tokenizer = added()
    rows = len(tokenizer) - 2
    path = folder_of(tmp_path / "base", tokenizer, rows, tie_word_embeddings=tied)
    model: Any = load_policy(path, LORA, tokenizer, CPU)
    changed(model)
    ids = torch.tensor([[1, rows, 7, rows + 1, 9]])
    with torch.no_grad():
        expected = model(ids).logits
    out = tmp_path / "out"
    set_stop_ids(model, tokenizer, [2])
    save_model(model, tokenizer, out, merge=False)
    held = peft.load_peft_weights(str(out), device="cpu")
    tables = {name: tuple(weight.shape) for name, weight in held.items() if "lora_" not in name}
    start = "base_model.model."
    end = "token_adapter.trainable_tokens_delta"
    names = ["model.embed_tokens"] if tied else ["lm_head", "model.embed_tokens"]
    assert tables == {f"{start}{name}.{end}": (2, 16) for name in names}
    for config in (LORA, FULL, FROZEN):  # goes on, and merged
        again: Any = load_policy(str(out), config, tokenizer, CPU)
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-4)
    plain: Any = peft.AutoPeftModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-4, atol=1e-4)
    save_model(model, tokenizer, tmp_path / "merged", merge=True)
    whole: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, expected, rtol=1e-4, atol=1e-4)

    scorer = scorer_from_policy(str(out), LORA, tokenizer, 7, CPU)
    changed(scorer)
    scores = scores_of(scorer, sequences_of(3), hardware_of())
    set_score_pad(scorer, tokenizer, [2], whole=False)
    save_model(scorer, tokenizer, tmp_path / "reward", merge=False)
    for base in (None, load_policy(str(out), LORA, tokenizer, CPU)):
        read = load_scorer(str(tmp_path / "reward"), FROZEN, tokenizer, CPU, base)
        found = scores_of(read, sequences_of(3), hardware_of())
        torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-4)


def changed(model: Any) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)


def test_embeddings_that_a_foreign_adapter_holds_are_kept(tmp_path: Path) -> None:
    """As peft saves resized ones: they are no longer the base's."""
    tokenizer = added()
    rows = len(tokenizer) - 2
    path = folder_of(tmp_path / "base", tokenizer, rows)
    base: Any = AutoModelForCausalLM.from_pretrained(path)
    base.resize_token_embeddings(len(tokenizer))
    settings = peft.LoraConfig(
        r=2, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted: Any = peft.get_peft_model(base, settings)
    adapted.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "theirs")
    model = load_policy(str(tmp_path / "theirs"), LORA, tokenizer, CPU)
    save_model(model, tokenizer, tmp_path / "ours", merge=False)
    ids = torch.tensor([[1, rows, 7, rows + 1, 9]])
    for each in ("theirs", "ours"):
        again: Any = load_policy(str(tmp_path / each), FROZEN, tokenizer, CPU)
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, adapted(ids).logits)


def test_rows_without_a_token_are_never_drawn() -> None:
    """Ids 13 to 22 are none's, though the model would draw them."""
    tokenizer = characters(size=13)
    model = llama(23)
    assert ids_of_no_token(model, tokenizer) == tuple(range(13, 23))
    encoder = Encoder(tokenizer, data_of())
    drawn = {}
    for name, sampling in (
        ("sampled", Sampling(8)),
        ("greedy", Sampling(8, 0.0)),
        ("searched", Sampling(8, beams=3)),
    ):
        engine = NativeEngine(model, encoder, hardware_of())
        prompts = [(Prompt("a"), [3, 4]), (Prompt("b"), [5])]
        found = engine.sample(prompts, sampling, samples=2, seed=0)
        drawn[name] = {id for rollout in found for id in rollout.tokens.response}
        assert drawn[name] <= set(range(13)), name
    noise = torch.rand(40, 8, generator=torch.Generator().manual_seed(0))
    free = decode(model, [[3, 4]], noise, Sampling(8), [1], str)
    assert not {id for each in free for id in each.ids} <= set(range(13))
    assert Sampling(8, absent=(13,)).unfiltered
