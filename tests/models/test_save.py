"""What is written: what ends responses, the settings and the tokenizer of the source."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlhf_cli.models.load import load_policy
from rlhf_cli.models.save import save_model, save_tokenizer, set_stop_ids
from rlhf_cli.models.tokenizers import load_tokenizer, stop_ids_of
from tests.families import family
from tests.tiny import manifest, run_stage
from tests.toys import bpe, llama, model_of

CPU = torch.device("cpu")
FULL, LORA = model_of(lora_rank=0), model_of(lora_rank=2, merge_lora=False)
# temperature without do_sample: transformers warns of it, and refuses to write it once changed
SETTINGS = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 302], "nobodys_key": {"a": 1}}
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chatty(place: Path, **settings: Any) -> Path:
    """A model folder with EOS 2, of which <|end|>, id 302, ends responses too."""
    tokenizer = bpe()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]}
    )
    tokenizer.chat_template = TEMPLATE
    llama(len(tokenizer)).save_pretrained(place)
    tokenizer.save_pretrained(place)
    (place / "generation_config.json").write_text(json.dumps({**SETTINGS, **settings}))
    return place


def generation(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "generation_config.json").read_text())
    return found


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
def test_written_settings_are_the_sources(merge: bool, tmp_path: Path) -> None:
    """Of an adapter that has none they are its base's, and an adapter's own go on."""
    base = chatty(tmp_path / "base")
    tokenizer = load_tokenizer(str(base), FULL)
    assert stop_ids_of(str(base), tokenizer) == [2, 302]
    place = str(base)
    for step, ids in enumerate(([2, 302], [2, 301, 302])):
        model = load_policy(place, LORA, tokenizer, CPU)
        set_stop_ids(model, tokenizer, ids)
        out = tmp_path / str(step)
        save_model(model, tokenizer, out, merge)
        assert generation(out) == {**SETTINGS, "eos_token_id": ids}
        assert stop_ids_of(str(out), tokenizer) == ids
        place = str(out)
    (tmp_path / "0/generation_config.json").unlink()
    if not merge:
        assert stop_ids_of(str(tmp_path / "0"), tokenizer) == [2, 302]


def test_a_folder_without_settings_gets_what_its_tokenizer_says(tmp_path: Path) -> None:
    base = chatty(tmp_path / "base")
    (base / "generation_config.json").unlink()
    tokenizer = load_tokenizer(str(base), FULL)
    model = load_policy(str(base), FULL, tokenizer, CPU)
    set_stop_ids(model, tokenizer, [2])
    save_model(model, tokenizer, tmp_path / "out", merge=False)
    said = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    found = generation(tmp_path / "out")
    assert {key: found[key] for key in said} == said


# --------------------------------------------------------------------------- tokenizers


def test_an_unchanged_tokenizer_goes_by_its_own_files(tmp_path: Path) -> None:
    """As files of an older release are, which this one would write otherwise."""
    base = chatty(tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    config["chat_template"] = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    (base / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    state = json.loads((base / "tokenizer.json").read_text())
    state["truncation"] = {
        "direction": "Right",
        "max_length": 9,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (base / "tokenizer.json").write_text(json.dumps(state))
    tokenizer: Any = load_tokenizer(str(base), FULL)
    out = tmp_path / "out"
    save_tokenizer(tokenizer, out)
    files = sorted(file.name for file in base.glob("*token*"))
    assert sorted(file.name for file in out.iterdir()) == files
    assert all((out / file).read_bytes() == (base / file).read_bytes() for file in files)

    tokenizer.pad_token = "<|user|>"  # a reward model's: that alone is changed
    save_tokenizer(tokenizer, tmp_path / "reward")
    found = json.loads((tmp_path / "reward/tokenizer_config.json").read_text())
    assert found == {**config, "pad_token": "<|user|>"}
    assert AutoTokenizer.from_pretrained(tmp_path / "reward").pad_token == "<|user|>"

    tokenizer.chat_template = "{{ messages }}"  # one of data.chat_template is written
    save_tokenizer(tokenizer, tmp_path / "other")
    assert AutoTokenizer.from_pretrained(tmp_path / "other").chat_template == "{{ messages }}"
    shutil.rmtree(base)  # gone since
    save_tokenizer(tokenizer, tmp_path / "gone")
    assert AutoTokenizer.from_pretrained(tmp_path / "gone").get_vocab() == tokenizer.get_vocab()


# --------------------------------------------------------------------------- stages


def ends_its_turns(place: Path) -> None:
    """Let a model of this folder say the end of turn, whatever comes before."""
    model: Any = AutoModelForCausalLM.from_pretrained(place)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.zero_()
        model.model.norm.weight[0] = 1
        model.model.embed_tokens.weight[:, 0] = 5
        model.lm_head.weight.mul_(0.1)
        model.lm_head.weight[302, 0] = 9
    settings = generation(place)
    model.generation_config = GenerationConfig()  # some versions refuse to write ours
    model.save_pretrained(place)
    (place / "generation_config.json").write_text(json.dumps(settings))


def test_a_model_that_ended_its_turns_still_does(chain: Path, tmp_path: Path) -> None:
    """By an id that is neither the tokenizer's EOS nor the template's of its rows.

    One step of grpo at a rate of nothing; transformers generates as before.
    """
    base = chatty(tmp_path / "base")
    ends_its_turns(base)
    words = [f"policy={base}", f"data.path={chain / 'rows.jsonl'}", "data.template={prompt}"]
    words += [f"data.text_path={chain / 'text.jsonl'}", "algo.steps=1", "algo.lr=1e-9"]
    out = tmp_path / "out"
    run_stage("grpo", out, *words, "reward=length:8", "hardware.save_every=null")
    assert generation(out) == SETTINGS
    assert manifest(out)["eos_ids"] == [2, 302]
    ids = torch.tensor([[1, 9, 9]])
    for place in (base, out):
        model: Any = AutoModelForCausalLM.from_pretrained(place)
        found = model.generate(ids, do_sample=False, max_new_tokens=8)[0, 3:].tolist()
        assert found == [302]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "sft by chat", "dpo", "ppo", "lora", "merged", "best"])
def test_every_stage_keeps_what_ends_responses(stage: str, chain: Path, tmp_path: Path) -> None:
    base = chatty(tmp_path / "base", eos_token_id=[2, 301])
    paths = [f"data.path={chain / 'rows.jsonl'}", f"data.text_path={chain / 'text.jsonl'}"]
    words = [*paths, f"policy={base}", "hardware.save_every=null"]
    name = {"sft by chat": "sft", "lora": "dpo", "merged": "dpo", "best": "dpo"}.get(stage, stage)
    if name == "sft":
        from rlhf_cli.config.compose import compose
        from rlhf_cli.stages.sft import run

        words = [*paths, "model=pretrained", f"model.path={base}", "data=jsonl", "data.eval_rows=8"]
        words += ["algo.batch_size=8", "algo.epochs=1", "algo.lr=1e-3", f"out={tmp_path / 'out'}"]
        how = "chat" if stage == "sft by chat" else "{prompt}"
        run(compose("sft", [*words, f"data.template={how}"]))
    else:
        more = {
            "ppo": ["algo.steps=1", f"reward={chain / 'runs/demo/reward'}"],
            "lora": ["model=lora", "model.lora_rank=2", "model.merge_lora=false"],
            "merged": ["model=lora", "model.lora_rank=2", "model.merge_lora=true"],
            "best": ["algo.keep=best"],
        }
        run_stage(name, tmp_path / "out", *words, *more.get(stage, []))
    taught = [302] if stage == "sft by chat" else []
    expected = sorted([2, 301, *taught])
    assert generation(tmp_path / "out") == {**SETTINGS, "eos_token_id": expected}
    assert manifest(tmp_path / "out")["eos_ids"] == expected


def test_families_tokenizers_are_written_as_they_are(tmp_path: Path) -> None:
    for name in ("gpt2", "llama2", "t5"):
        source = tmp_path / name
        family(name).save_pretrained(source)
        save_tokenizer(load_tokenizer(str(source), FULL), tmp_path / "out" / name)
        for file in source.iterdir():
            assert (tmp_path / "out" / name / file.name).read_bytes() == file.read_bytes()
