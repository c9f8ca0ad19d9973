"""`model=FAMILY model.size=SIZE`: a hub id, and a rate that fits it without the network."""

import json
from pathlib import Path

import pytest

from rlhf_cli.commands.completion import candidates
from rlhf_cli.commands.ls import run as ls
from rlhf_cli.config import catalog
from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.data.hub import NAME
from rlhf_cli.runs.rates import called, choose_rates, size_of
from tests.conftest import Cli
from tests.model_families import build

CONF = catalog.config_dirs()
FAMILIES = [
    option
    for option in catalog.options("model", CONF)
    if catalog.option_values("model", option, CONF).get("sizes")
]
DATA = ["data=jsonl", "data.path=rows.jsonl"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_size_of_a_family_is_a_model_of_the_hub(family: str) -> None:
    values = catalog.option_values("model", family, CONF)
    first = (CONF[0] / "model" / f"{family}.yaml").read_text().partition("\n")[0]
    assert first.startswith("# ") and first.endswith("|".join(values["sizes"]))
    size = list(values["sizes"])[-1]
    cfg = compose("sft", [*DATA, f"model={family}", f"model.size={size}"])
    assert cfg.model.path == cfg.start == values["sizes"][size]
    for size, path in values["sizes"].items():
        assert NAME.fullmatch(path)
        number, unit = size.partition("-")[0].lstrip("e")[:-1], size.partition("-")[0][-1]
        parameters = float(number) * {"m": 1e6, "b": 1e9}[unit]
        assert size_of(path, size) == pytest.approx(parameters, rel=0.1)


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        (["model=gpt2"], "algo.lr: 0.0001 (sft of a model of 124M parameters"),
        (["model=phi", "model.size=14b"], "algo.lr: 2e-05 (sft of a model of 14B parameters"),
        (
            ["model=llama3", "model.size=70b", "model.lora_rank=16", "model.merge_lora=false"],
            "algo.lr: 0.0001 (sft of a model of 70B parameters, an adapter",
        ),
    ],
)
def test_rates_go_by_the_size_that_was_named(words: list[str], rate: str) -> None:
    assert choose_rates(compose("sft", [*DATA, *words]))[0].startswith(rate)


def test_a_folder_in_place_of_the_hub_is_no_size(tmp_path: Path) -> None:
    cfg = compose("sft", [*DATA, "model=phi", f"model.path={tmp_path}"])
    assert cfg.start == str(tmp_path) and size_of(cfg.start, called(cfg, cfg.start)) is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model=granite", "model.size=5b"], "model.size=5b: model.size knows 2b, 8b"),
        (["model=pretrained", "model.size=5b"], "is for families, as model=qwen3"),
    ],
)
def test_a_wrong_size_is_told(words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        compose("sft", [*DATA, *words])


def test_families_are_listed_with_their_sizes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    ls(["model"])
    text = " ".join(capsys.readouterr().out.split())
    assert "qwen3 sft Qwen3; model.size=0.6b|1.7b|4b|8b|14b|30b-a3b" in text
    assert "gated" in text


@pytest.mark.slow
def test_a_family_that_cannot_be_downloaded_is_one_line(cli: Cli) -> None:
    done = cli("sft", "model=granite", "out=out", HF_HOME="nowhere")
    assert done.returncode == 2
    *begun, line = done.stderr.splitlines()
    assert not any("error" in each for each in begun)
    assert "ibm-granite/granite-3.3-2b-base: no usable tokenizer: it is not on this machine" in line
    assert "HF_HUB_OFFLINE is set" in line


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("rlhf-cli sft model=granite model.size=", ["model.size=2b ", "model.size=8b "]),
        ("rlhf-cli sft model.size=", []),
        ("rlhf-cli export ", []),
        ("rlhf-cli export a gguf=q8_0 p", []),
        ("rlhf-cli merge a b p", ["private=", "push="]),
    ],
)
def test_sizes_and_places_are_completed(line: str, offered: list[str]) -> None:
    assert candidates(line) == offered


@pytest.mark.slow
def test_a_family_is_trained_from_its_download(cli: Cli, tmp_path: Path) -> None:
    """Positions, size and memory are told of what the hub's cache holds, without the network."""
    place = tmp_path / "hub" / "models--Qwen--Qwen3-0.6B-Base"
    build("qwen3", place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    rows = [{"prompt": f"Greet {i}: ", "completion": f"Hi {i}!"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["sft", "model=qwen3", *DATA, "data.eval_rows=4", "algo.max_steps=1", "out=out"]
    words += ["hardware.tokens_per_microbatch=256"]
    hub = {"HF_HUB_CACHE": str(tmp_path / "hub")}
    refused = cli(*words, "data.max_prompt_tokens=4000", **hub)
    assert "do not fit the 128 positions of Qwen/Qwen3-0.6B-Base" in refused.stderr
    checked = cli(*words, "--check", **hub)
    assert "algo.lr: 0.005 (sft of a model of 0.0" in checked.stdout + checked.stderr
    assert "memory, weights of the policy" in checked.stdout + checked.stderr
    done = cli(*words, **hub)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
