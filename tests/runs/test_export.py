"""`rlhf-cli export`: what it writes is what it was given, in another form, or nothing."""

import errno
import json
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_cli.commands import export
from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.data.items import Tokens
from rlhf_cli.folders.integrity import check_whole
from rlhf_cli.folders.manifest import content_hash, kind_of, read_manifest
from rlhf_cli.models.tokenizers import load_tokenizer
from rlhf_cli.reporting.model_card import card_text
from rlhf_cli.rewards.models import load_model_reward
from rlhf_cli.runs import export as work
from rlhf_cli.runs.model_checks import check_folder
from rlhf_cli.runs.origin import card_of, front_matter_of
from rlhf_cli.runs.provenance import siblings_of
from tests.toys import FROZEN, data_of, hardware_of

IDS = torch.tensor([[5, 6, 7, 8, 9]])
ADAPTER, REWARD = "runs/demo/adapter", "runs/demo/reward_adapter"
CONVERTER = """#!/usr/bin/env python3
import json, sys
folder, _, out, _, kind = sys.argv[1:]
if kind == "q9": sys.exit("ValueError: no such type")
open(out, "w").write(json.dumps(sys.argv[1:]))
"""

pytestmark = pytest.mark.usefixtures("inside")


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    """A folder that is not there."""
    return tmp_path / "dest"


def leftovers(dest: Path) -> list[str]:
    """What lies where DEST was to be."""
    return sorted(entry.name for entry in dest.parent.iterdir())


def test_an_adapter_is_merged_and_its_card_tells_how_it_was_made(
    dest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export.run([ADAPTER, str(dest)])
    assert capsys.readouterr().out == f"{dest}\n"
    whole: Any = AutoModelForCausalLM.from_pretrained(dest)
    adapted: Any = peft.AutoPeftModelForCausalLM.from_pretrained(ADAPTER)
    with torch.no_grad():
        assert torch.allclose(whole(IDS).logits, adapted(IDS).logits, atol=1e-5)
    check_whole(dest)
    said, source = read_manifest(dest), read_manifest(ADAPTER)
    assert said is not None and source is not None
    assert said["parents"] == {"policy": {"path": ADAPTER, "hash": content_hash(ADAPTER)}}
    for key in ("eos_ids", "pad_id", "template", "limits", "tokenizer", "metrics", "reward"):
        assert said[key] == source[key]
    assert front_matter_of(dest / "README.md") == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rlhf-cli", "sft", "dpo"],
    }
    card = (dest / "README.md").read_text()
    for told in ("runs/demo/sft", content_hash("runs/demo/sft"), "eval/rewards/accuracy", "beta:"):
        assert told in card
    for name in ("generation_config.json", "tokenizer.json"):
        assert (dest / name).read_bytes() == Path("runs/demo/adapter", name).read_bytes()


def test_a_reward_adapter_scores_as_before(dest: Path) -> None:
    export.run([REWARD, str(dest)])
    assert kind_of(dest) == "reward"
    check_folder("reward", str(dest), "reward", "a reward model")
    tokenizer = load_tokenizer(REWARD, FROZEN)
    before, after = (
        load_model_reward(
            str(place), FROZEN, data_of(), hardware_of(), tokenizer, torch.device("cpu"), None
        )
        for place in (REWARD, dest)
    )
    sequence = [work_tokens()]
    assert torch.allclose(before.raw(sequence), after.raw(sequence), atol=1e-5)
    assert (before.mean, before.std) == (after.mean, after.std)
    plain: Any = AutoModelForSequenceClassification.from_pretrained(dest)
    assert plain.config.problem_type == "regression"  # so that a pipeline leaves scores as they are
    with torch.no_grad():
        ids = torch.tensor([[*sequence[0].prompt, *sequence[0].response]])
        assert plain(ids).logits.item() == pytest.approx(after.raw(sequence).item(), abs=1e-5)


def work_tokens() -> Tokens:
    return Tokens([1, 5, 6], [7, 8, 2])


