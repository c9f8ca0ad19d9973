"""What folders bring along beside weights does not run: pickles, code, hostile templates."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.cli import main
from tests.conftest import Cli
from tests.tiny import DATA, WORDS, words_of

MARKER = "IT_RAN"
SAMPLING = [*DATA, "algo.prompts=2", "algo.max_tokens=4", "out=new"]
GENERATE = ["generate", *SAMPLING, "policy=runs/demo/sft"]

Change = Callable[[], object]


class Malicious:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (MARKER, "w")


def plant(*names: str) -> None:
    """Malicious pickles under these names."""
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".pkl"):
            Path(name).write_bytes(pickle.dumps(Malicious()))
        else:
            torch.save({"weight": Malicious()}, name)


def foreign(folder: str, weights: str | None = None) -> None:
    """A stage's folder as if another tool had made it, its weights renamed or gone."""
    unclaimed(folder)
    for file in Path(folder).glob("*.safetensors"):
        file.rename(file.with_name(weights)) if weights else file.unlink()


def unclaimed(folder: str) -> None:
    """A stage's folder without what the stage says of it."""
    for name in ("stage.json", "config.yaml"):
        Path(folder, name).unlink()


def change_json(file: str, **changes: Any) -> None:
    path = Path(file)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a copy of the chain's folder, as a user would."""
    monkeypatch.chdir(place)


def test_the_pickle_runs_where_it_is_read() -> None:
    plant("a.pkl", "a.bin")
    for read in (lambda: pickle.loads(Path("a.pkl").read_bytes()), lambda: full_load("a.bin")):
        read()
        assert Path(MARKER).exists()
        Path(MARKER).unlink()


def full_load(name: str) -> None:
    torch.load(name, weights_only=False)


def refused(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> str:
    """The last line on stderr of a command that is refused, and has run and written nothing."""
    monkeypatch.setattr("sys.argv", ["rlhf-cli", *words])
    assert main() == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert not Path(MARKER).exists() and not Path("new").exists()
    return err.splitlines()[-1]


# --------------------------------------------------------------------------- weights


def only_a_pickle() -> None:
    foreign("runs/demo/sft")
    plant("runs/demo/sft/pytorch_model.bin")


def a_pickle_and_others() -> None:
    """Some safetensors lie there, but none that transformers looks for."""
    foreign("runs/demo/sft", "other.safetensors")
    plant("runs/demo/sft/pytorch_model.bin")


def shards_of_pickles() -> None:
    a_pickle_and_others()
    Path("runs/demo/sft/pytorch_model.bin").rename("runs/demo/sft/pytorch_model-00001-of-1.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model-00001-of-1.bin"}}
    Path("runs/demo/sft/pytorch_model.bin.index.json").write_text(json.dumps(index))


def a_reward_pickle() -> None:
    foreign("runs/demo/reward", "other.safetensors")
    plant("runs/demo/reward/pytorch_model.bin")


def an_adapter_pickle(name: str) -> Change:
    def change() -> None:
        foreign(f"runs/demo/{name}", "other.safetensors")
        plant(f"runs/demo/{name}/adapter_model.bin")

    return change


def a_base_pickle() -> None:
    a_pickle_and_others()
    unclaimed("runs/demo/adapter")
    base = {"base_model_name_or_path": "runs/demo/sft"}
    change_json("runs/demo/adapter/adapter_config.json", **base)


def an_adapter_as_base() -> None:
    an_adapter_pickle("reward_adapter")()
    base = {"base_model_name_or_path": "runs/demo/reward_adapter"}
    change_json("runs/demo/adapter/adapter_config.json", **base)
    unclaimed("runs/demo/adapter")


