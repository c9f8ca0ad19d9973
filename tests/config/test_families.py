"""`model=FAMILY model.size=SIZE`: a hub id, and a rate that fits it without the network."""

from pathlib import Path

import pytest

from rlhf_cli.commands.ls import run as ls
from rlhf_cli.config import catalog
from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.data.hub import NAME
from rlhf_cli.runs.rates import called, choose_rates, size_of
from tests.conftest import Cli

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


def test_families_are_listed_with_their_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    ls(["model"])
    text = " ".join(capsys.readouterr().out.split())
    assert "qwen3 sft Qwen3; model.size=0.6b|1.7b|4b|8b|14b|30b-a3b" in text
    assert "gated" in text


@pytest.mark.slow
def test_a_family_that_cannot_be_downloaded_is_one_line(cli: Cli) -> None:
    done = cli("sft", "model=granite", "out=out", HF_HOME="nowhere")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()[-1:]
    assert "ibm-granite/granite-3.3-2b-base" in line and "Traceback" not in done.stderr