def test_the_code_of_a_card_asks_as_the_stages_did(
    dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt in its template; of a reward model the score where it was trained, at EOS."""
    tokenizer: Any = load_tokenizer(REWARD, FROZEN)
    export.run([REWARD, str(dest)])
    scorer = load_model_reward(
        REWARD, FROZEN, data_of(), hardware_of(), tokenizer, torch.device("cpu"), None
    )
    ids = tokenizer("Hello!Hi.").input_ids
    raw = scorer.raw([Tokens(ids[:-1], [ids[-1], tokenizer.eos_token_id])]).item()
    monkeypatch.chdir(dest.parent)
    names: dict[str, Any] = {}
    exec((dest / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    assert names["rewards"].item() == pytest.approx((raw - scorer.mean) / scorer.std, abs=1e-4)


def test_a_card_writes_prompts_by_the_template() -> None:
    tokenizer = load_tokenizer(REWARD, FROZEN)
    card = card_of(Path(REWARD), REWARD, "x", "float32", tokenizer, own=True)
    text = card_text(replace(card, template="Q: {prompt}\nA: "))
    assert r"'Q: Hello!\nA: ' + 'Hi.</s>'" in text and "trust_remote_code=True" in text
    text = card_text(replace(card, template="chat", own_class=False))
    assert "[asked + 'Hi.</s>'], add_special_tokens=False" in text
    assert "trust_remote_code=True" not in text
    policy = replace(card, kind="policy", chat=True, template="Q: {prompt}\nA: ")
    assert r"generate('Q: Hello!\nA: ')" in card_text(policy)
    assert 'generate([{"role": "user"' in card_text(replace(policy, template=None))


def test_weights_are_cast_and_sharded(dest: Path) -> None:
    export.run(["runs/demo/sft", str(dest), "save_dtype=bfloat16", "shard_size=10KB"])
    files = sorted(dest.glob("*.safetensors"))
    assert len(files) > 1 and (dest / "model.safetensors.index.json").is_file()
    source = load_file("runs/demo/sft/model.safetensors")
    written = {name: value for file in files for name, value in load_file(file).items()}
    assert written.keys() == source.keys()
    for name, value in written.items():
        assert torch.equal(value, source[name].bfloat16())
    assert json.loads((dest / "config.json").read_text())["dtype"] == "bfloat16"
    check_whole(dest)


def test_a_link_stays_and_leads_to_what_is_written(tmp_path: Path, dest: Path) -> None:
    (tmp_path / "disk").mkdir()
    dest.symlink_to(tmp_path / "disk")
    export.run(["runs/demo/sft", str(dest)])
    assert dest.is_symlink()
    check_whole(tmp_path / "disk")


def test_the_same_order_is_done_and_another_is_refused(dest: Path) -> None:
    order = ["runs/demo/sft", str(dest)]
    export.run(order)
    made = (dest / "stage.json").stat()
    export.run(order)
    after = (dest / "stage.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    with pytest.raises(UserError, match="is another export; name another, or set overwrite=true"):
        export.run([*order, "save_dtype=float16"])
    with pytest.raises(UserError, match="is another export"):
        export.run([ADAPTER, str(dest)])
    (dest / "mine.txt").touch()
    with pytest.raises(UserError, match=r"holds mine.txt, which no export wrote"):
        export.run([*order, "overwrite=true"])
    (dest / "mine.txt").unlink()
    (dest / "README.md").write_text("edited")
    check_whole(dest)
    export.run([*order, "save_dtype=float16", "overwrite=true"])
    assert load_file(dest / "model.safetensors")["model.norm.weight"].dtype == torch.float16
    assert leftovers(dest) == ["dest"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/demo/sft", "runs/demo/reward"], "exists and no export wrote it"),
        (["runs/demo/sft", "runs/demo/reward", "overwrite=true"], "exists and no export wrote it"),
        (["runs/demo/sft", "rows.jsonl"], "exists and no export wrote it"),
        (["runs/demo/sft", "runs/demo/sft/x"], "lie in each other"),
        (["runs/demo/sft", "runs/demo"], "lie in each other"),
        (["runs/demo/none", "x"], "does not exist: run `rlhf-cli sft"),
        (["rows.jsonl", "x"], "is a file"),
        (["nobody/nothing", "x"], "is not to be had from the hub now"),
        (["runs/demo/sft", "x", "push=me/it"], "HF_HUB_OFFLINE is set"),
        (["runs/demo/sft"], "export takes two folders"),
        (["runs/demo/sft", "x", "y"], "export takes two folders"),
        (["runs/demo/sft", "x", "--force"], "unknown flag --force"),
        (["runs/demo/sft", "x", "savedtype=float16"], "did you mean save_dtype?"),
        (["runs/demo/sft", "x", "save_dtype=int8"], "must be source|float32|bfloat16|float16"),
        (["runs/demo/sft", "x", "shard_size=5"], "shard_size must be size such as 500MB"),
        (["runs/demo/sft", "x", "private=yes"], "private must be true|false"),
        (["runs/demo/sft", "x", "gguf="], "got nothing"),
    ],
)
def test_what_is_wrong_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        export.run(words)
    assert message in str(error.value)
    assert not Path("x").exists()


def test_a_damaged_or_unfinished_folder_is_refused(tmp_path: Path, dest: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree("runs/demo/sft", damaged)
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match="is damaged"):
        export.run([str(damaged), str(dest)])
    (damaged / "stage.json").unlink()
    with pytest.raises(UserError, match="holds no finished model"):
        export.run([str(damaged), str(dest)])
    assert leftovers(dest) == ["damaged"]


def test_a_disk_that_is_full_leaves_nothing(dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(work, "card_text", full)  # after the weights
    with pytest.raises(RunError, match="was not written: No space left on device"):
        export.run(["runs/demo/sft", str(dest)])
    assert leftovers(dest) == []


def test_a_weight_that_float16_cannot_hold(tmp_path: Path, dest: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained("runs/demo/sft")
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    model.save_pretrained(tmp_path / "big")
    shutil.copy("runs/demo/sft/tokenizer.json", tmp_path / "big")
    with pytest.raises(RunError, match=r"model.norm.weight of .* is too large for float16"):
        export.run([str(tmp_path / "big"), str(dest), "save_dtype=float16"])
    assert leftovers(dest) == ["big"]


def test_what_others_made_keeps_its_files_and_licence(tmp_path: Path, dest: Path) -> None:
    theirs, adapter = tmp_path / "theirs", tmp_path / "adapter"
    shutil.copytree("runs/demo/sft", theirs)
    for name in ("stage.json", "config.yaml", "metrics.jsonl"):
        (theirs / name).unlink()
    (theirs / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n# Theirs\n")
    (theirs / "LICENSE").write_text("do as you like")
    (theirs / "preprocessor_config.json").write_text("{}")
    (theirs / "training_args.bin").write_bytes(b"a pickle")
    model = AutoModelForCausalLM.from_pretrained(theirs)
    lora = peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, lora).save_pretrained(str(adapter))
    export.run([str(adapter), str(dest)])
    kept = {"LICENSE", "preprocessor_config.json", "tokenizer.json", "generation_config.json"}
    assert kept <= set(leftovers(dest / "x"))
    assert "training_args.bin" not in leftovers(dest / "x")
    matter = front_matter_of(dest / "README.md")
    assert (matter["license"], matter["license_name"]) == ("other", "mine")
    assert "base_model" not in matter  # a folder on this disk is no name on the hub


# --------------------------------------------------------------------------- GGUF, the hub


@pytest.mark.parametrize("place", ["LLAMA_CPP", "PATH"])
def test_the_converter_is_run(
    place: str, tmp_path: Path, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    home = tmp_path / "llama.cpp"
    home.mkdir()
    script = home / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER)
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    before = os.environ["PATH"] + ":" if place == "PATH" else ""
    monkeypatch.setenv(place, f"{before}{home}")
    with pytest.raises(RunError, match=r"failed \(1\): ValueError: no such type"):
        export.run(["runs/demo/sft", str(dest), "gguf=q9"])
    assert not dest.exists()
    export.run(["runs/demo/sft", str(dest), "gguf=q8_0"])
    folder, *words = json.loads((dest / "dest-q8_0.gguf").read_text())
    assert Path(folder).parent == dest.parent and words[1:] == [
        f"{folder}/dest-q8_0.gguf",
        "--outtype",
        "q8_0",
    ]
    check_whole(dest)


def test_without_the_converter_a_line_says_how_to_get_it(
    dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    with pytest.raises(UserError, match="convert_hf_to_gguf.py is not on PATH: git clone"):
        export.run(["runs/demo/sft", str(dest), "gguf=f16"])
    monkeypatch.setenv("LLAMA_CPP", "/nowhere")
    with pytest.raises(UserError, match="LLAMA_CPP=/nowhere holds no convert_hf_to_gguf.py"):
        export.run(["runs/demo/sft", str(dest), "gguf=f16"])


class Hub:
    """A stand-in for HfApi, with one repository that is there already."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.private = {"me/public": False}

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> Any:
        self.calls.append(("create", (name, private)))
        self.private.setdefault(name, private)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

    def repo_info(self, name: str) -> Any:
        return type("Info", (), {"private": self.private[name]})

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if repo_id == "me/broken":
            raise ConnectionError(f"401 for {os.environ['HF_TOKEN']}")
        self.calls.append(("upload", (repo_id, leftovers(folder_path / "x"))))


def test_push(
    dest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    api = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    order = ["runs/demo/sft", str(dest)]
    with pytest.raises(UserError, match="nobody is logged in"):
        export.run([*order, "push=me/it"])
    with pytest.raises(UserError, match="Repo id must"):
        export.run([*order, "push=me/it/x"])
    assert not dest.exists()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret_0123")
    monkeypatch.setenv("HF_TOKEN", "hf_secret_0123")
    export.run([*order, "push=me/it"])
    export.run([*order, "push=me/open", "private=false"])  # the folder is there already
    (create, name), (upload, (repo, files)) = api.calls[:2]
    assert (create, name, upload, repo) == ("create", ("me/it", True), "upload", "me/it")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert api.calls[2] == ("create", ("me/open", False))
    with pytest.raises(RunError, match="me/public is there and public; set private=false"):
        export.run([*order, "push=me/public"])
    assert len([call for call, _ in api.calls if call == "upload"]) == 2
    with pytest.raises(RunError, match="the same command pushes it"):
        export.run([*order, "push=me/broken"])
    shown = capsys.readouterr()
    assert "hf_secret_0123" not in shown.out + shown.err


def test_an_export_is_no_baseline_of_its_own_source(chain: Path) -> None:
    place = Path("runs/demo/exported")
    try:
        export.run(["runs/demo/sft", str(place)])
        assert str(place) not in siblings_of("runs/demo/adapter")
    finally:
        shutil.rmtree(place)


def test_a_card_holds_no_secret(
    tmp_path: Path, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree("runs/demo/sft", copy)
    with (copy / "config.yaml").open("a") as file:
        file.write("note: abcdefgh1234\n")
    monkeypatch.setenv("MY_API_KEY", "abcdefgh1234")
    export.run([str(copy), str(dest)])
    card = (dest / "README.md").read_text()
    assert "[MY_API_KEY]" in card and "abcdefgh1234" not in card