NO_SAFETENSORS = "no file named model.safetensors"
ADAPTER = "no file named adapter_model.safetensors"
CONTINUED = ["dpo", *words_of("dpo"), *WORDS["lora"], "policy=runs/demo/adapter", "out=new"]
PPO = ["ppo", *words_of("ppo"), "algo.steps=1", "out=new"]
LORA_PPO = [*PPO, *WORDS["lora"], "reward=runs/demo/reward_adapter"]
REFUSED: dict[str, tuple[Change, list[str], str]] = {
    "a policy": (only_a_pickle, GENERATE, "no weights (*.safetensors)"),
    "beside others": (a_pickle_and_others, GENERATE, NO_SAFETENSORS),
    "shards": (shards_of_pickles, GENERATE, NO_SAFETENSORS),
    "sft": (
        a_pickle_and_others,
        ["sft", *DATA, "model=pretrained", "model.path=runs/demo/sft", "out=new"],
        NO_SAFETENSORS,
    ),
    "the trunk of a reward model": (
        a_pickle_and_others,
        ["reward", *words_of("reward"), "out=new"],
        NO_SAFETENSORS,
    ),
    "a reward model": (a_reward_pickle, PPO, NO_SAFETENSORS),
    "an adapter": (
        an_adapter_pickle("adapter"),
        ["generate", *SAMPLING, "policy=runs/demo/adapter"],
        ADAPTER,
    ),
    "an adapter trained further": (an_adapter_pickle("adapter"), CONTINUED, ADAPTER),
    "an adapter as reward": (an_adapter_pickle("reward_adapter"), LORA_PPO, ADAPTER),
    "the base of an adapter": (
        a_base_pickle,
        ["generate", *SAMPLING, "policy=runs/demo/adapter"],
        NO_SAFETENSORS,
    ),
    "an adapter as base": (
        an_adapter_as_base,
        ["generate", *SAMPLING, "policy=runs/demo/adapter"],
        "which is an adapter too",
    ),
    "a baseline": (
        an_adapter_pickle("adapter"),
        ["evaluate", *SAMPLING, "policy=runs/demo/sft", "reward=regex:a", "gold=null"]
        + ["baselines=[runs/demo/adapter]", "reference=null"],
        ADAPTER,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_weights_that_are_a_pickle_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    change, words, part = REFUSED[name]
    change()
    line = refused(words, monkeypatch, capfd)
    assert line.startswith("rlhf-cli: error: runs/demo/") and part in line


def test_weights_that_are_a_pickle_are_refused_by_the_script(cli: Cli) -> None:
    a_pickle_and_others()
    done = cli(*GENERATE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("error: ") == 1 and NO_SAFETENSORS in done.stderr.splitlines()[-1]
    assert not Path(MARKER).exists() and not Path("new").exists()


def test_an_adapter_of_the_hub_is_refused(cli: Cli, tmp_path: Path) -> None:
    """transformers would put it on its base by itself, and read a pickle where there is no other
    file.
    """
    repository = tmp_path / "hub/models--me--adapter"
    shutil.copytree("runs/demo/adapter", repository / "snapshots/0123")
    shutil.copy("runs/demo/sft/config.json", repository / "snapshots/0123")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123")
    foreign(str(repository / "snapshots/0123"))
    plant(str(repository / "snapshots/0123/adapter_model.bin"))
    done = cli("generate", *SAMPLING, "policy=me/adapter", HF_HUB_CACHE=str(tmp_path / "hub"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "me/adapter is an adapter" in done.stderr.splitlines()[-1]
    assert not Path(MARKER).exists() and not Path("new").exists()


# --------------------------------------------------------------------------- code

MODELING = f"""
open("{MARKER}", "w")
from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "mine"

class Model(LlamaForCausalLM):
    config_class = Config
"""
BROUGHT = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}


def bring_code(model_type: str) -> None:
    foreign("runs/demo/sft", "model.safetensors")
    change_json("runs/demo/sft/config.json", model_type=model_type, auto_map=BROUGHT)
    Path("runs/demo/sft/modeling.py").write_text(MODELING)


def test_code_of_a_folder_is_refused_by_the_key_that_lets_it_run(cli: Cli) -> None:
    bring_code("mine")
    done = cli(*GENERATE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines(keepends=True)[-1] == (
        "rlhf-cli: error: runs/demo/sft: cannot load the model: it brings code of its own; read "
        "that, then set model.trust_remote_code=true\n"
    )
    assert not Path(MARKER).exists() and not Path("new").exists()


def test_code_of_a_tokenizer_is_refused(cli: Cli) -> None:
    bring_code("mine")
    Path("runs/demo/sft/tokenizer.json").unlink()
    brought = {"AutoTokenizer": ["modeling.Tokenizer", None]}
    change_json(
        "runs/demo/sft/tokenizer_config.json", auto_map=brought, tokenizer_class="Tokenizer"
    )
    done = cli(*GENERATE)
    assert done.returncode == 2
    assert "set model.trust_remote_code=true" in done.stderr.splitlines()[-1]
    assert not Path(MARKER).exists() and not Path("new").exists()


@pytest.mark.slow
def test_code_beside_a_known_architecture_is_passed_over(cli: Cli) -> None:
    bring_code("llama")
    assert cli(*GENERATE).returncode == 0
    assert not Path(MARKER).exists()


@pytest.mark.slow
def test_code_that_is_trusted_runs_and_is_named(cli: Cli, tmp_path: Path) -> None:
    bring_code("mine")
    trusted = "model.trust_remote_code=true"
    cache = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = cli(*GENERATE, trusted, "reward=runs/demo/reward", **cache)
    assert done.returncode == 0, done.stderr
    assert Path(MARKER).exists()
    line = f"{trusted}: Python code that runs/demo/sft brings along may run"
    before, _, after = done.stderr.partition(f"{line}\n")
    begun = ("generate: ", "out: ", "loading ")  # nothing of theirs has run by then
    assert all(each.startswith(begun) for each in before.splitlines()), done.stderr
    assert after and trusted not in after
    checked = cli(*GENERATE, trusted, "out=other", "--check")
    assert line in checked.stderr.splitlines()


# --------------------------------------------------------------------------- chat templates


@pytest.mark.parametrize(
    ("template", "part"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails: access to attribute"),
        ("{{ cycler.__init__.__globals__.os.system('touch x') }}", "fails: access to attribute"),
        ("{{ messages.append(messages) }}", "fails: access to attribute 'append'"),
        ("{{ messages[0].content.format.__globals__ }}", "leaves out what is replied"),
        ("{% include '/etc/passwd' %}", "fails: no loader for this environment"),
        ("{{ raise_exception('roles must alternate') }}", "fails: roles must alternate"),
        ("{{ 1 / 0 }}", "fails: division by zero"),
        ("{% if %}", "fails: Expected an expression"),
    ],
)
def test_a_chat_template_stays_in_its_sandbox(
    template: str, part: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One that never ends is not stopped: whoever names a folder waits for it."""
    foreign("runs/demo/sft", "model.safetensors")
    Path("runs/demo/sft/chat_template.jinja").write_text(template)
    line = refused([*GENERATE, "data.template=chat"], monkeypatch, capfd)
    assert line.startswith(f"rlhf-cli: error: the chat template of runs/demo/sft {part}")
    assert not Path("x").exists()
